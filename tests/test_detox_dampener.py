import json
import math
from pathlib import Path
from typing import Any

import pytest

from safeft import Dampener, NeuronSet
from safeft.errors import ArtefactError, FingerprintError, SelectionError
from tests.models import tiny_model

SITE, OTHER = "model.layers.0.mlp", "model.layers.1.mlp"
GAINS = {SITE: {3: 0.25, 40: 0.0}, OTHER: {1: 0.7, 2: 1.0}}


def made(**settings: Any) -> Dampener:
    return Dampener.of(tiny_model(), GAINS, {"rule": "given"}, **settings)


def test_gains_of_one_are_left_out() -> None:
    dampener = made()
    assert dampener.neurons.indices == {SITE: (3, 40), OTHER: (1,)}
    assert dampener.gains[SITE] == (0.25, 0.0)
    assert len(dampener) == 3
    assert dampener.removed == pytest.approx(0.75 + 1 + 0.3)
    assert not dampener.caps


def test_rows_say_the_gain_of_every_number() -> None:
    dampener = made(ceilings={SITE: {5: 2.0}})
    row = dampener.row(SITE, 48, width=2)
    assert row.shape == (96,)
    assert row[[6, 7, 80, 81]].tolist() == [0.25, 0.25, 0, 0]
    assert row.sum() == 96 - 1.5 - 2
    top = dampener.ceiling(SITE, 48)
    assert top[5] == 2
    assert top[[3, 40]].isinf().all()
    assert dampener.caps


def test_a_round_trip_keeps_everything(tmp_path: Path) -> None:
    dampener = made(ceilings={SITE: {5: 2.0}})
    dampener.save_pretrained(tmp_path)
    assert Dampener.from_pretrained(tmp_path) == dampener
    assert Dampener.from_pretrained(tmp_path).hash == dampener.hash
    assert made().hash != dampener.hash
    assert not [p for p in tmp_path.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]


def test_the_control_has_the_same_gains_on_other_units() -> None:
    dampener = made()
    control = dampener.at_random(0)
    for name, units in dampener.neurons.indices.items():
        assert not set(units) & set(control.neurons.indices[name])
        assert sorted(control.gains[name]) == sorted(dampener.gains[name])
    assert control.neurons.indices != dampener.at_random(1).neurons.indices
    assert control == dampener.at_random(0)
    most = Dampener.of(tiny_model(), {SITE: dict.fromkeys(range(30), 0.5)})
    with pytest.raises(SelectionError, match="30 of the 48 units"):
        most.at_random(0)


def test_a_part_keeps_its_gains() -> None:
    part = made().only({SITE: {40}, OTHER: {7}})
    assert part.neurons.indices == {SITE: (40,)}
    assert part.gains == {SITE: (0.0,)}
    with pytest.raises(SelectionError, match="No unit is dampened"):
        made().only({SITE: {7}})


@pytest.mark.parametrize("gain", [-0.1, math.nan, math.inf])
def test_gains_that_are_none(gain: float) -> None:
    with pytest.raises(SelectionError, match=f"{SITE}#3 is {gain}"):
        Dampener.of(tiny_model(), {SITE: {3: gain}})


def test_gains_above_one_only_when_asked_for() -> None:
    with pytest.raises(SelectionError, match=r"1\.4, above 1"):
        Dampener.of(tiny_model(), {SITE: {3: 1.4}})
    assert Dampener.of(tiny_model(), {SITE: {3: 1.4}}, amplifies=True).amplifies


def test_nothing_to_dampen() -> None:
    with pytest.raises(SelectionError, match="No unit is dampened"):
        Dampener.of(tiny_model(), {SITE: {3: 1.0}})
    with pytest.raises(SelectionError, match="no site"):
        Dampener.of(tiny_model(), {"model.layers.9.mlp": {3: 0.5}})
    neurons = NeuronSet.of(tiny_model(), {SITE: [3]})
    with pytest.raises(SelectionError, match="do not correspond"):
        Dampener(neurons, {SITE: (0.5, 0.5)}, {SITE: (1.0,)})


def test_another_model_is_refused() -> None:
    with pytest.raises(FingerprintError):
        made().neurons.check_model(tiny_model(seed=1))


def test_damaged_folders(tmp_path: Path) -> None:
    folder = tmp_path / "dampener"
    made().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    tensors = (folder / "model.safetensors").read_bytes()
    for damage, words in (
        ({"kind": "NeuronSet"}, "is no dampener"),
        ({"safeft": 9}, "is no dampener"),
        ({"counts": {"nonesuch": 1}}, "incomplete or edited"),
        ({"amplifies": None, "base_model": {}}, "incomplete or edited"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **damage}))
        with pytest.raises(ArtefactError, match=words):
            Dampener.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(tensors[:-4])
    with pytest.raises(ArtefactError, match="not the file that was saved"):
        Dampener.from_pretrained(folder)
    with pytest.raises(ArtefactError, match="has no readable"):
        Dampener.from_pretrained(tmp_path / "none")
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    with pytest.raises(ArtefactError, match="holds a model"):
        made().save_pretrained(model)


def test_scaled_gains_are_as_far_from_one_as_asked() -> None:
    half = made().scaled(0.5)
    assert half.gains[SITE] == pytest.approx((0.625, 0.5))
    assert half.neurons.source["strength"] == 0.5
    assert half.scaled(0.5).neurons.source["strength"] == 0.25
    with pytest.raises(SelectionError, match="below 0"):
        made().scaled(1.5)
