import doctest
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import safeft.capture
from safeft.capture import CaptureError, Seen, capture, edit, silence, tap
from safeft.errors import SafeftError
from safeft.neurons import NeuronSet
from safeft.prompts import Batch, as_prompts, batches
from safeft.sites import Part, find_sites
from tests.models import MODEL_TYPES, tiny_model, tiny_tokenizer

MLP, HEADS = "model.layers.1.mlp", "model.layers.0.self_attn"
DOWN = Part(f"{MLP}.down_proj", "columns")
PROMPTS = as_prompts(["Hi", {"prompt": "How do I bake bread?", "response": "With flour"}, "Why?"])


def batch_of(side: str = "left") -> Batch:
    (batch,) = batches(tiny_tokenizer(side), PROMPTS, batch_size=8)
    return batch


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()
    )


@torch.no_grad()
def logits(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch.inputs).logits


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_captured_is_what_the_writer_multiplies(model_type: str) -> None:
    model, batch = tiny_model(model_type), batch_of()
    sites, outputs = find_sites(model), {}
    for site in sites.values():
        model.get_submodule(site.writes.module).register_forward_hook(
            lambda _, __, output, name=site.name: outputs.update({name: output})
        )
    with torch.no_grad(), capture(model, sites) as seen:
        model(**batch.inputs)
    assert list(seen) == [site.name for site in sorted(sites.values(), key=lambda s: (
        s.layer, s.kind))]  # fmt: skip
    for name, site in sites.items():
        assert seen[name].shape == (*batch.input_ids.shape, site.units, site.width)
        weight = model.get_submodule(site.writes.module).weight.detach()
        written = torch.einsum(
            "btuw,ouw->bto", seen[name], weight.unflatten(1, seen[name].shape[2:])
        )
        torch.testing.assert_close(written, outputs[name])


def test_captured_activations_are_those_of_the_formula() -> None:
    model, batch = tiny_model(), batch_of()
    inputs: list[Tensor] = []
    mlp = model.get_submodule(MLP)
    mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad(), capture(model, find_sites(model, ("mlp",))) as seen:
        model(**batch.inputs)
    gate, up = (inputs[0] @ w.weight.detach().T for w in (mlp.gate_proj, mlp.up_proj))
    torch.testing.assert_close(seen[MLP][..., 0], gate * torch.sigmoid(gate) * up)


def test_the_graph_stays_attached_and_each_pass_replaces_the_last() -> None:
    model, batch = tiny_model(), batch_of()
    with capture(model, find_sites(model)) as seen:
        assert seen == {}
        model(**batch.inputs)
        first = seen[MLP]
        model(input_ids=torch.tensor([[1, 2]]))
    assert first.requires_grad
    assert seen[MLP].shape[:2] == (1, 2)


@pytest.mark.parametrize("choice", ["prompt", "response", "last_prompt", "post_instruction"])
def test_padding_sides_give_the_same_activations(choice: str) -> None:
    model, found = tiny_model(), []
    for side in ("left", "right"):
        batch = batch_of(side)
        with torch.no_grad(), capture(model, find_sites(model)) as seen:
            model(**batch.inputs)
        found.append({name: values[batch.choose(choice)] for name, values in seen.items()})
    for name, values in found[0].items():
        torch.testing.assert_close(values, found[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: tap(model, [DOWN], lambda _, __: None),
        lambda model: capture(model, find_sites(model)),
        lambda model: silence(model, {MLP: (1,)}, find_sites(model)),
        lambda model: edit(model, {MLP: (1,)}, find_sites(model), lambda _, values: values + 1),
    ],
)
def test_hooks_are_gone_after_success_and_after_errors(
    make: Callable[[PreTrainedModel], AbstractContextManager],
) -> None:
    model, batch = tiny_model(), batch_of()
    before = logits(model, batch)
    with make(model):
        assert hooks_of(model) > 0
        logits(model, batch)
    assert hooks_of(model) == 0
    with pytest.raises(ZeroDivisionError), make(model):
        _ = 1 // (logits(model, batch).ndim - 3)
    assert hooks_of(model) == 0
    with pytest.raises(CaptureError, match="did not run"), make(model):
        pass
    assert hooks_of(model) == 0
    assert torch.equal(logits(model, batch), before)


def test_an_observer_that_fails_leaves_no_hook() -> None:
    model = tiny_model()

    def fail(_: str, __: Seen) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), tap(model, [DOWN], fail):
        logits(model, batch_of())
    assert hooks_of(model) == 0


def test_a_wrong_name_leaves_no_hook() -> None:
    model = tiny_model()
    parts = [DOWN, Part("model.layers.7.mlp.down_proj", "columns")]
    with pytest.raises(AttributeError), tap(model, parts, lambda _, __: None):
        pass
    assert hooks_of(model) == 0


def test_a_module_that_is_skipped_is_named() -> None:
    model = tiny_model()
    mlp = model.get_submodule(MLP)
    mlp.forward = lambda hidden: hidden
    with pytest.raises(CaptureError, match=r"model\.layers\.1\.mlp\.down_proj") as caught:
        with capture(model, find_sites(model)):
            logits(model, batch_of())
    assert isinstance(caught.value, SafeftError)
    assert "layers.0" not in str(caught.value)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(("site", "units"), [(MLP, (0, 7, 47)), (HEADS, (0, 3))])
