from pathlib import Path
from typing import Any

import pytest
import torch

from safeft.errors import ConfigError, PromptError, SelectionError
from safeft.guard import GuardFitter, pooling
from safeft.guard import transfer as transfer_module
from safeft.guard.fitter import LEAST
from tests.guards import BAD, GOOD, chat_guard, encoder_guard, texts, tiny_encoder
from tests.models import tiny_model, tiny_tokenizer

QUICK: dict[str, Any] = {"search": 1, "members": 2}


def fitter(**settings: Any) -> GuardFitter:
    return GuardFitter(tiny_encoder(), tiny_tokenizer(chat_template=None), **settings)


@pytest.mark.parametrize("made", [chat_guard, encoder_guard], ids=["chat model", "encoder"])
def test_other_texts_are_told_apart(made: Any) -> None:
    guard = made()
    asked, harmful = texts(40, start=1000)
    scores = torch.tensor([score.harmful for score in guard.score(asked)])
    assert ((scores > 0.5) == torch.tensor(harmful)).all()
    assert guard.head.reading["chat"] == (made is chat_guard)
    assert 0 < guard.head.units < sum(probe.place.width for probe in guard.head.probes) / 2
    weights = [probe.layer_weight for probe in guard.head.probes]
    assert max(weights) == 1
    assert min(weights) > 0


def test_fitting_twice_gives_the_same_guard() -> None:
    found = []
    for seed in (0, 0, 1):
        each = fitter()
        each.update(*texts())
        found.append(each.fit(seed=seed, **QUICK).head)
    assert torch.equal(found[0].network.first, found[1].network.first)
    assert found[0].network.first.shape != found[2].network.first.shape or not torch.equal(
        found[0].network.first, found[2].network.first
    )


def test_activations_are_kept_between_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitter(cache=tmp_path).update(*texts())
    monkeypatch.setattr(pooling, "pooled", None)  # a pass would fail
    again = fitter(cache=tmp_path)
    again.update(*texts())
    assert again.fit(**QUICK).head.units
    other = GuardFitter(tiny_encoder(seed=1), tiny_tokenizer(chat_template=None), cache=tmp_path)
    with pytest.raises(TypeError):
        other.update(*texts())


def test_sources_and_both_their_labels_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[torch.Tensor] = []
    found = transfer_module.probe_path

    def watched(*args: Any, counts: torch.Tensor) -> Any:
        given.append(counts)
        return found(*args, counts=counts)

    monkeypatch.setattr(transfer_module, "probe_path", watched)
    each = fitter()
    each.update(*texts(40), source="small")
    asked, harmful = texts(120, start=500)
    kept = [n for n in range(120) if not harmful[n] or n < 40]
    each.update([asked[n] for n in kept], [harmful[n] for n in kept], source="large")
    each.fit(**QUICK)
    share = 1 / torch.tensor([60.0, 20.0])  # harmless ones of the large source; all others
    torch.testing.assert_close(given[0].unique(), share * 30)  # 120 texts of 4 kinds


@pytest.mark.parametrize("label", [True, False])
def test_one_class_is_refused(label: bool) -> None:
    each = fitter()
    each.update([f"{n} words" for n in range(30)], [label] * 30)
    with pytest.raises(PromptError, match=f"All 30.*{'harmful' if label else 'harmless'}"):
        each.fit()


def test_too_few_of_a_class() -> None:
    each = fitter()
    each.update([f"{n} words" for n in range(30)], [n < 5 for n in range(30)])
    with pytest.raises(PromptError, match="5 harmful and 25 harmless.*20 the least"):
        each.fit()


@pytest.mark.parametrize(
    ("items", "labels", "message"),
    [
        (["a", ""], [1, 0], "Text 1 is empty"),
        (["a", "b"], [1], "2 texts come with 1 labels"),
        (["a"], ["harmful"], "label 'harmful'"),
        (["a"], [3], "label 3"),
        (["a"], [[1]], r"label \[1\]"),
    ],
)
def test_bad_texts_and_labels(items: Any, labels: Any, message: str) -> None:
    each = fitter()
    with pytest.raises(PromptError, match=message):
        each.update(items, labels)
    assert len(each) == 0


