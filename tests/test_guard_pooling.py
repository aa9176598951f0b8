import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from safeft.errors import ArtefactError
from safeft.guard import pooling
from safeft.guard.places import find_places
from safeft.guard.pooling import ActivationError, FeatureStore, backbone, fill, pooled
from safeft.guard.reading import Window, as_example, batched, windows
from tests.guards import tiny
from tests.models import tiny_model, tiny_tokenizer

TEXTS = ["short", "a longer text than that", "mid one", "x"]


def shown(chat: bool) -> list[Window]:
    tokenizer = tiny_tokenizer()
    found = [windows(tokenizer, as_example(text, 0), 100, chat)[0] for text in TEXTS]
    return [*found, Window([5, 6, 7, 8], [20, 21, 22])]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert"])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_means_are_over_the_tokens_read_alone(kind: str, size: int) -> None:
    model = tiny(kind)
    places, tokenizer = find_places(model), tiny_tokenizer("left")
    for numbers, batch in batched(tokenizer, shown(kind != "bert"), size, "cpu"):
        means = pooled(model, places, batch)
        for row, number in enumerate(numbers):
            window = shown(kind != "bert")[number]
            ids = torch.tensor([window.context + window.read])
            with torch.no_grad():
                states = backbone(model)(ids, output_hidden_states=True).hidden_states
            expected = states[1][0, len(window.context) :].mean(0)
            torch.testing.assert_close(means[1][row], expected, atol=1e-5, rtol=1e-5)


def test_what_was_read_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    places = find_places(model)
    width = sum(place.width for place in places)
    passes: list[int] = []
    inner = pooling.pooled

    def counted(*given):  # noqa: ANN002, ANN202
        passes.append(1)
        return inner(*given)

    monkeypatch.setattr(pooling, "pooled", counted)
    store = FeatureStore(tmp_path, "me", width)
    rows = fill(store, model, tokenizer, places, shown(True), 2)
    first, features = len(passes), store.features[rows].clone()
    again = FeatureStore(tmp_path, "me", width)
    rows = fill(again, model, tokenizer, places, shown(True), 2)
    assert torch.equal(again.features[rows], features)
    assert len(passes) == first
    assert len(FeatureStore(tmp_path, "another", width)) == 0
    # Rows that were cut off in writing are read anew, not taken for whole.
    folder = next(path for path in tmp_path.iterdir() if (path / "keys.txt").stat().st_size)
    data = (folder / "rows.float32").read_bytes()
    (folder / "rows.float32").write_bytes(data[:-5])
    torn = FeatureStore(tmp_path, "me", width)
    assert len(torn) == len(TEXTS)
    rows = fill(torn, model, tokenizer, places, shown(True), 2)
    assert torch.equal(torn.features[rows], features)
    assert len(passes) == first + 1


def test_repeats_are_read_once() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    places = find_places(model)
    store = FeatureStore(None, "me", sum(place.width for place in places))
    rows = fill(store, model, tokenizer, places, shown(True) * 3, 4)
    assert len(store) == len(TEXTS) + 1
    assert rows.tolist() == rows[: len(rows) // 3].tolist() * 3


def test_features_cannot_be_changed_on_disk(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, "me", 3)
    store.add(["a" * 64], torch.ones(1, 3))
    store.features.zero_()
    assert FeatureStore(tmp_path, "me", 3).features.tolist() == [[1, 1, 1]]


def test_two_writers_do_not_overwrite_each_other(tmp_path: Path) -> None:
    one, other = FeatureStore(tmp_path, "me", 2), FeatureStore(tmp_path, "me", 2)
    one.add(["a" * 64], torch.full((1, 2), 1.0))
    other.add(["b" * 64, "a" * 64], torch.full((2, 2), 2.0))
    found = FeatureStore(tmp_path, "me", 2)
    assert found.features[found.places(["a" * 64, "b" * 64])].tolist() == [[1, 1], [2, 2]]
    assert len(other) == 2


def test_activations_that_are_no_numbers() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    places = find_places(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = float("nan")
    store = FeatureStore(None, "me", sum(place.width for place in places))
    with pytest.raises(ActivationError, match=r"mlp 1 \(model.layers.1.mlp.down_proj\).*of 2"):
        fill(store, model, tokenizer, places, shown(True)[:2], 2)
    assert len(store) == 0


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="cannot be kept"):
        FeatureStore(tmp_path / "file", "me", 3)


GROWTH = """
import re, sys, torch
from pathlib import Path
from safeft.guard import pooling
from safeft.guard.places import find_places
from safeft.guard.reading import Window
from tests.models import tiny_model, tiny_tokenizer
model, tokenizer = tiny_model(intermediate_size=4096), tiny_tokenizer()
places = find_places(model)
store = pooling.FeatureStore(None, "me", sum(p.width for p in places))
def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
sizes = []
for part in range(3):
    shown = [Window([], [6 + n % 200, 6 + n // 200, 7 + part]) for n in range(600)]
    pooling.fill(store, model, tokenizer, places, shown, 16)
    sizes.append(held())
print(len(store), max(sizes[1:]) - sizes[0], store.features.numel() * 4 / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_texts() -> None:
    run = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True,
        env={**os.environ, "TQDM_DISABLE": "1"}, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    count, grown, size = map(float, run.stdout.split())
    assert count == 1800
    assert size > 50  # MiB, two thirds of which came after the first look
    assert grown < 0.2 * size
