"""The guard's benchmark at a tiny scale: it finds what is there, resumes, and sees mistakes."""

import asyncio
import json
from pathlib import Path
from typing import Any

import guard as benchmark
import pytest
import torch
from guarding import baselines, compare, costs, serving, sets, streams
from guarding.sets import Labelled

from safeft.guard.reading import as_examples
from tests.guards import chat_guard, encoder_guard, texts, tiny_encoder
from tests.models import tiny_tokenizer
from tests.test_guard_service import Echo, Running

QUICK = {"trials": 1, "splits": 2, "epochs": 1, "final": 20, "seed": 0}


def toy(start: int) -> Labelled:
    asked, harmful = texts(60, start)
    return Labelled(tuple(asked), tuple(harmful), tuple(range(60)))


def test_methods_are_compared_and_nothing_is_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny_encoder(), tiny_tokenizer(chat_template=None)
    monkeypatch.setattr(compare, "encoder", lambda: made)
    monkeypatch.setattr(sets, "load", lambda _: {"one": toy(0), "two": toy(500)})
    monkeypatch.setattr(sets, "unseen", lambda *_: {"three": toy(900)})
    cells: dict[str, Any] = {}
    saved: list[int] = []
    monkeypatch.setattr(baselines.SirenScheme.__init__, "__kwdefaults__", QUICK)
    wanted = {"methods": ("guard", "random units", *compare.SIMPLE, *compare.SIREN)}
    for _ in range(2):
        compare.compare(tmp_path, tmp_path, lambda: saved.append(len(cells)), cells, **wanted)
    assert saved == list(range(1, 4 * 6 + 1))
    within = cells["held-out parts/0/guard"]
    assert set(within["sets"]) == {"one", "two"}
    assert within["sets"]["one"]["texts"] == 18
    assert within["macro_f1"] > 0.9
    assert set(cells["without two/0/TF-IDF"]["sets"]) == {"two"}
    assert cells["held-out parts/0/random units"]["units"] == within["units"]
    rows = compare.summary(cells)
    across = (cells["without one/0/guard"]["macro_f1"], cells["without two/0/guard"]["macro_f1"])
    assert rows["guard"]["sets_left_out"]["macro_f1"] == pytest.approx(sum(across) / 2)
    assert rows["guard"]["held_out_parts"]["results"] == rows["guard"]["sets_left_out"]["results"]
    assert rows["guard"]["new_sets"]["results"] == 1
    assert benchmark.picture(cells).startswith("<svg")
    del cells["without one/0/TF-IDF"], cells["without two/0/TF-IDF"]
    assert compare.summary(cells)["TF-IDF"]["mean"] is None
    assert "TF-IDF" not in benchmark.picture(cells)


def test_a_method_differs_from_the_guard_in_one_part() -> None:
    probes = list(encoder_guard().head.probes)
    assert {p.layer_weight for p in baselines.uniform(probes)} == {1.0}
    drawn = baselines.random_units(probes)
    for mine, other in zip(probes, drawn, strict=True):
        assert len(other.selected) == len(set(other.selected.tolist())) == len(mine.selected)
    assert not all(torch.equal(m.selected, o.selected) for m, o in zip(probes, drawn, strict=True))
    assert all(len(p.selected) == p.place.width for p in baselines.every_unit(probes))
    (last,) = [p for p in baselines.last_layer(probes) if len(p.selected)]
    assert (last.place.name, len(last.selected)) == ("residual 1", 32)


def test_the_other_scheme_learns() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(200, 12, generator=draw)
    truth = features[:, 2] > features[:, 9]
    scheme = baselines.SirenScheme(2, trials=2, splits=2, epochs=5, final=60)
    scheme.fit(features, truth, torch.arange(120), torch.arange(120, 160))
    right = (scheme.scores(features[160:]) > 0.5) == truth[160:]
    assert right.float().mean() > 0.8


def test_no_answer_is_fitted_on_and_tested_on() -> None:
    bed = streams.testbed.load("demo")
    for side in streams.answers(bed, 60):
        fitted, held = streams.parts(side)
        assert fitted
        assert held
        assert not {p.response for p in fitted} & {p.response for p in held}


def test_an_answer_turns_where_it_is_said_to() -> None:
    guard = chat_guard()
    good, bad = (
        as_examples([{"prompt": "Hi", "response": said}]) for said in ("Hello.", "zzzz kill")
    )
    ((turned, boundary),) = streams.turning(guard, bad, good, room=100)
    tokenizer: Any = guard.tokenizer
    said = str(turned.response)
    assert said.startswith("Hello. zzzz kill zzzz kill")
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids[:boundary]) == "Hello."
    assert len(ids) < 100


def test_streams_are_held_against_batches() -> None:
    found = streams.difference(chat_guard(), as_examples(["Hi", "zzzz"]), tokens=9)
    assert found["prefixes"] == 16
    assert found["value"] < 1e-5 < found["spread_of_scores"]


def test_costs_are_those_of_a_guard_of_full_size() -> None:
    guard = costs.random_guard(costs.decoder(128, 2), tiny_tokenizer())
    size = costs.saved(guard)
    assert size["calculated"] == pytest.approx(size["bytes"], rel=0.02)
    time = costs.token_time(guard, rows=2, tokens=3, pairs=2)
    assert time["interval"]["low"] <= time["ratio"] <= time["interval"]["high"]
    assert costs.throughput(guard, ["one", "and two"], 1)["ratio"] > 0


def test_what_is_timed_takes_turns() -> None:
    order: list[str] = []
    costs.paired(lambda: order.append("a"), lambda: order.append("b"), 3)
    assert "".join(order[2:]) in ("abbaab", "baabba")


def test_mixed_up_answers_and_bad_clients_would_be_seen() -> None:
    asked = [str(n) for n in range(0, 9000, 100)]
    truth = [int(text) / 10_000 for text in asked]
    with Running(Echo(0)) as server:
        service: Any = server
        found = asyncio.run(serving.load(service, asked, truth, 60, 8))
        assert found["statuses"] == {"200": 60}
        assert found["largest_difference_from_alone"] < 1e-9
        wrong = asyncio.run(serving.load(service, asked, truth[::-1], 20, 8))
        assert wrong["largest_difference_from_alone"] > 0.1
        told = asyncio.run(serving.trouble(service, 2))
    assert told == {
        "not UTF-8": {"400": 2}, "not JSON": {"400": 2}, "no texts": {"400": 2},
        "too large": {"413": 2}, "hangs": {"408": 2}, "rubbish": {"400": 2},
    }  # fmt: skip


def test_results_are_kept_while_the_settings_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "guard.json"
    first = benchmark.Results(path)
    first.part("serve", {"requests": 1})["load"] = 5
    first.save()
    again = benchmark.Results(path)
    assert again.part("serve", {"requests": 1})["load"] == 5
    assert "load" not in again.part("serve", {"requests": 2})
    assert json.loads(path.read_text())["machine"]["torch"] == torch.__version__
