"""``safeft sites``: what is printed of a model from its config alone."""

import json
from pathlib import Path

import pytest

from safeft.commands import main
from tests.families import FAMILIES


def folder_of(name: str, place: Path) -> str:
    family = next(family for family in FAMILIES if family.name == name)
    family.build().config.save_pretrained(place)
    return str(place)


def test_towers_layers_and_what_belongs_to_no_unit(tmp_path: Path, capsys) -> None:
    assert main(["sites", "--model_name_or_path", folder_of("qwen3_vl_moe", tmp_path)]) == 0
    shown = capsys.readouterr().out
    for words in (
        "text       mlp            4 x      24 units  model.language_model.layers.N.mlp.experts.N",
        "reads gate_up_proj[rows], writes down_proj[columns]",
        "vision     attention      2 x       3 units",
        "projector  mlp            1 x      96 units  model.visual.merger",
        "no unit's: model.language_model.layers.N.mlp.gate.weight",
    ):
        assert words in shown, words


def test_the_model_may_be_given_as_one_word(tmp_path: Path, capsys) -> None:
    assert main(["sites", folder_of("gpt2", tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "reads c_fc[columns], writes c_proj[rows]" in shown
    assert "GPT2LMHeadModel" in shown


def test_every_site_as_json(tmp_path: Path, capsys) -> None:
    assert main(["sites", folder_of("gpt_oss", tmp_path), "--json"]) == 0
    sites = json.loads(capsys.readouterr().out)
    assert len(sites) == 10
    assert sites[0]["reads"][0]["bias"] == "gate_up_proj_bias"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"model_type": "t5"}', "no site rule for model type 't5'"),
        ("{", "no readable config.json"),
        ('{"model_type": "nonesuch"}', "no readable config.json"),
    ],
)
def test_other_models_get_a_clear_error(config: str, words: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_text(config)
    assert main(["sites", str(tmp_path)]) != 0
    assert words in capsys.readouterr().err
