import pytest
import torch

from safeft.errors import FingerprintError, PromptError
from safeft.guard.drift import readability
from tests.guards import chat_guard, texts
from tests.models import tiny_model


def sides(count: int = 40) -> tuple[list[str], list[str]]:
    asked, harmful = texts(count, start=700)
    bad = [t for t, h in zip(asked, harmful, strict=True) if h]
    return bad, [t for t, h in zip(asked, harmful, strict=True) if not h]


def test_on_its_own_model_a_guard_reads_well() -> None:
    guard = chat_guard()
    found = readability(guard, guard.model, guard.tokenizer, *sides())
    assert found.guard > 0.95
    assert set(found.layers) == set(found.anew) == {"mlp 0", "residual 0", "mlp 1", "residual 1"}
    assert max(found.layers.values()) > 0.95
    assert min(found.anew.values()) > 0.8


def test_units_turned_round_are_lost_to_old_probes_and_found_by_new_ones() -> None:
    guard = chat_guard()
    tuned = tiny_model()
    with torch.no_grad():
        for layer in tuned.model.layers:
            layer.mlp.up_proj.weight.neg_()
            layer.mlp.down_proj.weight.neg_()
    before = readability(guard, guard.model, guard.tokenizer, *sides())
    after = readability(guard, tuned, guard.tokenizer, *sides())
    assert after.layers["residual 1"] == pytest.approx(before.layers["residual 1"], abs=1e-3)
    assert after.layers["mlp 0"] < 0.5 < before.layers["mlp 0"]
    assert after.anew["mlp 0"] > 0.9


def test_what_is_gone_is_gone_for_new_probes_too() -> None:
    guard = chat_guard()
    wiped = tiny_model()
    with torch.no_grad():
        wiped.get_input_embeddings().weight.copy_(
            wiped.get_input_embeddings().weight[:1].expand(261, -1)
        )
    # Of one length, so that nothing is left to tell texts apart by.
    bad, good = sides()
    width = max(map(len, bad + good))
    found = readability(
        guard, wiped, guard.tokenizer, [t.ljust(width, "x") for t in bad],
        [t.ljust(width, "x") for t in good],
    )  # fmt: skip
    assert max(found.anew.values()) < 0.75


def test_too_few_texts_and_other_shapes() -> None:
    guard = chat_guard()
    with pytest.raises(PromptError, match="7 harmful and 20 harmless.*at least 8"):
        readability(guard, guard.model, guard.tokenizer, sides()[0][:7], sides()[1])
    with pytest.raises(FingerprintError):
        readability(guard, tiny_model(intermediate_size=64), guard.tokenizer, *sides())
