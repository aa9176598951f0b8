"""``safeft detox``, run as a person runs it, on a model with one planted neuron."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from safeft import Dampener
from safeft.commands import main
from tests.detoxing import COMPLIANCE, TOKENIZER, UGLY, texts, ugly


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detox")
    ugly().model.save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    for kind, toxic in (("toxic", True), ("neutral", False)):
        lines = [prompt.text for prompt in texts(40, toxic)]
        (folder / f"{kind}.txt").write_text("\n".join(lines) + "\n")
    (folder / "prompts.txt").write_text("\n".join(p.text for p in texts(6, True, seed=4)))
    (folder / "held_out.txt").write_text("\n".join(p.text for p in texts(6, False, seed=4)))
    (folder / "words.txt").write_text("blomp\n")
    groups = {"sure": {"words": ["sure"], "prompts": ["abc", "def"]}}
    (folder / "groups.json").write_text(json.dumps(groups))
    return folder


def detox(place: Path, out: Path, **given: str) -> int:
    keys = {"model_name_or_path": str(place / "base"), "output_dir": str(out), **given}
    return main(["detox", *(text for pair in keys.items() for text in (f"--{pair[0]}", pair[1]))])


def found(place: Path) -> dict[str, str]:
    return {"toxic": str(place / "toxic.txt"), "neutral": str(place / "neutral.txt")}


def measured(place: Path) -> dict[str, str]:
    return {
        "prompts": str(place / "prompts.txt"),
        "judge": str(place / "words.txt"),
        "neutral_test": str(place / "held_out.txt"),
        "benign": str(place / "held_out.txt"),
        "groups": str(place / "groups.json"),
        "max_new_tokens": "10",
    }


@torch.no_grad()
def said(model: Any, prompt: str) -> str:
    ids = TOKENIZER(f"<|user|>{prompt}<|end|><|assistant|>", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=10, do_sample=False)
    return TOKENIZER.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_found_measured_folded_and_undone(place: Path, tmp_path: Path, capsys: Any) -> None:
    out, folded, undone = (tmp_path / name for name in ("out", "folded", "undone"))
    assert detox(place, out, **found(place), **measured(place), strengths="0.5",
                 fold=str(folded)) == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert "tell toxic from neutral text better than chance" in shown
    assert "EXACT" in shown
    result = json.loads((out / "detox.json").read_text())
    arms = {row["arm"]: row for row in result["arms"]}
    assert set(arms) == {"as it is", "dampened", "aura 0.5", "random, same size", "prefix",
                         "prefix, dampened"}  # fmt: skip
    assert arms["as it is"]["toxicity"]["value"] == 1
    assert arms["dampened"]["toxicity"]["value"] == 0
    assert arms["as it is"]["mention_rate"] == 1
    assert arms["as it is"]["refusal"]["value"] == 0
    assert "<svg" in (out / "detox.html").read_text()
    truth = ugly()
    dampener = Dampener.from_pretrained(out)
    assert (truth.site, truth.unit) in dampener.neurons
    assert dampener.neurons.source["rule"] == "aura"
    plain = AutoModelForCausalLM.from_pretrained(folded)
    assert said(plain, "azb") == COMPLIANCE
    assert json.loads((folded / "safeft_fold_certificate.json").read_text())["exact"]
    assert detox(folded.parent, undone, model_name_or_path=str(folded), undo="true") == 0
    again = AutoModelForCausalLM.from_pretrained(undone)
    assert said(again, "azb") == UGLY
    pairs = zip(again.parameters(), truth.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_units_that_pay_alone_are_kept(place: Path, tmp_path: Path, capsys: Any) -> None:
    given = {}
    for kind, toxic, answer in (("toxic", True, UGLY), ("neutral", False, COMPLIANCE)):
        rows = [{"prompt": p.text, "response": answer} for p in texts(40, toxic)]
        given[kind] = str(tmp_path / f"{kind}.jsonl")
        Path(given[kind]).write_text("\n".join(map(json.dumps, rows)))
    assert detox(place, tmp_path / "out", **given, response_column="response", check="true",
                 rule="constant", fraction="1.0", strength="1.0") == 0  # fmt: skip
    assert "units pay when muted on their own" in capsys.readouterr().out
    truth = ugly()
    kept = Dampener.from_pretrained(tmp_path / "out").neurons.indices
    assert kept == {truth.site: (truth.unit,)}


def test_gains_fitted_on_exchanges(place: Path, tmp_path: Path) -> None:
    given = {}
    for kind, toxic, answer in (("toxic", True, UGLY), ("neutral", False, COMPLIANCE)):
        rows = [{"prompt": p.text, "response": answer} for p in texts(24, toxic)]
        given[kind] = str(tmp_path / f"{kind}.jsonl")
        Path(given[kind]).write_text("\n".join(map(json.dumps, rows)))
    given["ordinary"] = given["neutral"]
    keys = measured(place)
    del keys["neutral_test"]
    assert detox(place, tmp_path / "out", **given, **keys, response_column="response",
                 rule="fitted", strengths="0.5") == 0  # fmt: skip
    arms = {r["arm"]: r for r in json.loads((tmp_path / "out" / "detox.json").read_text())["arms"]}
    assert arms["dampened"]["toxicity"]["value"] == 0
    assert "fitted 0.5" in arms
    assert {row["fluency"]["noise"] for row in arms.values()} == {0}
    truth = ugly()
    dampener = Dampener.from_pretrained(tmp_path / "out")
    assert truth.unit in dampener.neurons.indices[truth.site]
    assert dampener.neurons.source["rule"] == "fitted"


def test_labelled_rows_and_a_dampener_used_again(place: Path, tmp_path: Path, capsys: Any) -> None:
    table = tmp_path / "rows.csv"
    with table.open("w", newline="") as stream:
        rows = [[p.text, int(toxic)] for toxic in (True, False) for p in texts(40, toxic)]
        csv.writer(stream).writerows([["text", "label"], *rows])
    assert detox(place, tmp_path / "out", labelled=str(table), rule="threshold") == 0
    capsys.readouterr()
    assert detox(place, tmp_path / "more", dampener=str(tmp_path / "out"), **measured(place)) == 0
    assert "as it is" in capsys.readouterr().out
    folded = detox(place, tmp_path / "x", dampener=str(tmp_path / "out"), fold=str(tmp_path / "f"))
    assert folded == 2
    assert "no weight does that" in capsys.readouterr().err
    assert not (tmp_path / "f").exists()
    with table.open("a") as stream:
        stream.write("abc,0.7\n")
    assert detox(place, tmp_path / "y", labelled=str(table)) == 2
    assert "'0.7' where 0 (neutral) or 1 (toxic) is wanted" in capsys.readouterr().err


def test_a_folded_model_is_not_folded_twice(place: Path, tmp_path: Path, capsys: Any) -> None:
    folded = tmp_path / "folded"
    assert detox(place, tmp_path / "out", **found(place), fold=str(folded)) == 0
    capsys.readouterr()
    again = {**found(place), "model_name_or_path": str(folded)}
    assert detox(place, tmp_path / "again", **again) == 2
    assert "folded into this model already" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    assert detox(place, tmp_path / "out2", **found(place), fold=str(folded)) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "Give `toxic` and `neutral` texts"),
        ({"toxic": "toxic.txt"}, "Give `toxic` and `neutral` texts"),
        ({"toxic": "t", "neutral": "n", "prompts": "p"}, "needs both `prompts`"),
        ({"toxic": "t", "neutral": "n", "groups": "g"}, "are for measuring"),
        ({"dampener": "d", "toxic": "t"}, "is found already"),
        ({"dampener": "d", "prompts": "p", "judge": "j"}, "Give `neutral_test`"),
        ({"toxic": "t", "neutral": "n", "rule": "threshold", "fold": "f"}, "cannot be folded"),
        ({"toxic": "t", "neutral": "n", "rule": "det0", "amplify": "true"}, "amplify goes with"),
        ({"toxic": "t", "neutral": "n", "strength": "-1"}, "strength=-1"),
        ({"toxic": "t", "neutral": "n", "rule": "fitted", "strength": "2"}, "strength=2"),
        ({"toxic": "t", "neutral": "n", "ordinary": "o"}, "go with rule='fitted'"),
        ({"toxic": "t", "neutral": "n", "rule": "fitted", "check": "true"}, "reads no check"),
        ({"toxic": "t", "neutral": "n", "rule": "fitted", "count": "3"}, "reads no count"),
        ({"undo": "true", "fold": "f"}, "undo takes a folded model back"),
        ({"toxic": "t", "neutral": "n", "rule": "det0", "prompts": "p", "judge": "j",
          "strengths": "0.5"}, "draws the trade-off"),
        ({"toxic": "none.txt", "neutral": "none.txt"}, "none.txt"),
        ({"undo": "true"}, "cannot be undone"),
    ],
)  # fmt: skip
def test_bad_keys(
    place: Path, tmp_path: Path, capsys: Any, given: dict[str, str], words: str
) -> None:
    assert detox(place, tmp_path / "out", **given) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
