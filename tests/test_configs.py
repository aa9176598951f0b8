"""Every YAML file parses against its recipe; a misspelt key would be seen."""

import importlib.util
import re
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from trl import DPOConfig, ModelConfig, SFTConfig, TrlParser

from safeft.commands.locate import LocateConfig
from safeft.commands.training import SafetyArguments
from safeft.guard import Policy

ROOT = Path(__file__).parents[1]
TRAINING = {
    "freeze_sft": SFTConfig,
    "freeze_dpo": DPOConfig,
    "keep_refusals": SFTConfig,
    "precise_shield": SFTConfig,
    "harden": SFTConfig,
}
CONFIGS = sorted(path for recipe in TRAINING for path in (ROOT / "configs" / recipe).glob("*.yaml"))


def recipe_config(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RecipeConfig


def parse(path: Path, recipe: str) -> Any:
    parser = TrlParser((recipe_config(recipe), TRAINING[recipe], ModelConfig))
    return parser.parse_args_and_config(["--config", str(path), "--bf16", "false"])


def test_there_are_configs_and_each_recipe_has_a_smoke_and_a_real_one() -> None:
    for recipe in TRAINING:
        names = {path.name for path in CONFIGS if path.parent.name == recipe}
        assert "smoke.yaml" in names
        assert len(names) >= 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_config_parses(path: Path) -> None:
    found, training, model = parse(path, path.parent.name)
    given = yaml.safe_load(path.read_text())
    assert model.model_name_or_path == given["model_name_or_path"]
    for key in {"fraction", "energy", "rate"} & set(given):
        assert getattr(found, key) == given[key]
    assert training.learning_rate == given["learning_rate"]


ENGINES = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"} | {f"zero{n}": "DEEPSPEED" for n in (1, 2, 3)}


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_accelerate_reads_each_launch_configuration(engine: str) -> None:
    path = ROOT / f"configs/accelerate/{engine}.yaml"
    found = load_config_from_file(str(path))
    assert str(found.distributed_type).endswith(ENGINES[engine])
    if engine == "fsdp2":
        assert found.fsdp_config["fsdp_version"] == 2
    if engine.startswith("zero"):
        assert found.deepspeed_config["zero_stage"] == int(engine[-1])
    assert {p.stem for p in path.parent.glob("*.yaml")} == set(ENGINES)


@pytest.mark.parametrize("name", ["one_node", "several_nodes"])
def test_cluster_scripts_are_shell_and_name_keys_that_exist(name: str) -> None:
    path = ROOT / f"configs/slurm/{name}.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    for verb, kind in (("sft", SafetyArguments), ("locate", LocateConfig)):
        called = re.search(rf"-m safeft {verb} (.*?)\n(?:fi|srun|safeft)", text, re.DOTALL)
        assert called is not None
        known = {field.name for field in fields(kind)} | {field.name for field in fields(SFTConfig)}
        used = set(re.findall(r"--(\w+)", called[1]))
        assert used <= known | {"model_name_or_path", "dataset_name"}, used


@pytest.mark.parametrize("recipe", ["ssah_study", "detox", "guard"])
@pytest.mark.parametrize("name", ["smoke", "qwen2_5_1_5b"])
def test_config_of_a_recipe_without_training_parses(recipe: str, name: str) -> None:
    path = ROOT / f"configs/{recipe}/{name}.yaml"
    (found,) = TrlParser((recipe_config(recipe),)).parse_args_and_config(["--config", str(path)])
    given = yaml.safe_load(path.read_text())
    assert {key: getattr(found, key) for key in given} == given


def test_the_example_of_a_policy_is_one() -> None:
    policy = Policy.read(ROOT / "configs/guard/policy.yaml")
    assert policy.action("answer", 0.6) == "review"
    assert policy.action("prompt", 1.0) == "block"


def test_a_misspelt_key_is_refused(tmp_path: Path) -> None:
    text = (ROOT / "configs/freeze_sft/smoke.yaml").read_text()
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text.replace("learning_rate", "learning_rat"))
    with pytest.raises(ValueError, match="learning_rat"):
        parse(wrong, "freeze_sft")