@pytest.mark.parametrize(
    "setting", [{"share": 0}, {"share": 1.1}, {"validation": 0.6}, {"search": 0}, {"members": 1}]
)
def test_bad_settings(setting: dict[str, Any]) -> None:
    each = fitter()
    each.update(*texts())
    with pytest.raises(ConfigError, match="members"):
        each.fit(**setting)


def test_labels_without_a_trace_in_the_texts_are_refused() -> None:
    each = fitter()
    draw = torch.Generator().manual_seed(0)
    asked = [str(torch.randint(10**6, (1,), generator=draw).item()) for _ in range(80)]
    wrong = [bool(n % 2) for n in range(80)]
    each.update(asked, wrong)

    def tried() -> None:
        for seed in range(8):  # chance may lie a little above one half
            each.fit(seed=seed, **QUICK)

    with pytest.raises(SelectionError, match="no better than chance"):
        tried()


def test_repeats_count_once_and_contradictions_not_at_all(caplog: Any) -> None:
    each = fitter()
    asked, harmful = texts()
    each.update(asked, harmful)
    each.update([asked[0].upper(), asked[1] + "!"], harmful[:2])
    assert len(each) == 60
    each.update([asked[2], "What? " + asked[4]], [not harmful[2], harmful[4]])
    source = each.fit(**QUICK).head.source
    assert (source["repeated"], source["contradicted"]) == (3, 1)
    assert source["texts"]["train"] + source["texts"]["validation"] == 60
    assert "1 texts are called harmful once and harmless once" in caplog.text


def test_long_texts_are_cut_and_counted() -> None:
    each = fitter(max_length=24)
    each.update(*texts())
    each.update([f"{GOOD} " * 9, f"{BAD} " * 9], [0, 1])
    assert each.fit(**QUICK).head.source["cut"] == 2


def test_groups_and_sources_stay_on_one_side() -> None:
    asked, harmful = texts(120)
    each = fitter()
    each.update(asked[:60], harmful[:60], source="one", groups=[n // 4 for n in range(60)])
    each.update(asked[60:], harmful[60:], source="two")
    source = each.fit(**QUICK).head.source
    assert source["sources"] == {
        "one": {"texts": 60, "harmful": 30},
        "two": {"texts": 60, "harmful": 30},
    }


def test_named_labels_get_outputs_of_their_own(caplog: Any) -> None:
    asked = [f"{('zzzz', 'kkkk', GOOD)[n % 3]} {n}" for n in range(150)]
    labels: list[Any] = [({"zeds"}, {"kays", "rare"} if n == 1 else {"kays"}, ())[n % 3]
                         for n in range(150)]  # fmt: skip
    each = fitter()
    each.update(asked, labels, source="named")
    each.update([f"zkz {BAD} {n}" for n in range(20)], [True] * 20, source="plain")
    guard = each.fit(**QUICK)
    assert guard.labels == ("harmful", "kays", "zeds")
    assert "'rare' is the label of 1 texts, too few" in caplog.text
    assert LEAST > 1
    zed, kay, good = guard.score(["zzzz 900", "kkkk 901", f"{GOOD} 902"])
    assert zed.labels["zeds"] > 0.5 > zed.labels["kays"]
    assert kay.labels["kays"] > 0.5 > kay.labels["zeds"]
    assert max(good.harmful, *good.labels.values()) < 0.5


def test_answers_are_read_in_the_context_of_what_was_asked() -> None:
    tokenizer = tiny_tokenizer()
    each = GuardFitter(tiny_model(), tokenizer)
    asked, harmful = texts()
    each.update([{"prompt": "Say it", "response": text} for text in asked], harmful)
    guard = each.fit(**QUICK)
    bad = {"prompt": "Please?", "response": f"{BAD} 77"}
    good = {"prompt": "Please?", "response": f"{GOOD} 77"}
    one, other = guard.score([bad, good])
    assert one.harmful > other.harmful + 0.2


def test_a_guard_on_a_guard_model() -> None:
    """A classifier's inside is read like any other's: its own verdict is not needed."""
    from transformers import BertForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification(tiny_encoder().config).eval()
    each = GuardFitter(model, tiny_tokenizer(chat_template=None))
    each.update(*texts())
    assert each.fit(**QUICK).score([f"{BAD} 999"])[0].harmful > 0.5
