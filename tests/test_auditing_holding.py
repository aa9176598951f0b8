"""Rows held at values of their own, also token by token as answers are generated."""

from typing import Any

import pytest
import torch

from safeft.auditing.holding import holding
from safeft.capture import CaptureError, edit
from safeft.prompts import pad
from safeft.sites import find_sites
from tests.families import FAMILIES
from tests.models import tiny_model
from tests.test_capture import hooks_of

PROMPTS = [[9, 8, 7], [30, 31, 32, 33, 34], [50, 51]]


def alone(model: Any, ids: list[int], site: str, unit: int, value: float) -> list[int]:
    batch = pad([(ids, [])], 0, True, 1, "cpu")
    sites = find_sites(model)
    with edit(model, {site: (unit,)}, sites, lambda _, seen: torch.full_like(seen, value)):
        made = model.generate(**batch.seen, max_new_tokens=4, do_sample=False, pad_token_id=0)
    return made[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral", "gemma4_small"])
def test_generation_is_that_of_each_row_alone(name: str) -> None:
    model: Any = next(each for each in FAMILIES if each.name == name).build()
    model.generation_config.eos_token_id = None
    sites = find_sites(model, ("mlp",))
    site = list(sites)[-1]
    values = torch.tensor([40.0, torch.nan, -60.0])
    batch = pad([(ids, []) for ids in PROMPTS], 0, True, 1, "cpu")
    with holding(model, sites, {site: [(2, values)]}, 3):
        made = model.generate(**batch.seen, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert hooks_of(model) == 0
    plain = model.generate(**batch.seen, max_new_tokens=4, do_sample=False, pad_token_id=0)
    width = batch.input_ids.shape[1]
    assert made[1].tolist() == plain[1].tolist()
    for row in (0, 2):
        expected = alone(model, PROMPTS[row], site, 2, float(values[row]))
        assert made[row, width:].tolist() == expected
    assert made[:, width:].tolist() != plain[:, width:].tolist()


def test_a_site_that_never_runs_is_an_error() -> None:
    model = tiny_model()
    sites = find_sites(model)
    with (
        pytest.raises(CaptureError),
        holding(model, sites, {"model.layers.0.mlp": [(1, torch.zeros(1))]}, 1),
    ):
        pass
    assert hooks_of(model) == 0
