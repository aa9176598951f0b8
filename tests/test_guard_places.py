import pytest
import torch

from safeft.capture import CaptureError
from safeft.errors import ConfigError
from safeft.guard.places import Place, find_places, taken, watched
from tests.guards import tiny
from tests.models import MODEL_TYPES, tiny_model
from tests.test_capture import hooks_of


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "gpt2", "opt", "bert"])
def test_places_in_order_of_depth(model_type: str) -> None:
    model = tiny(model_type)
    places = find_places(model)
    assert [place.name for place in places] == ["mlp 0", "residual 0", "mlp 1", "residual 1"]
    ids = torch.arange(6, 18).view(2, 6)
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)  # leaves hooks of transformers' own
        hooks = hooks_of(model)
        with watched(model, places) as seen:
            model(ids)
    values = taken(seen, places)
    for place, value in zip(places, values, strict=True):
        assert value.numel() == 12 * place.width
    # What the first block gives is what transformers shows too.
    torch.testing.assert_close(values[1].view(2, 6, -1), output.hidden_states[1])
    assert hooks_of(model) == hooks


def test_experts_are_left_out() -> None:
    model = tiny_model("mixtral", num_local_experts=2)
    assert [place.name for place in find_places(model)] == ["residual 0", "residual 1"]
    with pytest.raises(ConfigError, match=r"kinds=\['mlp'\].*residual stream"):
        find_places(model, ["mlp"])


@pytest.mark.parametrize("kinds", [[], ["attention"]])
def test_unknown_kinds(kinds: list[str]) -> None:
    with pytest.raises(ConfigError, match="residual and mlp"):
        find_places(tiny_model(), kinds)  # pyright: ignore[reportArgumentType]


def test_a_place_that_is_not_run_is_an_error_and_not_its_last_value() -> None:
    model = tiny_model()
    places = find_places(model)
    with torch.no_grad(), watched(model, places) as seen:
        model(torch.tensor([[6, 7]]))
        taken(seen, places)
        with pytest.raises(CaptureError, match="was not run"):
            taken(seen, places)


def test_hooks_go_when_a_pass_fails() -> None:
    model = tiny_model()
    with pytest.raises(RuntimeError, match="boom"), watched(model, find_places(model)):
        raise RuntimeError("boom")
    assert hooks_of(model) == 0


def test_name() -> None:
    assert Place("model.layers.3", "residual", 3, 8).name == "residual 3"
