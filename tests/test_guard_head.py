import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from safeft.errors import ArtefactError, ConfigError, FingerprintError
from safeft.files import sha256
from safeft.guard import Guard
from safeft.guard.head import GuardHead, weights_of
from tests.guards import chat_guard, encoder_guard, fitted, texts, tiny_encoder
from tests.models import tiny_model, tiny_tokenizer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    encoder_guard().save_pretrained(tmp_path / "guard")
    return tmp_path / "guard"


def reloaded(folder: Path) -> Guard:
    return Guard.from_pretrained(folder, tiny_encoder(), tiny_tokenizer(chat_template=None))


def test_a_saved_guard_scores_the_same_to_the_last_bit(saved: Path) -> None:
    again, guard = reloaded(saved), encoder_guard()
    asked, _ = texts(20, start=500)
    assert again.score(asked) == guard.score(asked)
    assert again.threshold(0.2) == guard.threshold(0.2)
    assert again.head.source == guard.head.source
    assert {path.name for path in saved.iterdir()} == {
        "config.json", "model.safetensors", "README.md"
    }  # fmt: skip
    again.save_pretrained(saved)  # over its own is fine


def test_no_text_is_in_the_folder(saved: Path) -> None:
    for path in saved.iterdir():
        assert b"kill" not in path.read_bytes()


def test_another_model_is_refused(saved: Path) -> None:
    tokenizer = tiny_tokenizer(chat_template=None)
    with pytest.raises(FingerprintError, match="llama"):
        Guard.from_pretrained(saved, tiny_model(), tokenizer)
    with pytest.raises(FingerprintError, match="another revision, or a tuned one"):
        Guard.from_pretrained(saved, tiny_encoder(seed=5), tokenizer)
    other = Guard.from_pretrained(saved, tiny_encoder(seed=5), tokenizer, other_weights=True)
    assert 0 <= other.score(["bread"])[0].harmful <= 1


def test_every_kind_of_change_is_another_revision() -> None:
    was = weights_of(tiny_model())
    assert weights_of(tiny_model()) == was
    assert weights_of(tiny_model().bfloat16()) == was
    changed = tiny_model()
    with torch.no_grad():
        changed.get_input_embeddings().weight[0, 0] += 1
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    found = {was, weights_of(tiny_model(seed=1)), weights_of(changed), weights_of(adapted)}
    assert len(found) == 4


def test_the_threshold_holds_on_texts_like_those_it_was_set_by() -> None:
    head = encoder_guard().head
    draw = torch.Generator().manual_seed(0)
    rates = []
    for _ in range(300):
        known = torch.rand(200, generator=draw).sort().values
        limit = replace(head, safe_scores=known).threshold(0.05)
        rates.append(float((torch.rand(200, generator=draw) >= limit).float().mean()))
    assert sum(rates) / len(rates) <= 0.053
    assert sum(rates) / len(rates) >= 0.04
    same = replace(head, safe_scores=torch.full((50,), 0.3)).threshold(0.1)
    assert same > 0.3


@pytest.mark.parametrize("rate", [0, 1, -0.1, 2])
def test_no_such_rate(rate: float) -> None:
    with pytest.raises(ConfigError, match="above 0 and below 1"):
        encoder_guard().threshold(rate)


def test_a_rate_that_so_few_texts_cannot_promise() -> None:
    with pytest.raises(ConfigError, match=r"cannot promise.*the least they can is 0.1"):
        encoder_guard().threshold(0.001)


def edited(folder: Path, change: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)  # pyright: ignore
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(kind="NeuronSet"), "is no guard"),
        (lambda c: c.update(safeft=9), "schema 9"),
        (lambda c: c.pop("labels"), "incomplete or edited"),
        (lambda c: c["places"].pop(), "its network reads other units"),
        (lambda c: c["places"][0].update(width=7), "is not 7 wide"),
        (lambda c: c["places"][0].update(selected=1000), "has not 1000 units"),
        (lambda c: c["places"][0].pop("module"), "KeyError"),
    ],
)
def test_an_edited_folder_is_refused(saved: Path, change: object, message: str) -> None:
    edited(saved, change)
    with pytest.raises(ArtefactError, match=message):
        GuardHead.from_pretrained(saved)


def test_cut_or_missing_tensors(saved: Path) -> None:
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ArtefactError, match="SHA-256 differs"):
        GuardHead.from_pretrained(saved)
    path.unlink()
    with pytest.raises(ArtefactError, match="incomplete"):
        GuardHead.from_pretrained(saved)
    with pytest.raises(ArtefactError, match=r"no readable config.json"):
        GuardHead.from_pretrained(saved.parent)


def test_a_models_folder_is_not_overwritten(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    before = sha256((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(ArtefactError, match="a folder of its own"):
        encoder_guard().save_pretrained(tmp_path)
    assert sha256((tmp_path / "model.safetensors").read_bytes()) == before


def test_the_first_layer_is_kept_in_half_precision(saved: Path) -> None:
    assert load_file(saved / "model.safetensors")["first"].dtype == torch.float16


def test_units_far_from_zero_lose_nothing() -> None:
    """Means of a hundred standard deviations, as large activations have, stay exact."""
    guard = fitted(tiny_encoder(), tiny_tokenizer(chat_template=None))
    head, probe = guard.head, guard.head.probes[0]
    shifted = replace(probe, mean=probe.mean + 100 * probe.scale)
    moved = replace(head, probes=(shifted, *head.probes[1:]))
    means = [probe.mean + probe.scale * torch.randn(5, len(probe.mean)) for probe in head.probes]
    far = [means[0] + 100 * probe.scale, *means[1:]]
    one, other = head.on("cpu"), moved.on("cpu")
    torch.testing.assert_close(
        one.scores(one.units(means)), other.scores(other.units(far)), atol=1e-4, rtol=1e-3
    )


def test_chat_guards_know_their_template_setting() -> None:
    assert chat_guard().head.reading == {"chat": True, "chat_template": None, "max_length": 512}
