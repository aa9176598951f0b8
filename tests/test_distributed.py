"""Real processes under every engine: exact where it should be, an error where it must.

Marked `distributed`: minutes of launches, run by `python -m pytest -m distributed`.
"""

from pathlib import Path
from typing import Any

import pytest

import safeft
from tests.engine_cell import Cell
from tests.engines import ENGINES, WRAPPERS, broken, launch, table
from tests.families import FAMILIES
from tests.freezing import LARGE, model_of, neurons_of

pytestmark = pytest.mark.distributed

SAVE: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
KEEP = {"stage3_param_persistence_threshold": 100000}
SHARDED = {"state_dict_type": "SHARDED_STATE_DICT"}
RAM = {"cpu_ram_efficient_loading": True}
ODD = {"intermediate_size": 49}  # over two processes: 25 and 24

EVERYWHERE = [
    Cell("kept", set="small", settings=SAVE | {"max_steps": 2}),
    Cell("resumed", set="small", resume="kept/run/checkpoint-2", settings={"max_steps": 4}),
    Cell("enlarged", resume="kept/run/checkpoint-2", settings=SAVE | {"max_steps": 4}),
    Cell("best", settings=SAVE | BEST | {"max_steps": 4}),
    Cell("checkpointing", settings={"gradient_checkpointing": True}),
    Cell("norms", hold=("norms",)),
    Cell("only", mode="train_only"),
    Cell("only-lora", "lora", mode="train_only"),
    Cell("odd", shape=ODD),
    Cell("odd-bf16", dtype="bfloat16", shape=ODD),
    Cell("rank1", "lora", rank=1),  # one row of A over two processes: none in one of them
]
OWN = {
    "fsdp2": [
        Cell("loaded", load=True, engine=RAM),
        Cell("loaded-bf16", dtype="bfloat16", load=True, engine=RAM),
        Cell("offload", engine={"cpu_offload": True}),
        Cell("wrapped", engine={"activation_checkpointing": True}),
        Cell("sharded", settings=SAVE | {"max_steps": 2}, engine=SHARDED),
    ],
    "zero3": [
        Cell("loaded", load=True),
        Cell("loaded-bf16", dtype="bfloat16", load=True),
        Cell("gathered", engine=KEEP),
        Cell("gathered-bf16", dtype="bfloat16", engine=KEEP),
    ],
}
FAMILY = [
    Cell(f"{family}-{tuning}", tuning, family=family)  # pyright: ignore
    for family in ("phi3", "gpt2", "mixtral", "gpt_oss")
    for tuning in ("full", "lora")
]
"""Fused, transposed and stacked matrices; of the last also transposed, interleaved and biased."""

APART = [
    Cell("plain", set=None),
    Cell("nothing", "lora", set="small", targets=("k_proj",), aside=True),
    Cell("nothing-plain", "lora", set=None, targets=("k_proj",)),
    Cell("neutered", broken="mask_fill"),
    Cell("early", broken="early"),
]
BROKEN = [cell for part in ("pin", "mask") for cell in broken(part) if cell.accumulation == 1]
TAMPERED = [Cell("tampered", tamper=True), Cell("tampered-lora", "lora", tamper=True)]


