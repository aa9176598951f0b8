"""``safeft validate``, and the check that ``safeft locate`` runs by itself."""

import json
from pathlib import Path
from typing import Any

import pytest

from safeft.causal import CausalEffect
from safeft.commands import main
from safeft.neurons import NeuronSet
from tests.models import tiny_model, tiny_tokenizer
from tests.test_claims import TOKENIZER, planted

WORDS = "ant bee cat dog elk fox gnu hen ibis jay koi lark mole newt owl pig ram seal toad yak"
HARMFUL = [f"zap the {word}{end}" for end in ("", "s") for word in WORDS.split()]
BENIGN = [f"see the {word}{end}" for end in ("", "s") for word in WORDS.split()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that refuses by one neuron, 40 prompts a side, and a set that holds the neuron."""
    folder = tmp_path_factory.mktemp("validate")
    truth = planted(2)
    truth.model.save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    (folder / "harmful.txt").write_text("\n".join(HARMFUL))
    (folder / "benign.txt").write_text("\n".join(BENIGN))
    NeuronSet.of(truth.model, {truth.site: (17,)}).save_pretrained(folder / "right")
    NeuronSet.of(truth.model, {truth.site: (3, 4)}).save_pretrained(folder / "wrong")
    return folder


def prompts(place: Path) -> list[str]:
    model = ["--model_name_or_path", str(place / "model")]
    return [*model, "--harmful", f"{place}/harmful.txt", "--benign", f"{place}/benign.txt"]


def locate(place: Path, out: Path, *more: str) -> int:
    return main(
        ["locate", *prompts(place), "--count", "1", "--scope", "global", "--output_dir", str(out)]
        + list(more)
    )


def validate(place: Path, neurons: str | Path, *more: str) -> int:
    small = ["--limit", "8", "--random_sets", "3", "--max_new_tokens", "10"]
    return main(["validate", *prompts(place), "--neurons", str(place / neurons), *small, *more])


def recorded(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["source"].get("causal", {})


def test_it_prints_a_table_writes_json_and_a_picture_and_exits_by_verdict(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "check.json"
    assert validate(place, "right", "--output", str(out)) == 0
    shown = capsys.readouterr().out
    assert "refusal hangs on these neurons" in shown
    assert "8 prompts" in shown
    assert [line.split()[0] for line in shown.splitlines()[1:4]] == ["intact", "located", "random"]
    found = CausalEffect.from_dict(json.loads(out.read_text()))
    assert (found.verdict, found.effect, found.held_out) == ("effect", 1, None)
    assert (tmp_path / "check.svg").read_text().startswith("<svg")
    assert recorded(place / "right") == {}  # nobody said --write
    assert validate(place, "wrong", "--json") == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "no effect"


@pytest.mark.parametrize(
    "how", [["patch"], ["scale", "--factor", "0.1"], ["scale", "--factor=-1"]], ids=str
)
def test_interventions(how: list[str], place: Path, tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    assert validate(place, "right", "--intervention", *how, "--output", str(out)) == 0
    found = json.loads(out.read_text())
    assert (found["intervention"], found["effect"]) == (how[0], 1)


def test_write_stores_the_result_in_the_set_and_changes_nothing_else(
    place: Path, tmp_path: Path
) -> None:
    neurons = NeuronSet.from_pretrained(place / "right")
    neurons.save_pretrained(tmp_path / "set")
    tensors = (tmp_path / "set/model.safetensors").read_bytes()
    assert validate(place, tmp_path / "set", "--write") == 0
    assert recorded(tmp_path / "set")["verdict"] == "effect"
    back = NeuronSet.from_pretrained(tmp_path / "set")
    assert back.hash == neurons.hash
    assert {k: v for k, v in back.source.items() if k != "causal"} == dict(neurons.source)
    assert (tmp_path / "set/model.safetensors").read_bytes() == tensors


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--neurons", "/nowhere"], ["/nowhere", "safeft locate"]),
        (["--harmful", "/nowhere/h.txt"], ["no prompt file", "/nowhere/h.txt"]),
        (["--factor", "0.5"], ["factor=0.5", "scale"]),
        (["--intervention", "scale", "--factor", "1.5"], ["factor=1.5", "below 1"]),
        (["--random_sets", "1"], ["random_sets=1", "2 or more"]),
        (["--random_sets", "90"], ["only 47 sets", "not 90"]),
        (["--judge", "/nowhere/judge"], ["/nowhere/judge", "'prefix'"]),
        (["--output", "picture.svg"], ["picture.svg", "causal.json"]),
        (["--intervenion", "patch"], ["did you mean 'intervention'"]),
    ],
)
def test_it_refuses_in_one_sentence(
    more: list[str], words: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate(place, "right", *more) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert all(word in said for word in words), said


def test_a_set_of_another_model_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    NeuronSet.of(tiny_model(), {"model.layers.1.mlp": (3,)}).save_pretrained(tmp_path)
    assert validate(place, tmp_path) == 2
    assert "Locate in this model" in capsys.readouterr().err


# What `safeft locate` does by itself.


def test_locate_checks_on_prompts_kept_apart_and_stores_the_result(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert locate(place, tmp_path / "set") == 0
    shown = capsys.readouterr().out
    assert "refusal hangs on these neurons" in shown
    assert "10 prompts kept from locating" in shown
    neurons = NeuronSet.from_pretrained(tmp_path / "set")
    assert (planted(2).site, 17) in neurons
    found = CausalEffect.from_dict(neurons.source["causal"])
    assert (found.verdict, found.held_out, len(found.random)) == ("effect", True, 5)
    assert neurons.source["calibration"]["harmful"]["count"] == 30
    assert found.settings["prompts"] == {"harmful": 10, "benign": 10}


def test_a_random_set_is_marked_as_without_effect(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert locate(place, tmp_path / "set", "--method", "random") == 0
    assert "NO EFFECT" in capsys.readouterr().out
    assert recorded(tmp_path / "set")["verdict"] == "no effect"


def test_without_the_check_all_prompts_locate_and_nothing_is_stored(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert locate(place, tmp_path / "set", "--validate", "false") == 0
    assert "left out" in capsys.readouterr().out
    neurons = NeuronSet.from_pretrained(tmp_path / "set")
    assert "causal" not in neurons.source
    assert neurons.source["calibration"]["harmful"]["count"] == 40


def test_where_prompts_are_few_the_same_ones_are_used_and_that_is_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert locate(place, tmp_path / "set", "--limit", "31") == 0
    assert "31 prompts that it was located with, which flatters it" in capsys.readouterr().out
    assert recorded(tmp_path / "set")["held_out"] is False


def test_a_set_too_large_for_controls_is_saved_and_said_to_be_unchecked(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--scope", "layer", "--count", "40", "--limit", "8"]
    assert locate(place, tmp_path / "set", *more) == 0
    shown = capsys.readouterr().out
    assert "causal check: not possible. The set takes 40 of the 48 units" in shown
    assert len(NeuronSet.from_pretrained(tmp_path / "set")) == 120
    assert recorded(tmp_path / "set") == {}


def test_a_model_whose_refusals_the_judge_does_not_know_cannot_be_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "harmful.txt").write_text("\n".join(HARMFUL))
    (tmp_path / "benign.txt").write_text("\n".join(BENIGN))
    assert locate(tmp_path, tmp_path / "set", "--limit", "8", "--method", "contrast") == 0
    assert "UNKNOWN" in capsys.readouterr().out
    assert recorded(tmp_path / "set")["verdict"] == "unknown"
