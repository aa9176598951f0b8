"""Each way to tune does what its paper says, on the demo testbed with two steps."""

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from baselines import (  # noqa: E402
    Method,
    Recipe,
    Setup,
    Tuning,
    all_methods,
    constrained,
    linears,
    mixing,
    null_start,
    rotated,
    safe_lora,
    safety_layers,
    safety_neurons,
    subspace,
    variants,
)
from frontier.training import Job, Settings, World, train, training_rows  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from testbed import load  # noqa: E402
from testbed.judging import margin_judge  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from safeft import SafetyFreezeCallback  # noqa: E402
from safeft.capture import capture, silence  # noqa: E402
from safeft.prompts import batches  # noqa: E402
from safeft.sites import blocks_of, find_sites  # noqa: E402

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def world() -> World:
    """The demo testbed with a few calibration prompts."""
    testbed = load("demo")
    few = replace(
        testbed,
        harmful={**testbed.harmful, "calibration": testbed.harmful["calibration"][:24]},
        benign={**testbed.benign, "calibration": testbed.benign["calibration"][:24]},
    )
    base = AutoModelForCausalLM.from_pretrained(testbed.folder, dtype=torch.float32).eval()
    settings = Settings("demo", "desk", steps=2, batch_size=4)
    tokenizer = AutoTokenizer.from_pretrained(testbed.folder)
    return World(few, base, tokenizer, settings, all_methods())


@pytest.fixture
def setup_of(world: World) -> Callable[..., Setup]:
    def make(tuning: Tuning = "full", learning_rate: float = 1e-3) -> Setup:
        rows = training_rows(world, 0)
        return Setup(
            world.testbed, world.domain, rows, tuning, learning_rate, 2, 0,
            world.base, world.tokenizer,
        )  # fmt: skip

    return make


def tuned(world: World, recipe: Recipe, tuning: Tuning = "full") -> Any:
    return train(world, Job("", tuning, 0.0, 1e-3, 0, "test"), recipe)


def moved(world: World, model: Any) -> set[str]:
    """Names of the base's parameters that are other ones in the tuned model."""
    now = dict(model.named_parameters())
    return {name for name, was in world.base.named_parameters() if not torch.equal(now[name], was)}


def held_together(model: Any) -> set[str]:
    return {n for n, _ in model.named_parameters() if "norm" in n or "embed" in n or "lm_head" in n}


def changes(world: World, model: Any) -> State:
    """How far each linear layer moved, adapters merged."""
    plain = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    before = linears(world.base)
    return {n: (layer.weight - before[n].weight).detach() for n, layer in linears(plain).items()}


def test_plain_tuning_moves_everything_and_the_base_not_at_all(
    world: World, setup_of: Callable[..., Setup]
) -> None:
    kept = {name: parameter.clone() for name, parameter in world.base.named_parameters()}
    model = tuned(world, world.methods["plain"].recipe(setup_of(), 1.0))
    assert moved(world, model) == set(kept)
    assert all(torch.equal(kept[name], p) for name, p in world.base.named_parameters())


def test_lower_rate_is_plain_at_a_part_of_its_rate(setup_of: Callable[..., Setup]) -> None:
    recipe = all_methods()["lower rate"].recipe(setup_of(learning_rate=2e-3), 0.1)
    assert recipe.learning_rate == pytest.approx(2e-4)


def test_blocks_only_holds_embeddings_norms_and_head(
    world: World, setup_of: Callable[..., Setup]
) -> None:
    model = tuned(world, world.methods["blocks only"].recipe(setup_of(), 1.0))
    outside = held_together(model)
    assert len(outside) == 2 + 2 * 5 + 1
    assert moved(world, model) == set(dict(model.named_parameters())) - outside


@pytest.mark.parametrize("name", ["random neurons", "located neurons", "RSN-Tune style"])
def test_neurons_are_held_to_the_bit(
    world: World, setup_of: Callable[..., Setup], name: str
) -> None:
    recipe = world.methods[name].recipe(setup_of(), 0.4)
    tuned(world, recipe)
    (callback,) = recipe.callbacks
    assert isinstance(callback, SafetyFreezeCallback)
    assert callback.certificate is not None
    assert callback.certificate.exact
    if "RSN" not in name:
        assert len(callback.neurons or ()) == pytest.approx(0.4 * 5 * 512, abs=1)


def test_neurons_freeze_under_lora(world: World, setup_of: Callable[..., Setup]) -> None:
    recipe = world.methods["located neurons"].recipe(setup_of("lora"), 0.4)
    model = tuned(world, recipe, "lora")
    units = torch.tensor(recipe.callbacks[0].neurons.indices["model.layers.2.mlp"])
    change = changes(world, model)["model.layers.2.mlp.up_proj"]
    assert change[units].abs().max() == 0
    assert change.abs().max() > 0


