"""The bill of materials is CycloneDX 1.6, says the audit's figures, and names the map by hash."""

import base64
import json
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from safeft.errors import ConfigError
from safeft.neurons import NeuronSet
from safeft.report.certified import Certified
from safeft.report.mlbom import mlbom
from tests import audits
from tests.models import tiny_model


def problem(bill: dict[str, Any]) -> str:
    found = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill))
    return "" if found is None else str(found)


CERTIFICATE = Certified("my certificate.json", "6" * 64, True, 0.25, 24, "7" * 64)


@pytest.mark.parametrize("made", [audits.audit, audits.distributed, audits.nothing])
def test_it_is_of_the_official_schema(made: Any) -> None:
    assert problem(mlbom(made())) == ""
    assert problem(mlbom(made(), certificate=CERTIFICATE, files={"audit.json": "8" * 64})) == ""
    bill = mlbom(made())
    bill["metadata"]["component"]["type"] = "model"
    assert problem(bill)


def test_figures_stand_with_their_intervals() -> None:
    model = mlbom(audits.audit())["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    assert model["name"] == "chat-model-0.5b"
    assert model["hashes"] == [{"alg": "SHA-256", "content": "2" * 64}]
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    found = {(metric["type"], metric["slice"]): metric for metric in metrics}
    largest = found["safeft:largest_single_fall", "refusal"]
    assert largest["value"] == "0.5"
    low, high = largest["confidenceInterval"].values()
    assert float(low) < 0.5 < float(high)
    assert found["safeft:smallest_group", "refusal"]["value"] == "1"
    assert ("safeft:gini", "over-refusal") in found
    none = mlbom(audits.distributed())["metadata"]["component"]["modelCard"]
    kinds = {metric["type"] for metric in none["quantitativeAnalysis"]["performanceMetrics"]}
    assert "safeft:smallest_group" not in kinds  # none was found, and 0 would be a lie


def test_data_sets_are_components_with_hashes() -> None:
    bill = mlbom(audits.audit())
    hashes = {each["bom-ref"]: each["hashes"][0]["content"] for each in bill["components"]}
    assert hashes == {"data:harmful": "3" * 64, "data:benign": "4" * 64}
    assert bill["dependencies"][0]["dependsOn"] == list(hashes)


def test_what_is_no_sha256_is_no_hash() -> None:
    settings = audits.SETTINGS | {"prompts": {"harmful": {"count": 3, "sha256": "unknown"}}}
    bill = mlbom(audits.audit(model={**audits.MODEL, "weights": "b"}, settings=settings))
    assert problem(bill) == ""
    assert "hashes" not in bill["metadata"]["component"]
    assert "hashes" not in bill["components"][0]


def test_map_and_certificate_are_referred_to_by_hash() -> None:
    neurons = NeuronSet.of(tiny_model("llama"), {"model.layers.1.mlp": [3, 7]})
    bill = mlbom(audits.audit(), certificate=CERTIFICATE, neurons=neurons)
    assert problem(bill) == ""
    held, mapped = bill["metadata"]["component"]["externalReferences"]
    assert (held["type"], held["hashes"][0]["content"]) == ("attestation", "6" * 64)
    assert mapped["hashes"][0]["content"] == neurons.hash
    name = mapped["url"].removeprefix("ni:///sha-256;")
    assert base64.urlsafe_b64decode(name + "=").hex() == neurons.hash
    assert "model.layers" not in json.dumps(bill)


def test_it_is_the_same_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    bill = mlbom(audits.audit())
    assert bill["metadata"]["timestamp"] == "2023-11-14T22:13:20Z"
    assert bill == mlbom(audits.audit())
    assert bill["serialNumber"] != mlbom(audits.distributed())["serialNumber"]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(ConfigError, match="SOURCE_DATE_EPOCH='yesterday'"):
        mlbom(audits.audit())
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert mlbom(audits.audit())["metadata"]["timestamp"] > "2024"
