"""How many directions of each input are held, by hand."""

import pytest
import torch

from safeft.errors import SelectionError
from safeft.locators.ranks import choose_ranks


def test_ranks_by_hand() -> None:
    spectra = {"a": torch.tensor([6.0, 3.0, 1.0, 0.0]), "b": torch.tensor([5.0, 5.0, 5.0, 5.0])}
    outputs = {"a": 10, "b": 2}
    assert choose_ranks(spectra, outputs, ("energy", 0.6)) == {"a": 1, "b": 3}
    assert choose_ranks(spectra, outputs, ("energy", 0.601)) == {"a": 2, "b": 3}
    assert choose_ranks(spectra, outputs, ("rank_share", 0.5)) == {"a": 2, "b": 2}
    assert choose_ranks(spectra, outputs, ("rank_share", 0.01)) == {"a": 1, "b": 1}
    room = 4 * (2 * 14 + 3 * 6)
    assert choose_ranks(spectra, outputs, ("memory", room / 2**30)) == {"a": 2, "b": 3}
    assert choose_ranks(spectra, outputs, ("memory", (room - 1) / 2**30)) == {"a": 1, "b": 3}
    with pytest.raises(SelectionError, match="does not hold one direction of each"):
        choose_ranks(spectra, outputs, ("memory", 1 / 2**30))


def test_the_largest_rank_is_that_of_the_least_spanned_input() -> None:
    values = {"wide": torch.ones(4000), "narrow": torch.cat([torch.ones(1003), torch.zeros(3093)])}
    values["other"] = torch.cat([torch.ones(7), torch.zeros(3993)])
    outputs = dict.fromkeys(values, 1)
    with pytest.raises(SelectionError, match=r"narrow receives.* at most rank_share=0.00175\."):
        choose_ranks({n: values[n] for n in ("narrow", "other")}, outputs, ("rank_share", 0.5))
    with pytest.raises(SelectionError) as caught:
        choose_ranks({n: values[n] for n in ("wide", "narrow")}, outputs, ("rank_share", 0.5))
    largest = float(str(caught.value).rstrip(".").rpartition("rank_share=")[2])
    ranks = choose_ranks({n: values[n] for n in ("narrow",)}, outputs, ("rank_share", largest))
    assert ranks == {"narrow": 1003}