def test_importance_is_how_far_a_layer_moves_without_the_unit(
    world: World, setup_of: Callable[..., Setup]
) -> None:
    prompts = world.testbed.harmful["calibration"][:3]
    (batch,) = batches(world.tokenizer, prompts, batch_size=3)
    read = batch.choose("prompt")
    for name, module in (
        ("model.layers.1.mlp", "mlp.down_proj"),
        ("model.layers.1.self_attn", "self_attn.o_proj"),
    ):
        site = find_sites(world.base)[name]
        with torch.no_grad(), capture(world.base, {name: site}) as seen:
            world.base(**batch.inputs)
        scores = safety_neurons.importance(world.base, site, seen[name], read)
        outputs: list[torch.Tensor] = []
        layer = world.base.get_submodule(f"model.layers.1.{module}")
        handle = layer.register_forward_hook(lambda m, i, output, to=outputs: to.append(output))
        with torch.no_grad():
            world.base(**batch.inputs)
            with silence(world.base, {name: (4,)}, {name: site}):
                world.base(**batch.inputs)
        handle.remove()
        gone = ((outputs[0] - outputs[1]) * read[..., None]).flatten(1).norm(dim=1)
        assert torch.allclose(scores[:, 4], gone, rtol=1e-3, atol=1e-5)


def test_common_neurons_are_in_the_top_on_every_prompt(
    world: World, setup_of: Callable[..., Setup]
) -> None:
    sites, setup = find_sites(world.base, ("mlp",)), setup_of()
    prompts = world.testbed.harmful["calibration"]
    all_of_them = safety_neurons.common(setup, sites, prompts, 0.4)
    first = safety_neurons.common(setup, sites, prompts[:1], 0.4)
    assert {name: len(units) for name, units in first.items()} == dict.fromkeys(sites, 205)
    for name, units in all_of_them.items():
        assert set(units) < set(first[name])


def test_safety_layers_do_not_move_and_others_do(
    world: World, setup_of: Callable[..., Setup]
) -> None:
    recipe = world.methods["safety layers"].recipe(setup_of(), 0.4)
    model = tuned(world, recipe)
    still = {
        number
        for number, path in enumerate(blocks_of(model))
        if not any(name.startswith(f"{path}.") for name in moved(world, model))
    }
    assert len(still) == 2
    assert max(still) - min(still) == 1
    assert moved(world, model) >= {"model.embed_tokens.weight", "lm_head.weight"}
    lora = tuned(world, world.methods["safety layers"].recipe(setup_of("lora"), 0.4), "lora")
    for name, change in changes(world, lora).items():
        assert bool(change.any()) == (int(name.split(".")[2]) not in still)


def test_safety_layers_are_those_whose_scaling_refuses(
    world: World, setup_of: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = setup_of()
    before = {name: parameter.clone() for name, parameter in world.base.named_parameters()}
    judge = margin_judge(world.testbed)
    benign = world.testbed.benign["calibration"]
    as_it_is = judge.margins(world.base, world.tokenizer, benign).mean().item()
    scaled = safety_layers.over_refusal(setup, 2, 4)
    assert scaled != pytest.approx(as_it_is, abs=1e-3)
    assert all(torch.equal(before[name], p) for name, p in world.base.named_parameters())
    monkeypatch.setattr(safety_layers, "_SCALE", 1.0)
    assert safety_layers.over_refusal(setup, 2, 4) == pytest.approx(as_it_is, abs=1e-4)
    monkeypatch.setattr(safety_layers, "over_refusal", lambda setup, first, after: -abs(first - 1))
    model = tuned(world, world.methods["safety layers"].recipe(setup, 0.4))
    assert not any(f"layers.{still}." in name for still in (1, 2) for name in moved(world, model))


def test_constrained_loss_by_hand() -> None:
    now, aligned = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, -1.0])
    labels = torch.tensor([[-100, 5, 6, 7]])
    assert constrained.betas(labels).tolist() == pytest.approx([0.5, 2.0, 2.0])
    assert constrained.betas(torch.tensor([[1, *range(7)]])).tolist() == pytest.approx(
        [0.5, 2, 2, 2, 2, 0.1, 0.1]
    )
    by_hand: list[torch.Tensor] = [
        -2 / 0.5 * torch.log(1 / (1 + torch.exp(torch.tensor(-0.5 * 0.5)))),
        -2 / 2.0 * torch.log(torch.tensor(0.5)),
        -2 / 2.0 * torch.log(1 / (1 + torch.exp(torch.tensor(2.0 * 2.0)))),
    ]
    found = constrained.constrained(now, aligned, torch.tensor([0.5, 2.0, 2.0]))
    assert found == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)


