import doctest
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel, T5Config, T5ForConditionalGeneration

import safeft.sites
from safeft.errors import SafeftError, UnsupportedModelError
from safeft.sites import TOWERS, WHOLES, Part, Site, dense, find_sites, plain_model
from tests.models import MODEL_TYPES, tiny_model

VARIANTS = [
    *((name, {}) for name in (*MODEL_TYPES, "gemma")),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1}),
    ("qwen3", {"attention_bias": True}),
    ("olmo2", {"attention_bias": True}),
    ("gemma3_text", {"attention_bias": True}),
]
TOKENS = torch.randint(0, 200, (2, 6), generator=torch.Generator().manual_seed(1))
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

every_layout = pytest.mark.parametrize(("model_type", "overrides"), VARIANTS)


def build(model_type: str, overrides: dict[str, Any]) -> PreTrainedModel:
    """No weight is left at zero, and OLMo 2's norms only scale, so that they do not mix heads."""
    model = tiny_model(model_type, **overrides)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    if model_type == "olmo2":
        for layer in model.model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                norm.forward = lambda hidden, norm=norm: hidden * norm.weight
    return model


def tensors_of(model: nn.Module, part: Part) -> list[Tensor]:
    module = model.get_submodule(part.module)
    bias = getattr(module, "bias", None)
    return [module.weight] if part.axis == "columns" or bias is None else [module.weight, bias]


@contextmanager
def changed(
    model: nn.Module, part: Part, entries: Tensor, *, others: bool = False
) -> Iterator[None]:
    """Other numbers in these entries of a part, or in all others; as before afterwards."""
    saved = [(tensor, tensor.detach().clone()) for tensor in tensors_of(model, part)]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for tensor, old in saved:
            axis = 0 if part.axis == "rows" else 1
            new = old + torch.randn_like(old)
            source, target = (old, new) if others else (new, old)
            tensor.copy_(target.index_copy(axis, entries, source.index_select(axis, entries)))
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, old in saved:
                tensor.copy_(old)


@torch.no_grad()
def activations(model: PreTrainedModel, site: Site) -> Tensor:
    """What the site's writer receives, ``(tokens, units, width)``, by a hook of the test's own."""
    seen: list[Tensor] = []
    writer = model.get_submodule(site.writes.module)
    handle = writer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    model(TOKENS)
    handle.remove()
    return seen[0].reshape(-1, site.units, site.width)


