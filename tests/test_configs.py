"""Every YAML file parses against its recipe; a misspelt key would be seen."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import DPOConfig, ModelConfig, SFTConfig, TrlParser

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
TRAINING = {"freeze_sft": SFTConfig, "freeze_dpo": DPOConfig}


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
    assert found.fraction == given["fraction"]
    assert training.learning_rate == given["learning_rate"]


def test_a_misspelt_key_is_refused(tmp_path: Path) -> None:
    text = (ROOT / "configs/freeze_sft/smoke.yaml").read_text()
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text.replace("learning_rate", "learning_rat"))
    with pytest.raises(ValueError, match="learning_rat"):
        parse(wrong, "freeze_sft")