@pytest.fixture(scope="module", params=ENGINES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Everything an engine is asked, in one launch: starting takes longer than training."""
    engine = request.param
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp(engine)
    cells = [*table(), *BROKEN, *EVERYWHERE, *OWN.get(engine, []), *APART]
    if engine == "ddp":
        cells += TAMPERED
    if engine in ("single", "fsdp2", "zero3"):
        cells += FAMILY
    return engine, folder, launch(engine, folder, cells)


def wrapper_of(engine: str, cell: dict[str, Any]) -> str:
    """Other families' classes have other names; under LoRA they are not causal models to PEFT."""
    expected = WRAPPERS[engine, cell["tuning"]]
    if not cell["family"]:
        return expected
    if cell["tuning"] == "lora":
        return expected.replace("PeftModelForCausalLM", "PeftModel")
    family = next(family for family in FAMILIES if family.name == cell["family"])
    return expected.replace("LlamaForCausalLM", type(family.build()).__name__)


def check_exact(engine: str, ranks: list[dict[str, Any]], size: int = 2) -> None:
    """The run names its engine itself, no frozen bit changed, and the rest learned."""
    size = 1 if engine == "single" else size
    assert len(ranks) == size
    for report in ranks:
        cell = report["cell"]
        assert report["error"] is None
        said = report["run"]
        assert report["world_size"] == size
        assert report["wrapper"] == wrapper_of(engine, cell)
        assert report["partitioned"] == (engine == "zero3")
        assert (report["parameter"] == "DTensor") == (engine == "fsdp2")
        assert (said["engine"], said["processes"]) == (engine, size)
        assert said["masks_fired"] == said["masked_parameters"] > 0
        assert report["exact"] is True
        if size > 1:
            assert [part["exact"] for part in said["parts"]] == [True] * size
            assert sum(part["weights"] for part in said["parts"]) > 0
    assert ranks[0]["frozen_changed"] == 0
    assert ranks[0]["frozen"] > 0
    # bfloat16 rounds small steps away; each tensor still has to move in most places.
    assert ranks[0]["least_moved"] > (0.9 if ranks[0]["dtype"] == "torch.float32" else 0.5)


@pytest.mark.parametrize("name", [cell.name for cell in [*table(), *EVERYWHERE]])
def test_frozen_slices_are_exact_and_the_rest_moves(run: Any, name: str) -> None:
    engine, _, reports = run
    check_exact(engine, reports[name])
    if name == "enlarged":  # eight parameters hold neurons that the first part of the run trained
        assert [report["restored"] for report in reports[name]] == [8] * len(reports[name])
    if name == "resumed":
        assert [report["restored"] for report in reports[name]] == [0] * len(reports[name])


def test_what_only_one_engine_has_is_exact_as_well(run: Any) -> None:
    engine, _, reports = run
    for cell in OWN.get(engine, []):
        check_exact(engine, reports[cell.name])
    if engine == "fsdp2":
        assert reports["wrapped"][0]["checkpoint_wrappers"] > 0


def test_fused_transposed_and_expert_layouts_are_exact(run: Any) -> None:
    engine, _, reports = run
    if engine not in ("single", "fsdp2", "zero3"):
        pytest.skip("three engines stand for the three ways of storing a weight")
    for cell in FAMILY:
        check_exact(engine, reports[cell.name])


def test_without_the_pin_weight_decay_moves_neurons_and_every_process_says_so(run: Any) -> None:
    _, _, reports = run
    for dtype in ("float32", "bfloat16"):
        for report in reports[f"full-{dtype}-1-no-pin"]:
            assert "FreezeError: What is held is not where the base has it" in report["error"]
        # Decay of an adapter's zeros is zero: LoRA needs no pin, which is why it may stay exact.
        for report in reports[f"lora-{dtype}-1-no-pin"]:
            assert report["error"] is None


def test_without_masks_no_process_gets_past_the_first_step(run: Any) -> None:
    _, _, reports = run
    for cell in BROKEN:
        if cell.broken == "mask":
            for report in reports[cell.name]:
                assert "did not fire in the first step" in report["error"]


def test_hooks_set_before_wrapping_are_lost_under_fsdp_and_every_process_says_so(run: Any) -> None:
    """FSDP2 puts new parameters in the place of the old ones; the others keep theirs."""
    engine, _, reports = run
    for report in reports["early"]:
        if engine == "fsdp2":
            assert "None of the 10 gradient masks fired in the first step" in report["error"]
        else:
            assert report["error"] is None


def test_clipping_never_sees_frozen_coordinates(run: Any) -> None:
    """A mask that fires and changes nothing lets their gradients into the norm; ours does not."""
    _, _, reports = run
    masked, seen = (reports[name][0]["grad_norms"][0] for name in ("full-float32-1", "neutered"))
    assert masked < 0.99 * seen
    assert seen == pytest.approx(reports["plain"][0]["grad_norms"][0], rel=1e-5)


def test_with_nothing_to_mask_the_losses_are_the_plain_trainers(run: Any) -> None:
    """The set lies where this adapter does not train: callback on, no mask, every loss the same."""
    _, _, reports = run
    for with_set, without in zip(reports["nothing"], reports["nothing-plain"], strict=True):
        assert with_set["error"] is None
        assert with_set["losses"] == without["losses"]
        assert with_set["grad_norms"] == without["grad_norms"]
        assert with_set["run"]["masked_parameters"] == 0


def test_first_losses_agree_over_engines(run: Any) -> None:
    """The same data in the same order: two processes with a batch of two each, on every engine."""
    engine, _, reports = run
    if engine != "single":
        assert reports["full-float32-1"][0]["losses"][0] == pytest.approx(5.755876, abs=1e-5)
        assert reports["full-float32-1"][0]["grad_norms"][0] == pytest.approx(2.67988, abs=1e-4)


@pytest.mark.parametrize("run", ["ddp"], indirect=True)
def test_a_rank_that_disagrees_is_named_by_all(run: Any) -> None:
    _, _, reports = run
    changed = "model.layers.0.mlp.up_proj.weight: protected rows differ"
    for cell in TAMPERED:
        first, second = reports[cell.name]
        assert first["exact_after_free_change"] is second["exact_after_free_change"] is True
        assert first["violations"] == ["ranks [1]: protected rows differ"]
        assert second["violations"] == [changed, "ranks [1]: protected rows differ"]


@pytest.mark.parametrize("run", ["ddp", "zero3"], indirect=True)
def test_checkpoints_of_many_processes_verify_and_a_changed_one_does_not(
    run: Any, tmp_path: Path
) -> None:
    _, folder, _ = run
    model_of().save_pretrained(tmp_path / "base")
    neurons = neurons_of(model_of(), LARGE)
    for name in ("full-float32-1", "lora-float32-1", "best"):
        verdict = safeft.verify(tmp_path / "base", folder / name / "tuned", neurons)
        assert verdict.exact, verdict.summary()
    assert not safeft.verify(tmp_path / "base", folder / "plain" / "tuned", neurons).exact
