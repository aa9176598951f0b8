"""The certificate as a value, its file, and comparison by bits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safeft.errors import ArtefactError
from safeft.freeze.certificate import (
    CERTIFICATE_NAME,
    Certificate,
    Violation,
    bits,
    bytes_hash,
    describe_set,
    differences,
)
from tests.freezing import LARGE, model_of, neurons_of

MOVED = Violation("up.weight", "model.layers.0.mlp#3", "rows", 3, 2, 0.25)


def certificate(*violations: Violation, mode: str = "freeze") -> Certificate:
    slices = ({"tensor": "up.weight", "axis": "rows", "count": 1},)
    return Certificate(not violations, violations, mode, {"count": 5}, slices, 0.0321, {"steps": 4})


def test_it_is_written_whole_as_json_with_a_schema(tmp_path: Path) -> None:
    certificate(MOVED).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CERTIFICATE_NAME]
    written = json.loads((tmp_path / CERTIFICATE_NAME).read_text())
    assert list(written)[0] == "safeft_certificate"
    assert written["safeft_certificate"] == 1
    assert written["exact"] is False
    assert written["violations"] == [
        {
            "tensor": "up.weight",
            "neuron": "model.layers.0.mlp#3",
            "axis": "rows",
            "index": 3,
            "changed": 2,
            "max_abs": 0.25,
        }
    ]
    assert written["run"] == {"steps": 4}
    certificate().save(tmp_path / "other.json")
    assert json.loads((tmp_path / "other.json").read_text())["exact"] is True


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / CERTIFICATE_NAME).mkdir()
    with pytest.raises(ArtefactError, match="could not be written"):
        certificate().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CERTIFICATE_NAME]  # no half-written part


def test_the_summary_says_verdict_share_and_first_violations() -> None:
    assert certificate().summary() == "EXACT: 5 neurons, 3.21% of the weights, 1 tensors compared."
    assert "everything but 5 neurons" in certificate(mode="train_only").summary()
    lines = certificate(*[MOVED] * 7).summary().splitlines()
    assert lines[0].startswith("VIOLATED")
    assert lines[1] == "  up.weight rows[3] (model.layers.0.mlp#3): 2 weights differ, by up to 0.25"
    assert len(lines) == 7
    assert lines[-1] == "  and 2 more"
    assert str(Violation("a", "", "columns")) == "a: protected columns differ"


def test_a_set_is_described_by_hash_and_origin() -> None:
    neurons = neurons_of(model_of(), LARGE)
    about = describe_set(neurons)
    assert about["count"] == len(neurons) == 9
    assert about["sha256"] == neurons.hash
    assert about["source"] == {"method": "given"}
    assert about["causal"] == "never validated"
    checked = replace(neurons, source={"causal": {"verdict": "no effect", "effect": 0.0}})
    assert describe_set(checked)["causal"] == "no effect"
    edited = replace(neurons, source={"causal": "yes"})
    assert describe_set(edited)["causal"] == "never validated"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_differences_are_of_bits(dtype: torch.dtype) -> None:
    base = torch.tensor([[1.0, 0.0], [2.0, torch.nan], [3.0, 4.0]], dtype=dtype)
    now = base.clone()
    assert differences(base, now) == []
    now[0, 1] = -0.0
    now[2] += 1
    assert differences(base, now) == [(0, 1, 0.0), (2, 2, 1.0)]
    assert bytes_hash([base]) != bytes_hash([now])
    assert bytes_hash([base]) == bytes_hash([base.clone()])
    assert bits(base).shape == (3, 2, dtype.itemsize)


def test_differences_of_vectors_and_of_strided_slices() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    assert differences(base[:, 1], base[:, 1] + torch.tensor([0.0, 2.0, 0.0])) == [(1, 1, 2.0)]
    assert bytes_hash([base.T]) == bytes_hash([base.T.contiguous()])
    assert bytes_hash([base.T]) != bytes_hash([base])
