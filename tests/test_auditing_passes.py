"""Many edits in one pass, against one edit, one prompt and one start of a refusal at a time."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from safeft.auditing.passes import Edit, Passes, Way
from safeft.auditing.starts import readings
from safeft.capture import edit
from safeft.locators.openings import RefusalOpenings
from safeft.locators.scores import forward
from safeft.openings import opening_margins
from safeft.prompts import Batch, pad
from safeft.sites import find_sites
from tests.families import FAMILIES
from tests.models import tiny_model
from tests.test_capture import hooks_of

OPENINGS = (
    RefusalOpenings((7,), (9, 11), ("a",)),
    RefusalOpenings((7, 12, 20), (30,), ("b",)),
    RefusalOpenings((15, 16), (3,), ("c",)),
    RefusalOpenings((), (40,), ("d",)),
)
LENGTHS = (6, 7, 9, 4, 9)
GATED, POST_NORM, EXPERTS = "llama", "gemma3_text", "mixtral"
# Fused gate, transposed matrices, no branches (ALiBi), shared and dense beside routed, and
# keys that later blocks take from earlier ones, for which nothing may be passed over.
OTHERS = ("phi3", "gpt2", "opt", "bloom", "qwen3_moe", "llama4_text", "olmoe", "gemma4_small")


def family(name: str) -> Any:
    return next(each for each in FAMILIES if each.name == name).build()


def prompts() -> list[list[int]]:
    maker = torch.Generator().manual_seed(0)
    return [torch.randint(5, 200, (length,), generator=maker).tolist() for length in LENGTHS]


def batched(left: bool) -> list[tuple[tuple[int, ...], Batch]]:
    return [
        (numbers, pad([(prompts()[n], []) for n in numbers], 0, left, 2, "cpu"))
        for numbers in ((3, 0), (1, 2, 4))
    ]


def edits_of(model: nn.Module) -> list[Edit]:
    maker = torch.Generator().manual_seed(1)
    return [
        Edit(name, unit, 3 * torch.randn(len(LENGTHS), generator=maker).double())
        for name, site in find_sites(model, ("mlp",)).items()
        for unit in (1, site.units - 1)
    ]


def one_by_one(model: Any, each: Edit | None = None) -> torch.Tensor:
    sites, found = find_sites(model), []
    for number, ids in enumerate(prompts()):
        batch = pad([(ids, [])], 0, True, 2, "cpu")
        value = 0.0 if each is None else float(each.values[number])
        units = {} if each is None else {each.site: (each.unit,)}
        with torch.no_grad(), edit(model, units, sites, lambda _, v: torch.full_like(v, value)):  # noqa: B023
            found.append(opening_margins(OPENINGS, batch, lambda b, k: forward(model, b, k)))
    return torch.cat(found)


def run(passes: Passes, edits: list[Edit]) -> torch.Tensor:
    done = [(chunk, passes.run(chunk, edits)) for chunk in passes.chunks(edits)]
    return passes.gathered(done, len(edits))


def check(model: Any, left: bool, **settings: Any) -> Passes:
    passes = Passes(model, find_sites(model, ("mlp",)), batched(left), OPENINGS, **settings)
    edits = edits_of(model)
    expected = torch.stack([one_by_one(model, each) for each in edits])
    torch.testing.assert_close(passes.base(), one_by_one(model), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(run(passes, edits), expected, rtol=1e-5, atol=1e-4)
    assert (expected - passes.base()).abs().amax() > 0.05
    assert hooks_of(model) == 0
    assert not any("forward" in module.__dict__ for module in model.modules())
    return passes


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("name", [GATED, POST_NORM, EXPERTS])
def test_margins_are_those_of_each_edit_alone(name: str, left: bool) -> None:
    passes = check(family(name), left, tokens=90)
    assert passes.together
    start = "block" if name == EXPERTS else "unit"
    assert {way.start for way in passes.ways.values()} == {start}


@pytest.mark.parametrize("name", OTHERS)
def test_other_layouts_too_by_whatever_way_they_allow(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    passes = check(family(name), True)
    assert passes.together is (name != "bloom")
    whole = [block for block, way in passes.ways.items() if way.start == "start"]
    assert whole == ([1, 2, 3] if name == "gemma4_small" else [])
    assert ("whole passes, which takes longer" in caplog.text) == bool(whole)


def test_adapters_count() -> None:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    passes = check(get_peft_model(tiny_model(num_hidden_layers=3), config).eval(), True)
    assert {way.start for way in passes.ways.values()} == {"unit"}


@pytest.mark.parametrize("start", ["unit", "block", "start"])
@pytest.mark.parametrize("trimmed", [True, False])
def test_each_way_gives_the_same(start: Any, trimmed: bool) -> None:
    model = family("gemma3_text")
    passes = Passes(model, find_sites(model, ("mlp",)), batched(True), OPENINGS)
    edits = edits_of(model)
    passes.ways.update(dict.fromkeys((0, 1), Way(start, trimmed)))
    expected = torch.stack([one_by_one(model, each) for each in edits])
    torch.testing.assert_close(run(passes, edits), expected, rtol=1e-5, atol=1e-4)


def test_blocks_below_the_edited_one_are_not_run() -> None:
    model: Any = tiny_model(num_hidden_layers=4)
    passes = Passes(model, find_sites(model, ("mlp",)), batched(True), OPENINGS)
    (edit,) = [Edit("model.layers.2.mlp", 3, torch.zeros(len(LENGTHS)).double())]
    run(passes, [edit])
    rows: dict[int, list[int]] = {0: [], 2: [], 3: []}
    for number, seen in rows.items():
        mlp = model.model.layers[number].mlp
        mlp.register_forward_hook(lambda _, x, y, seen=seen: seen.append(len(x[0])))
    chunk = passes.chunks([edit] * 5)[0]
    passes._kept = {}
    passes.run(chunk, [edit] * 5)
    count = len(passes._numbers[chunk.batch])
    assert rows == {0: [count], 2: [count, count], 3: [count, 5 * count]}


def test_starts_branch_in_one_pass_and_its_chunks_hold_no_more_than_they_may() -> None:
    model = tiny_model()
    (_, batch), *_ = batched(True)
    (tree,) = readings(OPENINGS, batch, torch.float32, True)
    assert tree.keep == 1 + 5  # 7, 7 12, 7 12 20, 15, 15 16
    assert len(readings(OPENINGS, batch, torch.float32, False)) == 2
    passes = Passes(model, find_sites(model, ("mlp",)), batched(True), OPENINGS, tokens=60)
    sizes = [len(chunk.edits) for chunk in passes.chunks(edits_of(model) * 4)]
    assert max(sizes) == 60 // tree.shape.numel()


def test_a_shortcut_that_changes_margins_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from safeft.auditing import passes as module

    real = module.seen_below

    def off(*given: Any) -> Any:
        below = real(*given)
        return module.Below([each + 1 for each in below.inputs], below.rests)

    monkeypatch.setattr(module, "seen_below", off)
    passes = check(tiny_model(), True)
    assert {way.start for way in passes.ways.values()} == {"start"}
    assert "cannot go on from block 1" in caplog.text