@torch.no_grad()
def logits(model: PreTrainedModel, site: Site, *, silent: list[int]) -> Tensor:
    """The model's output with the activations of some units at zero."""

    def silence(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        units = inputs[0].clone().unflatten(-1, (site.units, site.width))
        units[..., silent, :] = 0
        return (units.flatten(-2),)

    handle = model.get_submodule(site.writes.module).register_forward_pre_hook(silence)
    found = model(TOKENS).logits
    handle.remove()
    return found


def moved(before: Tensor, after: Tensor) -> set[int]:
    return set((before != after).any(-1).any(0).nonzero().flatten().tolist())


def units_to_try(model: PreTrainedModel) -> list[tuple[Site, int]]:
    return [
        (site, unit)
        for site in list(find_sites(model).values())[-2:]
        for unit in (0, site.units - 1)
    ]


@every_layout
def test_read_rows_move_their_own_units_and_no_other(
    model_type: str, overrides: dict[str, Any]
) -> None:
    model = build(model_type, overrides)
    for site, unit in units_to_try(model):
        before = activations(model, site)
        for part in site.reads:
            first = unit // part.share * part.share
            with changed(model, part, part.entries(torch.tensor([unit]))):
                after = activations(model, site)
            assert moved(before, after) == set(range(first, first + part.share)), (part, unit)


@every_layout
def test_no_other_row_of_a_part_moves_a_unit(model_type: str, overrides: dict[str, Any]) -> None:
    model = build(model_type, overrides)
    for site, unit in units_to_try(model):
        before = activations(model, site)
        for part in site.reads:
            owned = part.entries(torch.tensor([unit]))
            with changed(model, part, owned, others=True):
                after = activations(model, site)
            users = {u for u in range(site.units) if part.entries(torch.tensor([u])).equal(owned)}
            assert unit in users
            assert moved(before, after) == set(range(site.units)) - users, (part, unit)


@every_layout
def test_write_columns_carry_all_of_a_unit_and_nothing_else(
    model_type: str, overrides: dict[str, Any]
) -> None:
    model = build(model_type, overrides)
    for site, unit in units_to_try(model):
        rest = [other for other in range(site.units) if other != unit]
        columns = site.writes.entries(torch.tensor([unit]))
        whole = logits(model, site, silent=[])
        without, alone = logits(model, site, silent=[unit]), logits(model, site, silent=rest)
        assert not torch.equal(whole, without)
        with changed(model, site.writes, columns):
            assert not torch.equal(logits(model, site, silent=[]), whole)
            assert torch.equal(logits(model, site, silent=[unit]), without)
        with changed(model, site.writes, columns, others=True):
            assert torch.equal(logits(model, site, silent=rest), alone)


@every_layout
def test_parts_name_every_matrix_of_the_block(model_type: str, overrides: dict[str, Any]) -> None:
    model = build(model_type, overrides)
    named = {part.module for site in find_sites(model).values() for part in site.parts}
    linears = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    per_head = {
        name for name, module in model.named_modules()
        if name.endswith(("q_norm", "k_norm")) and module.weight.shape[0] > 8
    }  # fmt: skip
    assert named == linears | per_head
    assert bool(per_head) == (model_type == "olmo2")


def test_olmo2_heads_are_coupled_by_the_size_of_their_norm_only() -> None:
    """What a frozen OLMo 2 head does not hold: q is divided by the size of all heads' q."""
    model = tiny_model("olmo2")
    site = find_sites(model)["model.layers.0.self_attn"]
    queries: list[Tensor] = []
    norm = model.get_submodule("model.layers.0.self_attn.q_norm")
    handle = norm.register_forward_hook(lambda _, __, output: queries.append(output.clone()))
    part = next(part for part in site.reads if part.module.endswith("q_proj"))
    activations(model, site)
    with changed(model, part, part.entries(torch.tensor([1]))):
        activations(model, site)
    handle.remove()
    before, after = (q.detach().reshape(-1, site.units, site.width) for q in queries)
    assert moved(before, after) == {0, 1, 2, 3}
    directions = torch.nn.functional.cosine_similarity(before, after, dim=-1)
    torch.testing.assert_close(directions[:, [0, 2, 3]], torch.ones(12, 3))
    assert directions[:, 1].min() < 0.99


def test_units_and_order() -> None:
    sites = find_sites(tiny_model("llama"))
    assert list(sites) == [
        "model.layers.0.mlp",
        "model.layers.0.self_attn",
        "model.layers.1.mlp",
        "model.layers.1.self_attn",
    ]
    assert [(s.units, s.width, s.layer) for s in sites.values()] == [
        (48, 1, 0), (4, 8, 0), (48, 1, 1), (4, 8, 1),
    ]  # fmt: skip
    assert list(find_sites(tiny_model(num_hidden_layers=11), ("mlp",)))[10] == "model.layers.10.mlp"
    assert [s.kind for s in find_sites(tiny_model(), ("attention",)).values()] == ["attention"] * 2


@pytest.mark.parametrize(("width", "share"), [(1, 1), (8, 1), (8, 2), (4, 3)])
def test_entries_of_parts(width: int, share: int) -> None:
    part, units = Part("m", "rows", width, share), 6
    for number in range(2**units):
        chosen = torch.tensor([unit for unit in range(units) if number >> unit & 1]).long()
        used = {
            entry for unit in chosen.tolist()
            for entry in range(unit // share * width, (unit // share + 1) * width)
        }  # fmt: skip
        others = {
            entry for unit in set(range(units)) - set(chosen.tolist())
            for entry in range(unit // share * width, (unit // share + 1) * width)
        }  # fmt: skip
        assert part.entries(chosen).tolist() == sorted(used)
        assert part.own_entries(chosen).tolist() == sorted(used - others)
        assert part.entries(chosen).dtype == torch.long
    table = part.table(units)
    for unit in range(units):
        assert table[unit].tolist() == part.entries(torch.tensor([unit])).tolist()


def test_a_meta_model_has_the_same_sites() -> None:
    with torch.device("meta"):
        hollow = tiny_model("qwen3")
    assert find_sites(hollow) == find_sites(tiny_model("qwen3"))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_wrapped_models_have_the_names_of_the_plain_one(model_type: str) -> None:
    plain = find_sites(tiny_model(model_type))
    tuned = get_peft_model(tiny_model(model_type), LoraConfig(target_modules=LINEARS))
    assert find_sites(tuned) == plain
    parallel = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(parallel)
    parallel.module = tuned
    assert find_sites(parallel) == plain
    inside = plain_model(parallel)
    for site in plain.values():
        for part in site.parts:
            found = dense(inside.get_submodule(part.module))
            original = tiny_model(model_type).get_submodule(part.module)
            assert type(found) is type(original)
            assert torch.equal(found.weight, original.weight)


def test_an_unknown_model_type_is_named_with_what_is_supported() -> None:
    model = T5ForConditionalGeneration(T5Config(num_layers=1, d_model=8, d_ff=9, num_heads=2))
    with pytest.raises(UnsupportedModelError, match="model type 't5'") as caught:
        find_sites(model)
    assert isinstance(caught.value, NotImplementedError)
    assert isinstance(caught.value, SafeftError)
    assert all(name in str(caught.value) for name in {*TOWERS, *WHOLES})


def test_a_module_without_config_is_refused_by_its_class() -> None:
    with pytest.raises(UnsupportedModelError, match="'Linear'"):
        find_sites(nn.Linear(2, 2))


def test_a_known_type_without_blocks_is_refused() -> None:
    empty = nn.Module()
    empty.config = LlamaConfig()
    with pytest.raises(UnsupportedModelError, match="No block with such units"):
        find_sites(empty)


def without_gate(block: nn.Module) -> None:
    del block.mlp.gate_proj


def with_fused_gate(block: nn.Module) -> None:
    block.mlp.gate_proj = nn.Linear(32, 96, bias=False)


def with_embedding_gate(block: nn.Module) -> None:
    block.mlp.gate_proj = nn.Embedding(48, 32)


def without_query(block: nn.Module) -> None:
    del block.self_attn.q_proj


def with_odd_norm(block: nn.Module) -> None:
    block.self_attn.q_norm = nn.RMSNorm(12)


def with_narrow_keys(block: nn.Module) -> None:
    block.self_attn.k_proj = nn.Linear(32, 12, bias=False)


def with_odd_output(block: nn.Module) -> None:
    block.self_attn.o_proj = nn.Linear(30, 32, bias=False)


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (without_gate, " of this 'llama' model has no MLP of a layout"),
        (without_query, " of this 'llama' model has no attention of a layout"),
        (with_fused_gate, ".mlp.gate_proj of this 'llama' model has 96 entries"),
        (with_embedding_gate, ".mlp.gate_proj of this 'llama' model is a Embedding"),
        (with_narrow_keys, ".self_attn.k_proj of this 'llama' model has 12 entries"),
        (with_odd_output, ".self_attn.o_proj of this 'llama' model"),
        (with_odd_norm, ".self_attn.q_norm of this 'llama' model has 12 entries"),
    ],
)
def test_a_block_unlike_its_layout_is_refused(damage: Any, where: str) -> None:
    model = tiny_model("llama")
    damage(model.model.layers[1])
    with pytest.raises(UnsupportedModelError, match=f"model.layers.1{where}"):
        find_sites(model)


def test_examples_run() -> None:
    assert doctest.testmod(safeft.sites).failed == 0
