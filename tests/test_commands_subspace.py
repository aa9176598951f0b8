"""`sft`, `dpo` and `verify` with a subspace, alone or beside neurons, in real trainings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from safeft.commands import main
from safeft.subspace import SafetySubspace
from tests.freezing import LARGE, changed_frozen, frozen_entries, model_of, neurons_of, state_of
from tests.models import tiny_tokenizer
from tests.spans import product_changes, subspace_of

EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spans")
    model_of().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    subspace_of(model_of()).save_pretrained(folder / "span")
    neurons_of(model_of(), LARGE).save_pretrained(folder / "set")
    turns = [
        [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"well, {n}"}]
        for n in range(16)
    ]
    (folder / "chat.jsonl").write_text("\n".join(json.dumps({"messages": t}) for t in turns))
    no = [{"role": "assistant", "content": "no"}]
    pairs = [{"prompt": t[:1], "chosen": t[1:], "rejected": no} for t in turns]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder


def train(place: Path, out: Path, verb: str, *more: str) -> int:
    data = "pairs" if verb == "dpo" else "chat"
    given = {
        "model_name_or_path": place / "base", "dataset_name": place / f"{data}.jsonl",
        "output_dir": out, "max_steps": 3, "per_device_train_batch_size": 4,
        "learning_rate": 2e-2, "weight_decay": 0.1, "max_length": 64, "use_cpu": True,
        "bf16": False, "report_to": "none", "save_strategy": "no",
        "gradient_checkpointing": False,
    }  # fmt: skip
    return main([verb, *(str(t) for k, v in given.items() for t in (f"--{k}", v)), *more])


def changes(place: Path, out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Of what was saved, by hand."""
    base, span = state_of(model_of()), SafetySubspace.from_pretrained(place / "span")
    if (out / "adapter_config.json").exists():
        now = state_of(PeftModel.from_pretrained(model_of(), str(out)))
    else:
        now = load_file(out / "model.safetensors")
    return product_changes(base, now, span, model_of()), now


@pytest.mark.parametrize(
    ("verb", "more"),
    [
        ("sft", ()),
        ("dpo", ("--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear")),
    ],
)
def test_a_subspace_is_held_in_training_and_verified_from_disk(
    verb: str, more: tuple[str, ...], place: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    assert train(place, out, verb, "--protected", str(place / "span"), *more) == 0
    shown = capsys.readouterr().out
    assert "HELD: input directions of" in shown
    found, now = changes(place, out)
    for name, (held, free) in found.items():
        assert held < 1e-6, name
        assert free > 1e-3 or (verb, name) == ("dpo", "lm_head.weight"), name
    assert torch.equal(now[EMBEDDINGS], model_of().get_parameter(EMBEDDINGS))
    said = json.loads((out / "safeft_certificate.json").read_text())
    assert said["exact"]
    assert len(said["directions"]) == (15 if verb == "sft" else 14)
    check = ["verify", "--base", str(place / "base"), "--tuned", str(out), "--protected"]
    assert main([*check, str(place / "span")]) == 0
    assert "HELD: input directions of 15 layers" in capsys.readouterr().out


def test_beside_neurons_and_with_groups_left_to_train(
    place: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    given = ["--protected", str(place / "set"), "--subspace", str(place / "span")]
    assert train(place, out, "sft", *given, "--hold", "none") == 0
    shown = capsys.readouterr().out
    assert "EXACT: 9 neurons" in shown
    assert "HELD: input directions of 15 layers" in shown
    found, now = changes(place, out)
    assert max(held for held, _ in found.values()) < 1e-6
    base = state_of(model_of())
    assert changed_frozen(base, now, frozen_entries(base, LARGE, "freeze")) == []
    assert not torch.equal(now[EMBEDDINGS], base[EMBEDDINGS])
    check = ["verify", "--base", str(place / "base"), "--tuned", str(out), *given]
    assert main([*check, "--hold", "none"]) == 0
    assert main(check) == 1
    assert f"{EMBEDDINGS} rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--subspace", "span"), ["without `protected`", "a subspace alone is given as"]),
        (("--protected", "span", "--subspace", "span"), ["Two subspaces are given", "Give one"]),
        (("--protected", "span", "--protect_mode", "train_only"), ["goes with mode='freeze'"]),
        (("--protected", "set", "--subspace", "set"), ["no safety subspace", "'NeuronSet'"]),
        (("--protected", "set", "--subspace", "nowhere"), ["nowhere", "config.json"]),
        (("--protected", "span", "--freeze", "scu"), ["holds no groups", "SafetySubspace"]),
        (("--protected", "span", "--hold", "eyebrows"), ["eyebrows", "embeddings"]),
        (
            (
                "--protected",
                "span",
                "--use_peft",
                "--lora_target_modules",
                "q_proj",
                "embed_tokens",
            ),
            ["embed_tokens.lora_embedding_A", "no basis for it"],
        ),
        (
            ("--protected", "span", "--use_peft", "--lora_modules_to_save", "lm_head"),
            ["lm_head.modules_to_save", "no basis for it"],
        ),
    ],
)
def test_training_refuses_before_the_first_step(
    more: tuple[str, ...], words: list[str], place: Path, tmp_path: Path, capsys: Any
) -> None:
    places = {"span", "set", "nowhere"}
    given = [str(place / text) if text in places else text for text in more]
    assert train(place, tmp_path / "out", "sft", *given) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert all(word in said for word in words), said
    assert not list(tmp_path.rglob("*.safetensors"))
