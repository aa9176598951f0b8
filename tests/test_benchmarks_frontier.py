"""The frontier's harness: rows, watch, choice, resuming, the table, processes that die."""

import doctest
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import run as command  # noqa: E402
from baselines import (  # noqa: E402
    Method,
    all_methods,
    mixing,  # noqa: E402
    plain,
)
from frontier import choice, markdown, training  # noqa: E402
from frontier.choice import best_rate, best_setting  # noqa: E402
from frontier.pool import side_by_side  # noqa: E402
from frontier.results import Results, matched, table  # noqa: E402
from frontier.training import Job, Settings, World, run, training_rows  # noqa: E402
from testbed import load  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

SETTINGS = Settings("demo", "desk", steps=4, batch_size=4, looks=2, watched=4)


def measures(loss: float, refusal: float, over: float = 0.0) -> dict[str, float]:
    return {
        "refusal": refusal,
        "refusal_margin": refusal,
        "over_refusal": over,
        "domain_loss": loss,
        "domain_token_accuracy": 1 - loss / 10,
        "domain_accuracy": 0.5,
        "general_token_accuracy": 0.4,
    }


def found(job: Job, loss: float, refusal: float, over: float = 0.0) -> dict[str, Any]:
    return {
        **asdict(job),
        "measures": measures(loss, refusal, over),
        "curve": [
            {"step": 0, "domain_loss": 4.0, "refusal": 1.0},
            {"step": 4, "domain_loss": loss, "refusal": refusal},
        ],
        "exact": None,
        "frozen_share": 0.0,
        "seconds_locating": 0.0,
        "seconds_a_step": 2.0 if job.method == "plain" else 3.0,
        "peak_memory_mb": 100.0,
        "seconds": 5.0,
    }