def test_constrained_gradient_is_plain_at_first_and_fades() -> None:
    aligned, beta = torch.tensor([-4.0, -4.0, -9.0]), torch.tensor([2.0, 0.1, 2.0])
    now = torch.tensor([-4.0, -4.0, -0.1], requires_grad=True)
    constrained.constrained(now, aligned, beta).backward()
    assert now.grad is not None
    assert now.grad[:2].tolist() == pytest.approx([-1 / 3, -1 / 3])  # that of cross-entropy
    assert now.grad[2].abs() < 1e-6


def test_constrained_tuning_starts_as_plain_tuning(
    world: World, setup_of: Callable[..., Setup]
) -> None:
    once = replace(world, settings=replace(world.settings, steps=1))
    plain, held = (
        tuned(once, once.methods[name].recipe(setup_of(), 1.0))
        for name in ("plain", "constrained first tokens")
    )
    one, other = changes(world, plain), changes(world, held)
    # Adam's first step is the gradient's sign, which rounding may turn where it is near zero.
    alike = [torch.isclose(one[name], other[name], atol=1e-5).float().mean() for name in one]
    assert min(alike) > 0.99


def test_refusals_are_a_share_of_the_rows(setup_of: Callable[..., Setup]) -> None:
    setup = setup_of()
    refusals = setup.testbed.harmful["calibration"]
    rows = mixing.mixed(list(setup.domain.train), refusals, 0.3, 0)
    added = rows[len(setup.domain.train) :]
    assert len(added) / len(rows) == pytest.approx(0.3, abs=1e-3)
    assert {row.text for row in added} == {refusal.text for refusal in refusals}
    assert all(row.response for row in added)


def test_rotated_coefficients_stay_and_the_others_move(
    world: World, setup_of: Callable[..., Setup]
) -> None:
    recipe = world.methods["rotated coefficients"].recipe(setup_of(), 0.3)
    model = tuned(world, recipe)
    (restore,) = recipe.callbacks
    bases = rotated.safety_bases(setup_of())
    assert not hasattr(model.model.layers[0].mlp.up_proj, "parametrizations")
    assert held_together(model).isdisjoint(moved(world, model))
    for name, change in changes(world, model).items():
        turned, mask = change @ bases[name], restore.masks[name]
        assert mask.float().mean() == pytest.approx(0.3, abs=0.01)
        assert turned[mask].abs().max() < 5e-6  # rounding of W U U'
        assert turned[~mask].abs().median() > 1e-4


def test_importance_of_coefficients_is_the_gradient_turned(
    world: World, setup_of: Callable[..., Setup]
) -> None:
    setup = setup_of()
    name = "model.layers.3.mlp.down_proj"
    weight = linears(world.base)[name].weight
    few = replace(
        setup,
        testbed=replace(
            setup.testbed, harmful={"calibration": setup.testbed.harmful["calibration"][:4]}
        ),
    )
    bases = rotated.safety_bases(few)
    scores = rotated.coefficient_importance(few, bases)[name]
    (batch,) = batches(world.tokenizer, few.testbed.harmful["calibration"], batch_size=4)
    labels = batch.input_ids.masked_fill(~batch.is_response, -100)
    loss = world.base(**batch.inputs, labels=labels).loss
    (gradient,) = torch.autograd.grad(loss, weight)
    assert torch.allclose(scores, (gradient @ bases[name]).abs(), rtol=1e-3, atol=1e-6)
    eye = bases[name].mT @ bases[name]
    assert torch.allclose(eye, torch.eye(len(eye)), atol=1e-4)


def test_safe_lora_projects_by_the_papers_formula(
    world: World, setup_of: Callable[..., Setup]
) -> None:
    change, b = torch.randn(6, 4), torch.randn(6, 2)
    whole = change @ change.T / change.square().sum().sqrt()
    assert torch.allclose(safe_lora.project(b, change), whole @ b, atol=1e-5)
    plain = tuned(world, world.methods["plain"].recipe(setup_of("lora"), 1.0), "lora")
    before = {n: p.clone() for n, p in plain.named_parameters() if "lora_" in n}
    moved_by = {name: torch.randn_like(layer.weight) for name, layer in linears(world.base).items()}
    assert safe_lora.project_adapters(plain, moved_by, -1.1) == 0
    assert all(torch.equal(before[n], p) for n, p in plain.named_parameters() if n in before)
    assert safe_lora.project_adapters(plain, moved_by, 1.1) == len(moved_by)
    now = dict(plain.named_parameters())
    for name in before:
        path = name.removeprefix("base_model.model.").split(".lora_")[0]
        expected = before[name]
        if "lora_B" in name:
            expected = safe_lora.project(expected, moved_by[path])
        assert torch.allclose(now[name], expected, atol=1e-6)


def test_what_stands_in_for_the_unaligned_model_has_left_the_base(
    world: World, setup_of: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safe_lora, "_STEPS", 1)
    model = tuned(world, world.methods["Safe LoRA"].recipe(setup_of("lora"), 0.5), "lora")
    assert all(p.isfinite().all() for p in model.parameters())