def test_silencing_is_zeroing_the_columns_the_units_write_with(
    model_type: str, site: str, units: tuple[int, ...]
) -> None:
    model, batch = tiny_model(model_type), batch_of()
    sites = find_sites(model)
    before = logits(model, batch)
    with silence(model, {site: units}, sites):
        silenced = logits(model, batch)
        assert torch.equal(logits(model, batch), silenced)
    assert not torch.equal(silenced, before)
    writes = sites[site].writes
    weight = model.get_submodule(writes.module).weight
    with torch.no_grad():
        weight[:, writes.entries(torch.tensor(units))] = 0
    torch.testing.assert_close(logits(model, batch), silenced, rtol=1e-5, atol=1e-6)


def test_silence_zeroes_only_the_given_units() -> None:
    model, batch = tiny_model(), batch_of()
    sites = find_sites(model)
    units = {MLP: torch.tensor([3]), HEADS: (2,)}
    with torch.no_grad(), capture(model, {HEADS: sites[HEADS]}) as plain:
        model(**batch.inputs)
    with torch.no_grad(), silence(model, units, sites), capture(model, sites) as seen:
        model(**batch.inputs)
    for name, unit in ((MLP, 3), (HEADS, 2)):
        rest = [other for other in range(sites[name].units) if other != unit]
        assert not seen[name][:, :, unit].any()
        assert seen[name][:, :, rest].any()
    assert torch.equal(seen[HEADS][:, :, [0, 1, 3]], plain[HEADS][:, :, [0, 1, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_is_shown_the_chosen_units_and_puts_back_what_it_is_given(
    dtype: torch.dtype,
) -> None:
    model, batch = tiny_model().to(dtype), batch_of()
    sites = find_sites(model)
    shown: dict[str, Tensor] = {}

    def change(name: str, values: Tensor) -> Tensor:
        shown[name] = values.clone()
        return values.double() + torch.arange(len(values[0, 0]))[:, None]  # another dtype

    with torch.no_grad(), capture(model, {HEADS: sites[HEADS]}) as plain:
        model(**batch.inputs)
    units = {HEADS: (3, 1), MLP: torch.tensor([40, 2, 7]), "model.layers.0.mlp": ()}
    with torch.no_grad(), edit(model, units, sites, change), capture(model, sites) as seen:
        model(**batch.inputs)
    assert shown[HEADS].shape == (*batch.input_ids.shape, 2, 8)
    assert shown[MLP].shape == (*batch.input_ids.shape, 3, 1)
    assert torch.equal(shown[HEADS], plain[HEADS][:, :, [1, 3]])  # in ascending order
    for name, chosen in ((HEADS, [1, 3]), (MLP, [2, 7, 40])):
        assert seen[name].dtype == dtype
        places = torch.arange(len(chosen))[:, None]
        assert torch.equal(seen[name][:, :, chosen], (shown[name].double() + places).to(dtype))
    assert torch.equal(seen[HEADS][:, :, [0, 2]], plain[HEADS][:, :, [0, 2]])


def test_an_edit_that_fails_leaves_no_hook() -> None:
    model = tiny_model()
    with pytest.raises(ZeroDivisionError):
        with edit(model, {MLP: (1,)}, find_sites(model), lambda _, values: values / (1 // 0)):
            logits(model, batch_of())
    assert hooks_of(model) == 0


def test_silence_takes_a_neuron_set_and_works_under_an_adapter() -> None:
    batch = batch_of()
    neurons = NeuronSet.of(tiny_model(), {MLP: (1, 5), HEADS: (0,)})
    config = LoraConfig(target_modules=["down_proj", "o_proj"], init_lora_weights=False)
    tuned = get_peft_model(tiny_model(), config)
    with silence(tuned, neurons.indices, find_sites(tuned)):
        silenced = logits(tuned, batch)
    merged = tuned.merge_and_unload()
    with silence(merged, neurons.indices, find_sites(merged)):
        torch.testing.assert_close(silenced, logits(merged, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unit", [48, -1])
def test_units_that_are_not_there_cannot_be_silenced(unit: int) -> None:
    model = tiny_model()
    with pytest.raises(SafeftError, match=rf"units 0 to 47.*\[{unit}\]"):
        with silence(model, {MLP: (unit,)}, find_sites(model)):
            logits(model, batch_of())
    assert hooks_of(model) == 0


def test_a_site_that_is_not_there_cannot_be_silenced() -> None:
    model = tiny_model()
    with pytest.raises(SafeftError, match=r"no site 'model\.layers\.2\.mlp'"):
        with silence(model, {"model.layers.2.mlp": (0,)}, find_sites(model)):
            logits(model, batch_of())


def test_examples_run() -> None:
    assert doctest.testmod(safeft.capture).failed == 0


def test_prompts_and_tokens_may_come_as_one_axis() -> None:
    values = torch.arange(24.0).view(2, 3, 4)
    chosen = torch.tensor([[True, False, True], [False, True, False]])
    assert torch.equal(Seen(values).at(chosen), values[chosen])
    assert torch.equal(Seen(values.flatten(0, 1)).at(chosen), values[chosen])
