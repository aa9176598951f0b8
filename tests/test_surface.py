"""The public names and flags that users rely on."""

import dataclasses
import inspect
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import safeft
from safeft.commands import VERBS

PACKAGE = Path(safeft.__file__).parent

NAMES = {
    "AuditResult",
    "CausalEffect",
    "Certificate",
    "Dampener",
    "Evaluation",
    "Guard",
    "GuardFitter",
    "GuardedGeneration",
    "Judge",
    "NeuronMonitor",
    "NeuronSet",
    "SafeftError",
    "SafetyDropoutCallback",
    "SafetyFreezeCallback",
    "SafetyMonitorCallback",
    "SafetySubspace",
    "as_judge",
    "audit",
    "evaluate",
    "find_sites",
    "locate",
    "locate_subspace",
    "read_prompts",
    "stress",
    "validate",
    "verify",
}


def test_public_names() -> None:
    assert set(safeft.__all__) == NAMES
    for name in NAMES:
        assert inspect.getdoc(getattr(safeft, name)), name
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = safeft.nonesuch


def test_names_for_type_checkers_are_the_same() -> None:
    source = (PACKAGE / "__init__.py").read_text()
    assert set(re.findall(r"import (\w+) as \1", source)) == NAMES


def test_no_module_takes_a_public_name() -> None:
    """`import safeft.x` would put the module where users expect the function."""
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert not modules & NAMES
    assert "locators" in modules


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # pyright: ignore


def test_signatures_that_scripts_rely_on() -> None:
    assert parameters(safeft.locate)[:4] == ["model", "tokenizer", "harmful", "benign"]
    assert {"method", "fraction", "seed"} <= set(parameters(safeft.locate))
    assert parameters(safeft.validate)[:5] == [*parameters(safeft.locate)[:2], "neurons",
                                               *parameters(safeft.locate)[2:4]]  # fmt: skip
    assert {"intervention", "factor", "random_sets"} <= set(parameters(safeft.validate))
    assert parameters(safeft.audit)[:4] == parameters(safeft.locate)[:4]
    assert {"judge", "candidates", "thresholds", "output"} <= set(parameters(safeft.audit))
    assert parameters(safeft.verify)[:4] == ["base", "tuned", "protected", "mode"]
    assert parameters(safeft.SafetyFreezeCallback)[:2] == ["protected", "mode"]
    assert parameters(safeft.locate_subspace)[:3] == ["model", "tokenizer", "harmful"]
    assert {"energy", "rank_share", "memory"} <= set(parameters(safeft.locate_subspace))
    assert {"exact", "violations"} <= {f.name for f in dataclasses.fields(safeft.Certificate)}


FLAGS = {
    "locate": (
        "safeft.commands.locate",
        "LocateConfig",
        {"model_name_or_path", "harmful", "benign", "method", "fraction", "groups", "validate"},
    ),
    "validate": (
        "safeft.commands.validate",
        "ValidateConfig",
        {"model_name_or_path", "neurons", "harmful", "benign", "intervention", "write"},
    ),
    "audit": (
        "safeft.commands.audit",
        "AuditConfig",
        {"model_name_or_path", "harmful", "benign", "output", "compare", "fail_on", "reveal"},
    ),
    "verify": ("safeft.commands.verify", "VerifyConfig", {"base", "tuned", "protected", "json"}),
    "demo": ("safeft.commands.demo", "DemoConfig", {"output_dir", "seeds", "fractions"}),
    "evaluate": (
        "safeft.commands.evaluate",
        "EvaluateConfig",
        {"model_name_or_path", "harmful", "benign", "domain", "base", "guard", "judge"},
    ),
    "guard fit": (
        "safeft.commands.guard",
        "FitConfig",
        {"model_name_or_path", "data", "harmful", "benign", "output_dir", "kinds", "cache"},
    ),
    "guard score": ("safeft.commands.guard", "ScoreConfig", {"guard", "texts", "json"}),
    "guard stream": (
        "safeft.commands.guard",
        "StreamConfig",
        {"guard", "prompts", "policy", "log", "review"},
    ),
    "guard evaluate": (
        "safeft.commands.guard",
        "EvaluateConfig",
        {"guard", "data", "threshold", "false_positives", "streams", "output_dir"},
    ),
    "guard serve": ("safeft.commands.guard", "ServeConfig", {"guard", "host", "port"}),
    "sft": (
        "safeft.commands.training",
        "SafetyArguments",
        {"protected", "protect_mode", "hold", "freeze", "budget"},
    ),
    "report": ("safeft.commands.report", "ReportConfig", {"run_dirs", "output"}),
    "monitor": (
        "safeft.commands.monitoring",
        "MonitorArguments",
        {"monitor", "monitor_every", "stop_below", "roll_back"},
    ),
    "detox": (
        "safeft.commands.detox",
        "DetoxConfig",
        {"model_name_or_path", "toxic", "neutral", "rule", "strength", "judge", "fold", "undo"},
    ),
    "shield": (
        "safeft.commands.shield",
        "ShieldConfig",
        {"model_name_or_path", "harmful", "benign", "languages", "tune_on", "safety_data"},
    ),
}


@pytest.mark.parametrize("verb", sorted(FLAGS))
def test_flags(verb: str) -> None:
    module, config, flags = FLAGS[verb]
    found = getattr(__import__(module, fromlist=[config]), config)
    fields = {field.name: field for field in dataclasses.fields(found)}
    assert flags <= set(fields)
    assert all(field.metadata.get("help") for field in fields.values())


def test_help_is_quick_and_lists_all_verbs() -> None:
    command = [sys.executable, "-m", "safeft", "--help"]
    times = []
    for _ in range(3):
        start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        times.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start)
    assert min(times) < 0.4  # of the processor: others on the machine do not count
    assert all(verb in shown for verb in VERBS)
    assert all((PACKAGE / "commands" / f"{verb}.py").is_file() for verb in VERBS)
