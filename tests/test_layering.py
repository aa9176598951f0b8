"""Imports run one way only, and `import safeft` costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "safeft"

LAYERS = (
    ("errors", "progress"),
    ("files", "intervals", "processes", "blocks", "margin"),
    ("artefacts", "batch", "images", "shards"),
    ("sites",),
    ("weights",),
    ("fingerprint",),
    ("neurons",),
    ("subspace",),
    ("capture", "forms", "judge", "overlap"),
    ("prompts",),
    ("generation", "reading"),
    ("locators", "measure", "guard"),
    ("freeze", "evaluation", "causal", "openings"),
    ("auditing", "detox", "monitor", "hardening"),
    ("report",),
    ("grid",),
    ("demo", "shield"),
    ("commands",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

HEAVY_BELOW_COMMANDS = {"trl", "datasets", "deepspeed"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.append(node.module or "")
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def violations(name: str, tree: ast.AST) -> list[str]:
    wrong = []
    for module in imports(tree):
        parts = module.split(".")
        if parts[0] != "safeft" or len(parts) == 1:
            continue
        if parts[1] != name and RANK[parts[1]] >= RANK[name]:
            wrong.append(f"{name} imports {module}")
    return wrong


def files() -> list[Path]:
    found = [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent != PACKAGE or not path.name.startswith("__")
    ]
    assert len(found) > 30
    return found


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    assert violations(room(path), ast.parse(path.read_text())) == []


def test_a_wrong_import_would_be_seen() -> None:
    assert violations("sites", ast.parse("from safeft.freeze.plan import Plan"))
    assert violations("locators", ast.parse("import safeft.measure"))


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_trainers_and_data_sets_stay_above(path: Path) -> None:
    if room(path) in ("commands", "demo", "shield"):  # these train
        return
    heavy = {module.split(".")[0] for module in imports(ast.parse(path.read_text()))}
    assert not heavy & HEAVY_BELOW_COMMANDS


def test_peft_is_imported_inside_functions_only() -> None:
    for path in files():
        top = ast.parse(path.read_text()).body
        modules = [
            m
            for node in top
            for m in imports(ast.Module([node], []))
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        assert not any(module.split(".")[0] == "peft" for module in modules), path


@pytest.mark.parametrize("module", ["safeft", "safeft.commands"])
def test_import_loads_nothing_heavy(module: str) -> None:
    heavy = ["torch", "transformers", "peft", "trl", "deepspeed", "datasets", "sklearn", "jinja2"]
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
