import doctest
from pathlib import Path

from transformers import Qwen3Config

from safeft.guard import size
from safeft.guard.size import file_size
from tests.guards import chat_guard


def test_doctests() -> None:
    assert doctest.testmod(size).failed == 0


def test_what_is_calculated_is_what_is_saved(tmp_path: Path) -> None:
    guard = chat_guard()
    guard.save_pretrained(tmp_path)
    head = guard.head
    places = sum(place.width for place in head.places)
    expected = file_size(
        guard.model.config, hidden=head.source["network"]["hidden"], members=2,
        selected=head.units / places, texts=len(head.trained_on),
    )  # fmt: skip
    found = (tmp_path / "model.safetensors").stat().st_size
    assert abs(found - expected) < 3000  # names and shapes


def test_a_guard_of_four_billion_weights_is_below_sixty_megabytes() -> None:
    four = Qwen3Config(num_hidden_layers=36, hidden_size=2560, intermediate_size=9728)
    for selected in (0.02, 0.1, 0.3, 0.6):
        assert file_size(four, selected=selected, texts=50_000, outputs=12) < 60e6
