"""What the monitor is shown, against a model run prompt by prompt without padding."""

from typing import Any

import pytest
import torch
from torch import Tensor

from safeft.capture import CaptureError, capture
from safeft.errors import UnsupportedModelError
from safeft.monitor import stream
from safeft.monitor.stream import Stream
from safeft.neurons import NeuronSet
from safeft.sites import find_sites
from tests.models import tiny_model, tiny_tokenizer
from tests.test_capture import hooks_of

MLP, HEADS = "model.layers.0.mlp", "model.layers.1.self_attn"
CHOSEN = {MLP: (3, 30), HEADS: (1, 2)}
TEXTS = ["Hi", "How do I bake bread?", "Why is it so?"]


def seen_by(model: Any, run: Any, chosen: Any = CHOSEN) -> Tensor:
    parts: list[Tensor] = []
    with Stream(model, NeuronSet.of(model, chosen), parts.append):
        run()
    return torch.cat(parts)


def alone(model: Any, ids: Tensor) -> Tensor:
    """The same numbers of one sequence, by another road."""
    sites = find_sites(model)
    direction = torch.randn(8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), capture(model, sites) as seen:
        model(ids[None])
        mlp, heads = seen[MLP][0, :, [3, 30], 0], seen[HEADS][0, :, [1, 2]]
    return torch.cat([mlp, heads @ (direction / direction.norm())], 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_real_tokens_only_in_order(side: str) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(side)
    given = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        found = seen_by(model, lambda: model(**given, position_ids=_places(given)))
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]
    torch.testing.assert_close(found, torch.cat([alone(model, row) for row in rows]))


def _places(given: Any) -> Tensor:
    return (given["attention_mask"].cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("cache", [True, False])
def test_generated_tokens_and_no_padding_after_an_answers_end(cache: bool) -> None:
    model, tokenizer = tiny_model(seed=3), tiny_tokenizer("left")
    given = tokenizer(TEXTS, return_tensors="pt", padding=True)
    # An answer that ends early is padded while the others go on.
    with torch.no_grad():
        model.get_output_embeddings().weight[1] += 2 * model(**given).logits.new_ones(32)
    out: Any = None

    def run() -> None:
        nonlocal out
        settings = {"max_new_tokens": 12, "do_sample": False, "use_cache": cache}
        out = model.generate(**given, **settings)

    found = seen_by(model, run)
    new = out[:, given["input_ids"].shape[1] :]
    fed = new[:, :-1]  # the last token of all is never an input
    assert (fed == 0).any()
    if cache:
        assert len(found) == int(given["attention_mask"].sum()) + int((fed != 0).sum())
    values = torch.cat([alone(model, row[row != 0][:-1]) for row in out])
    for value in values[::7]:
        assert (found - value).abs().amax(1).min() < 1e-4


@pytest.mark.parametrize("positional", [True, False])
def test_the_mask_counts_where_tokens_are_no_padding(positional: bool) -> None:
    model, mask = tiny_model(), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    ids = torch.arange(5, 17).view(2, 6)

    def run() -> None:
        model(ids, mask) if positional else model(input_ids=ids, attention_mask=mask)

    assert len(seen_by(model, run)) == 10
    embedded = model.get_input_embeddings()(ids)
    found = seen_by(model, lambda: model(inputs_embeds=embedded, attention_mask=mask))
    assert len(found) == 10


def test_values_come_in_portions_and_the_rest_at_the_end() -> None:
    model, sizes = tiny_model(), []
    ids = torch.arange(1, 101)[None]
    with Stream(model, NeuronSet.of(model, {MLP: (1,)}), lambda v: sizes.append(len(v))) as watch:
        for _ in range(7):
            model(ids)
        assert sizes == [300, 300]
        watch.flush()
        assert sizes == [300, 300, 100]
        model(ids[:, :5])
    assert sizes == [300, 300, 100, 5]


def test_a_change_made_by_any_pre_hook_is_seen_whoever_came_first() -> None:
    for late in (False, True):
        model = tiny_model()
        module, parts = model.get_submodule(MLP).down_proj, []

        def attack(module: Any = module) -> None:
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 0 + 7,))

        if not late:
            attack()
        with Stream(model, NeuronSet.of(model, {MLP: (1,)}), parts.append):
            if late:
                attack()
            model(torch.ones(1, 4, dtype=torch.long))
        assert parts[0].unique().tolist() == [7]


def test_an_error_in_a_pass_leaves_nothing_behind() -> None:
    model, parts = tiny_model(), []
    watch = Stream(model, NeuronSet.of(model, {MLP: (1,)}), parts.append)
    with pytest.raises(IndexError), watch:
        model(torch.full((1, 4), 10_000))
    assert hooks_of(model) == 0
    assert not parts


def test_a_part_of_the_model_alone_is_no_pass() -> None:
    model = tiny_model()
    with pytest.raises(CaptureError, match="never ran"):
        seen_by(model, lambda: model.model(torch.ones(1, 4, dtype=torch.long)))


def test_a_module_that_is_skipped_is_an_error() -> None:
    model = tiny_model()
    mlp = model.get_submodule(MLP)
    mlp.forward = lambda x: x
    with pytest.raises(CaptureError, match="did not run in a forward pass"):
        seen_by(model, lambda: model(torch.ones(1, 4, dtype=torch.long)))
    assert hooks_of(model) == 0


def test_experts_are_refused() -> None:
    model = tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=2, intermediate_size=16)
    name = next(n for n, site in find_sites(model).items() if site.writes.expert is not None)
    with pytest.raises(UnsupportedModelError, match="single experts"):
        Stream(model, NeuronSet.of(model, {name: (1,)}), lambda _: None)


def test_half_precision_is_shown_as_float() -> None:
    model = tiny_model().to(torch.bfloat16)
    assert seen_by(model, lambda: model(torch.ones(1, 4, dtype=torch.long))).dtype == torch.float32
    assert stream.LOOK_EVERY == 256