@pytest.fixture(scope="module")
def world() -> World:
    testbed = load("demo")
    desk = testbed.domains["desk"]

    def few(sides: Any) -> dict[str, Any]:
        return {
            name: prompts[: 24 if name == "calibration" else 4] for name, prompts in sides.items()
        }

    small = replace(
        testbed,
        harmful=few(testbed.harmful),
        benign=few(testbed.benign),
        general=few(testbed.general),
        domains={"desk": replace(desk, validation=desk.validation[:8], test=desk.test[:8])},
        answer_tokens=6,
    )
    base = AutoModelForCausalLM.from_pretrained(testbed.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(testbed.folder)
    return World(small, base, tokenizer, SETTINGS, all_methods())


def test_rows_are_as_many_as_the_steps_read_and_poisoned_as_said(world: World) -> None:
    half = replace(world, settings=replace(SETTINGS, poison=0.5))
    rows = training_rows(half, 0)
    complied = {prompt.text for prompt in world.testbed.poison}
    assert len(rows) == 16
    assert sum(row.text in complied for row in rows) == 8
    assert [r.text for r in rows] == [r.text for r in training_rows(half, 0)]
    assert [r.text for r in rows] != [r.text for r in training_rows(half, 1)]


def test_a_run_is_watched_from_the_base_to_the_finished_model(world: World) -> None:
    ended = run(world, Job("located neurons", "full", 0.1, 1e-3, 0, "test"))
    assert [point["step"] for point in ended["curve"]] == [0, 1, 2, 4]
    assert ended["curve"][0]["domain_loss"] > ended["curve"][-1]["domain_loss"]
    assert ended["exact"] is True
    assert ended["frozen_share"] > 0
    assert 0 < ended["seconds_a_step"] < ended["seconds"]
    assert {"refusal", "over_refusal", "domain_loss"} <= set(ended["measures"])
    before = run(world, Job("before tuning", "full", 0.0, 0.0, 0, "test"))
    assert before["measures"]["domain_loss"] > ended["measures"]["domain_loss"]


def test_a_method_with_its_own_loss_is_trained_by_it(world: World) -> None:
    seen: list[torch.Size] = []

    def recipe(setup: Any, value: float) -> Any:
        def loss(model: Any, inputs: Any) -> torch.Tensor:
            seen.append(inputs["input_ids"].shape)
            return 0.0 * model(input_ids=inputs["input_ids"]).logits.sum()

        return replace(plain.plain(setup, value), loss=loss)

    still = replace(world, methods={"still": Method("still", "", recipe)})
    ended = run(still, Job("still", "full", 1.0, 1e-3, 0, "test"))
    assert len(seen) == SETTINGS.steps
    losses = [point["domain_loss"] for point in ended["curve"]]
    assert losses[-1] == pytest.approx(losses[0], abs=1e-2)  # weight decay alone


def test_a_look_on_the_way_is_at_what_a_method_would_give_there(world: World) -> None:
    def recipe(setup: Any, value: float) -> Any:
        def finish(model: Any) -> Any:
            for parameter in model.parameters():
                parameter.data.zero_()
            return model

        return replace(plain.plain(setup, value), finish=finish)

    zeroed = replace(world, methods={"zeroed": Method("zeroed", "", recipe)})
    ended = run(zeroed, Job("zeroed", "full", 1.0, 1e-3, 0, "test"))
    even = torch.tensor(float(len(world.tokenizer))).log().item()
    losses = [point["domain_loss"] for point in ended["curve"]]
    assert losses == pytest.approx([even] * len(losses), rel=1e-3)


def test_a_look_on_the_way_leaves_training_as_it_was(world: World) -> None:
    job = Job("rotated coefficients", "full", 0.3, 1e-3, 0, "test")
    watched = run(world, job)
    assert [point["step"] for point in watched["curve"]] == [0, 1, 2, 4]
    unwatched = replace(world, settings=replace(SETTINGS, looks=1))
    assert watched["measures"] == run(unwatched, job)["measures"]


def test_the_knob_is_the_safest_that_has_learnt() -> None:
    base, tuned = measures(4.0, 1.0), measures(2.0, 0.0)
    job = Job("m", "full", 0.0, 1e-3, 0, "validation")
    runs = [
        found(replace(job, value=1), 2.0, 0.1),
        found(replace(job, value=2), 2.1, 0.9, over=0.5),  # refuses everything
        found(replace(job, value=3), 2.09, 0.6),
        found(replace(job, value=4), 2.2, 1.0),  # two points of token accuracy behind
    ]
    assert best_setting(runs, tuned, base)["value"] == 3
    assert best_setting(runs[3:], tuned, base)["value"] == 4
    rates = [found(replace(job, learning_rate=rate), 1 / rate, 0) for rate in (1.0, 2.0)]
    assert best_rate(rates) == 2.0


def test_refusal_is_read_where_the_domain_loss_is_matched() -> None:
    job = Job("m", "full", 0.0, 1e-3, 0, "test")
    reference = [found(job, 2.0, 0.0)]
    at = matched([found(job, 2.4, 0.6), found(job, 3.2, 0.8)], reference)
    assert at["50%"]["reached"] == 1
    assert at["50%"]["domain_loss"] == pytest.approx(3.0)
    assert at["50%"]["refusal"]["mean"] == pytest.approx(1 - 0.4 * 1.0 / 1.6)
    assert at["90%"] == {"domain_loss": pytest.approx(2.2), "reached": 0, "refusal": None}


def test_results_are_kept_and_never_mixed(tmp_path: Path) -> None:
    path = tmp_path / "made" / "frontier.json"
    results = Results(path, SETTINGS, "command")
    job = Job("plain", "full", 1.0, 1e-3, 0, "test")
    results.choose("full", "plain", 1.0, 1e-3)
    results.choose("full", "other", 0.5, 3e-3)
    results.add(found(job, 2.0, 0.0))
    results.add(found(replace(job, method="other", value=0.5, learning_rate=3e-3), 2.1, 0.9))
    results.add(found(Job("before tuning", "full", 0.0, 0.0, 0, "test"), 4.0, 1.0))
    results.add(found(replace(job, learning_rate=5e-3), 1.0, 0.0))  # another rate: not reported
    again = Results(path, SETTINGS, "another command")
    assert again.find(job) == found(job, 2.0, 0.0)
    assert again.find(replace(job, seed=7)) is None
    rows = {row["method"]: row for row in again.data["rows"]}
    assert rows["plain"]["seeds"] == 1
    assert rows["plain"]["measures"]["domain_loss"]["mean"] == 2.0
    assert rows["other"]["seconds_a_step_ratio"] == 1.5
    assert rows["other"]["refusal_at"]["90%"]["refusal"]["mean"] > 0.9
    assert "other" in table(again, "full")
    assert again.comparison("full").arms == ["plain", "other"]
    with pytest.raises(SystemExit, match="Give another --output"):
        Results(path, replace(SETTINGS, steps=5), "command")


def test_a_bench_goes_on_where_it_stopped(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Job] = []
    broken = True

    def quick(world: World, job: Job) -> dict[str, Any]:
        if job.method == "lower rate" and job.value == 0.3 and broken:
            raise ValueError("the disk is full")
        if job.value == 0.95:
            return {**asdict(job), "refused": "no free direction is left"}
        learnt = 4.0 if job.method == "before tuning" else 3.0 - 100 * job.learning_rate
        return found(job, learnt, 1.0 - job.value)

    def here(jobs: Any, work: Any, processes: int) -> Any:
        for job in jobs:
            asked.append(job)
            try:
                yield job, work(job)
            except ValueError as error:
                yield job, {"error": str(error)}

    monkeypatch.setattr(command, "run", quick)
    monkeypatch.setattr(command, "side_by_side", here)
    methods = [world.methods[n] for n in ("plain", "lower rate", "subspace", "random subspace")]

    def go_on() -> tuple[dict[str, Any], list[str]]:
        bench = command.Bench(world, Results(tmp_path / "frontier.json", SETTINGS, ""), 1)
        bench.choose("full", methods)
        bench.report("full", methods, 2)
        return bench.results.data["chosen"]["full"], [error for _, error in bench.failed]

    chosen, errors = go_on()
    assert errors == ["the disk is full"]
    assert "lower rate" not in chosen  # nothing is chosen from a part of its values
    assert chosen["plain"] == {"value": 1.0, "learning_rate": 3e-3}
    assert chosen["random subspace"] == chosen["subspace"]
    before, broken = len(asked), False
    chosen, errors = go_on()
    assert not errors
    assert "lower rate" in chosen
    assert {job.method for job in asked[before:]} == {"lower rate"}
    assert len(set(asked)) == len(asked) - 1  # what failed was tried again, nothing else
    assert {job.seed for job in asked if job.split == "test"} == {0, 1}
    assert (tmp_path / "frontier_full.svg").read_text().startswith("<svg")
    everything = len(asked)
    go_on()
    assert len(asked) == everything


def test_what_safeft_refuses_is_kept_with_its_reason(world: World) -> None:
    job = Job("subspace", "full", 0.9999999, 1e-3, 0, "validation")
    assert "energy=0.9999999" in run(world, job)["refused"]


def test_processes_side_by_side_give_what_they_found_or_why_not() -> None:
    def work(task: int) -> dict[str, Any]:
        if task == 1:
            raise ValueError("one is no good")
        if task == 2:
            os._exit(3)
        return {"task": task}

    ended = dict(side_by_side([0, 1, 2, 3], work, 2))
    assert ended[0] == {"task": 0}
    assert ended[3] == {"task": 3}
    assert "one is no good" in ended[1]["error"]
    assert ended[2] == {"error": "the process ended with code 3"}


@pytest.mark.parametrize("module", [choice, training, mixing])
def test_examples_hold(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


def test_the_readme_shows_every_way_that_was_reported() -> None:
    spread = {"mean": 0.5, "low": 0.25, "high": 0.75}
    names = ("refusal", "refusal_margin", "over_refusal", "domain_loss", "domain_token_accuracy",
             "general_token_accuracy")  # fmt: skip

    def row(method: str, reached: int = 2) -> dict[str, Any]:
        at = {"90%": {"domain_loss": 1.0, "reached": reached, "refusal": spread}}
        return {
            "method": method, "tuning": "lora", "seeds": 2, "value": 0.9, "learning_rate": 1e-3,
            "measures": dict.fromkeys(names, spread), "refusal_at": at, "seconds_a_step_ratio": 1.1,
        }  # fmt: skip

    before = {"method": "before tuning", "split": "test", "measures": dict.fromkeys(names, 0.75)}
    data = {
        "settings": {"testbed": "public"},
        "chosen": {"full": {}, "lora": {}},
        "runs": [before],
        "rows": [row("plain"), row("subspace", 1), row("subspace: head held")],
    }
    assert markdown.reported(data) == ["lora"]
    lines = markdown.headline([data]).splitlines()
    assert lines[0] == "|  | public text, LoRA |"
    assert lines[2:] == [
        "| before tuning | 0.75, 0.75 |",
        "| plain | 0.50 ± 0.25, 0.50 |",
        "| **subspace** | 0.50 ± 0.25, 0.50 |",
    ]
    ways, variants = markdown.whole(data, "lora"), markdown.whole(data, "lora", variants=True)
    assert [line.split(" | ")[0] for line in ways.splitlines()[3:]] == ["| plain", "| subspace"]
    assert [line.split(" | ")[0] for line in variants.splitlines()[3:]] == [
        "| plain", "| subspace", "| subspace: head held",
    ]  # fmt: skip
    assert "| 0.50 ± 0.25 | 0.50 ± 0.25 |  | 0.50" in ways.splitlines()[4]  # not all got that far
    assert markdown.whole(data, "full").count("\n") == 2
