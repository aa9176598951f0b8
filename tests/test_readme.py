"""The README says what is true: its commands exist, its figures are those of the result files."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from safeft.commands import VERBS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()

COMMANDS = sorted(
    set(re.findall(r"(?<![\w`])`?((?:accelerate launch [^`\n]*-m )?safeft [^`\n#]*)", TEXT))
)


def known_flags(verb: str) -> set[str]:
    shown = subprocess.run(
        [sys.executable, "-m", "safeft", verb, "--help"], capture_output=True, text=True, check=True
    ).stdout
    return set(re.findall(r"--[\w]+", shown)) | {"--config"}


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    return {}


def test_there_are_commands_for_every_verb() -> None:
    named = {command.split("safeft ")[-1].split()[0] for command in COMMANDS}
    assert set(VERBS) <= named


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_commands_use_flags_that_exist(verb: str) -> None:
    mine = [c for c in COMMANDS if re.search(rf"safeft {verb}\b", c)]
    assert mine
    used = {
        word
        for command in mine
        for word in shlex.split(command.split(f"safeft {verb}")[1])
        if word.startswith("--")
    }
    assert used <= known_flags(verb)


def test_figures_are_those_of_the_result_files() -> None:
    check = [sys.executable, str(ROOT / "benchmarks/readme.py"), "--check"]
    assert subprocess.run(check, check=False).returncode == 0, "run benchmarks/readme.py"


def test_a_wrong_figure_would_be_seen() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import readme
    finally:
        sys.path.pop(0)
    assert readme.filled(TEXT) == TEXT
    blocks = re.findall(r"<!-- results:\w+ -->\n(.*?)<!-- end -->", TEXT, re.DOTALL)
    assert len(blocks) == len(readme.BLOCKS)
    for block in blocks:
        figure = re.search(r"\d\.\d\d", block)
        assert figure is not None
        wrong = TEXT.replace(block, block.replace(figure[0], "9.99", 1))
        assert readme.filled(wrong) != wrong


@pytest.mark.parametrize("path", re.findall(r"\]\(([^)#]+)\)", TEXT))
def test_links_lead_somewhere(path: str) -> None:
    if not path.startswith("https://"):
        assert (ROOT / path).exists()