def test_null_start_leaves_the_model_as_it_was(
    world: World, setup_of: Callable[..., Setup]
) -> None:
    recipe = null_start.recipe(setup_of("lora"), 0.1)
    assert recipe.learning_rate == pytest.approx(1e-4)
    model = copy.deepcopy(world.base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["up_proj", "o_proj"], **recipe.lora)
    recipe.start(model, config)
    adapted = get_peft_model(model, config)
    (batch,) = batches(world.tokenizer, world.testbed.harmful["test"][:4], batch_size=4)
    with torch.no_grad():
        there, here = (each(**batch.inputs).logits for each in (world.base, adapted))
    assert torch.allclose(there, here, atol=1e-3)
    layer: Any = adapted.get_base_model().get_submodule("model.layers.0.mlp.up_proj")
    assert layer.lora_B["default"].weight.abs().max() > 0


def test_a_full_pull_ends_at_the_base(world: World, setup_of: Callable[..., Setup]) -> None:
    assert not moved(world, tuned(world, world.methods["pull to the base"].recipe(setup_of(), 1e3)))
    assert moved(world, tuned(world, world.methods["pull to the base"].recipe(setup_of(), 100)))


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_subspace_and_its_controls_hold_as_many_directions(
    world: World, setup_of: Callable[..., Setup], tuning: Tuning
) -> None:
    setup = setup_of(tuning)
    bases = [
        find(setup, 0.8) for find in (subspace.located, subspace.at_random, subspace.of_benign)
    ]
    shapes = [{i: d.shape for i, d in found.directions.items()} for found in bases]
    assert shapes[0] == shapes[1] == shapes[2]
    recipe = subspace.replaying(0.03)(setup, 0.8)
    model = tuned(world, recipe, tuning)
    assert len(recipe.rows) == len(setup.rows)  # 3% of eight rows are none
    assert recipe.callbacks[0].certificate.exact
    for name, change in changes(world, model).items():
        basis = bases[0].basis(f"{name}.weight")
        assert (change @ basis).norm() < 1e-4 * change.norm()
        assert change.norm() > 0


def test_a_variant_changes_one_thing_of_the_subspace(setup_of: Callable[..., Setup]) -> None:
    setup = setup_of("full")
    whole = subspace.located(setup, 0.8)
    ranks = {inlet: found.shape[1] for inlet, found in whole.directions.items()}
    first = variants.of_layers(setup, 0.8, lambda inlet, block, blocks: block == 0)
    for inlet, found in first.directions.items():
        if ".layers.0." in inlet or "lm_head" in inlet:
            assert torch.equal(found, whole.directions[inlet])
        else:
            assert found.shape[1] == 1
    assert {found.shape[1] for found in first.directions.values()} > {1}
    against = variants.against_domain(setup, 0.8)
    for inlet, found in against.directions.items():
        assert found.shape[1] == ranks[inlet]
        gap = found.float().T @ found.float() - torch.eye(ranks[inlet])
        assert gap.abs().max() < 1e-2  # kept in half precision
    safety, domain = (
        variants._grams(setup, rows) for rows in (setup.testbed.harmful["calibration"], setup.rows)
    )

    def contrast(directions: torch.Tensor, inlet: str) -> float:
        found = directions.float()
        return float(((safety[inlet] - domain[inlet]) @ found * found).sum())

    for inlet, found in against.directions.items():
        assert contrast(found, inlet) >= contrast(whole.directions[inlet], inlet) - 1e-3


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("all embeddings held", {"lm_head"}),
        ("embeddings trained", {"lm_head", "embed_tokens"}),
        ("norms trained", {"lm_head", "embed_tokens", "norm"}),
        ("head held", {"embed_tokens"}),
    ],
)
def test_a_variant_frees_or_holds_one_group(
    world: World, setup_of: Callable[..., Setup], name: str, trained: set[str]
) -> None:
    model = tuned(world, world.methods[f"subspace: {name}"].recipe(setup_of(), 0.8))
    found = moved(world, model)
    groups = ("embed_tokens", "norm", "lm_head")
    assert {group for group in groups if any(group in n for n in found)} == trained
    base = dict(world.base.named_parameters())["model.embed_tokens.weight"]
    now = dict(model.named_parameters())["model.embed_tokens.weight"]
    whole = subspace.located(setup_of(), 0.8)
    safe = now[whole.tokens] - base[whole.tokens]
    assert bool(safe.any()) == (name == "embeddings trained")


def test_every_method_says_where_it_is_from_and_applies_somewhere() -> None:
    methods: dict[str, Method] = all_methods()
    assert next(iter(methods)) == "plain"
    for method in methods.values():
        assert method.source
        assert method.tunings
        assert method.values or method.follows in methods
