"""The README says what is true: its commands exist, its figures are those of the result files."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from safeft.commands import VERBS

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "benchmarks/README.md")
TEXT = PAGES[0].read_text()

COMMANDS = sorted(
    set(re.findall(r"(?<![\w`])`?((?:accelerate launch [^`\n]*-m )?safeft [^`\n#]*)", TEXT))
)


def shown(*verb: str) -> str:
    command = [sys.executable, "-m", "safeft", *verb, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def flags_of(command: str) -> set[str]:
    return {word for word in shlex.split(command) if word.startswith("--")}


def test_there_are_commands_for_every_verb() -> None:
    named = {command.split("safeft ")[-1].split()[0] for command in COMMANDS}
    assert set(VERBS) <= named


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_commands_use_flags_that_exist(verb: str) -> None:
    called = [c for c in COMMANDS if re.search(rf"safeft {verb}\b", c)]
    mine = [c[c.index(f"safeft {verb}") :] for c in called]  # without the launcher's flags
    assert mine
    told = shown(verb)
    parts = re.search(rf"usage: safeft {verb} \{{([\w|]+)\}}", told)
    if parts is None:
        assert set().union(*map(flags_of, mine)) <= set(re.findall(r"--\w+", told)) | {"--config"}
    for part in parts[1].split("|") if parts else ():
        told = shown(verb, part)
        for command in mine:
            if f"safeft {verb} {part}" in command:
                assert flags_of(command) <= set(re.findall(r"--\w+", told))
    for command in mine if parts else ():
        assert re.match(rf"safeft {verb} ({parts[1]})\b", command) or not flags_of(command)


def test_figures_are_those_of_the_result_files() -> None:
    check = [sys.executable, str(ROOT / "benchmarks/readme.py"), "--check"]
    assert subprocess.run(check, check=False).returncode == 0, "run benchmarks/readme.py"


def test_a_wrong_figure_would_be_seen() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import readme
    finally:
        sys.path.pop(0)
    assert readme.PAGES == PAGES
    named = []
    for text in (page.read_text() for page in PAGES):
        assert readme.filled(text) == text
        for name, block in re.findall(
            r"<!-- results:(\w+) -->\n(.*?)<!-- end -->", text, re.DOTALL
        ):
            named.append(name)
            figure = re.search(r"\d\.\d\d", block)
            assert figure is not None
            wrong = text.replace(block, block.replace(figure[0], "9.99", 1))
            assert readme.filled(wrong) != wrong
    assert sorted(named) == sorted(readme.BLOCKS)


LINKS = [
    (page.parent, link)
    for page in PAGES
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text())
    if not link.startswith("https://")
]


@pytest.mark.parametrize(("folder", "link"), LINKS)
def test_links_lead_somewhere(folder: Path, link: str) -> None:
    path, _, part = link.partition("#")
    assert (folder / path).exists()
    if part:
        heads = re.findall(r"^#+ (.*)", (folder / path).read_text(), re.MULTILINE)
        assert part in [re.sub(r"[^\w-]", "", head.lower().replace(" ", "-")) for head in heads]
