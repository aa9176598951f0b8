"""An audit as a machine-learning bill of materials: CycloneDX 1.6, JSON.

Source: CycloneDX v1.6 (ECMA-424), https://cyclonedx.org/docs/1.6/json/.
"""

import base64
import json
import math
import os
import re
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from safeft import __version__
from safeft.auditing.result import AuditResult
from safeft.errors import ConfigError
from safeft.neurons import NeuronSet
from safeft.report.audit_words import LIMITS, Figure, data_sets, figures, places
from safeft.report.certified import Certified

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_SPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:safeft:mlbom")


def mlbom(
    result: AuditResult,
    *,
    certificate: Certified | None = None,
    neurons: NeuronSet | None = None,
    files: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The bill: the model with its audit as a model card, data sets, and references by hash.

    With ``SOURCE_DATE_EPOCH`` set, time and serial number are the same at every run
    (https://reproducible-builds.org/specs/source-date-epoch/).

    Args:
        result: What was found. No neuron is named in the bill, whether the result says where they
            are or not.
        certificate: Referred to by its hash.
        neurons: The map of safety neurons, referred to by its hash and never by its content.
        files: SHA-256 of what is written beside the bill, by name (``audit.json``).

    Raises:
        ConfigError: ``SOURCE_DATE_EPOCH`` is no number of seconds.

    Example:
        >>> mlbom(result)["specVersion"]  # doctest: +SKIP
        '1.6'
    """
    known = data_sets(result.settings)
    bill: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": _now().strftime("%Y-%m-%dT%H:%M:%SZ"),
            "tools": {
                "components": [
                    {"type": "application", "name": "safeft", "version": __version__},
                ]
            },
            "component": _model(result, certificate, neurons, files or {}),
        },
        "components": [_data_set(name, each) for name, each in known.items()],
        "dependencies": [
            {"ref": "model", "dependsOn": [_ref(name) for name in known]},
            *({"ref": _ref(name)} for name in known),
        ],
    }
    # From the content, so that the same bill has the same number and any change another.
    content = json.dumps(bill, sort_keys=True, default=str)
    return {**bill, "serialNumber": f"urn:uuid:{uuid.uuid5(_SPACE, content)}"}


def _now() -> datetime:
    asked = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        return datetime.now(UTC) if not asked else datetime.fromtimestamp(int(asked), UTC)
    except (ValueError, OverflowError, OSError) as error:
        raise ConfigError(
            f"SOURCE_DATE_EPOCH={asked!r} is no number of seconds since 1970 ({error}), so the "
            "bill of materials has no date. Correct it or unset it."
        ) from error


def _model(
    result: AuditResult,
    certificate: Certified | None,
    neurons: NeuronSet | None,
    files: Mapping[str, str],
) -> dict[str, Any]:
    name, weights = result.model["name_or_path"], result.model["weights"]
    found: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name.rstrip("/").rsplit("/", 1)[-1] or name,
        "description": f"{name}, audited by safeft: {result.verdict}. {result.reason}",
        "modelCard": {
            "modelParameters": {
                "task": "text-generation",
                "architectureFamily": "transformer",
                "modelArchitecture": result.model["type"],
                "datasets": [{"ref": _ref(each)} for each in data_sets(result.settings)],
            },
            "quantitativeAnalysis": {
                "performanceMetrics": [
                    _metric(each)
                    for each in figures(result)
                    if each.value is not None and math.isfinite(each.value)
                ]
            },
            "considerations": {
                "useCases": ["Gating a release on how concentrated refusal is."],
                "technicalLimitations": list(LIMITS),
                "ethicalConsiderations": [
                    {
                        "name": "A map of the neurons that refusal rests on serves attackers too.",
                        "mitigationStrategy": places(result) or "No neuron is named.",
                    }
                ],
            },
        },
        "externalReferences": [
            *_written(files),
            *([_of_certificate(certificate)] if certificate else []),
            *([_map(neurons)] if neurons is not None else []),
        ],
        "properties": _properties(result),
    }
    if _SHA256.fullmatch(weights):
        found["version"] = weights[:12].lower()
        found["hashes"] = _hashes(weights)
    return found


def _metric(figure: Figure) -> dict[str, Any]:
    metric: dict[str, Any] = {
        "type": f"safeft:{figure.key}",
        "value": f"{figure.value:.6g}",
        "slice": figure.about,
    }
    if figure.interval is not None:
        low, high = figure.interval.low, figure.interval.high
        metric["confidenceInterval"] = {"lowerBound": f"{low:.6g}", "upperBound": f"{high:.6g}"}
    return metric


def _ref(data_set: str) -> str:
    return f"data:{data_set}"


def _data_set(name: str, known: Mapping[str, Any]) -> dict[str, Any]:
    count = known.get("count")
    what = "Prompts of the audit" if count is None else f"{count} prompts of the audit"
    found: dict[str, Any] = {
        "type": "data",
        "bom-ref": _ref(name),
        "name": f"{name} prompts",
        "description": f"{what}: {name}.",
        "data": [{"type": "dataset", "name": name}],
    }
    if _SHA256.fullmatch(str(known["sha256"])):
        found["hashes"] = _hashes(str(known["sha256"]))
    return found


def _hashes(sha256: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256.lower()}]


def _written(files: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "type": "dynamic-analysis-report",
            "url": name,
            "comment": "The audit, beside this bill.",
            "hashes": _hashes(sha256),
        }
        for name, sha256 in files.items()
    ]


def _of_certificate(certificate: Certified) -> dict[str, Any]:
    return {
        "type": "attestation",
        "url": quote(certificate.name),
        "comment": certificate.summary,
        "hashes": _hashes(certificate.sha256),
    }


def _map(neurons: NeuronSet) -> dict[str, Any]:
    """By name of its hash alone (RFC 6920): whoever holds the map can tell that it is this one."""
    name = base64.urlsafe_b64encode(bytes.fromhex(neurons.hash)).decode().rstrip("=")
    return {
        "type": "other",
        "url": f"ni:///sha-256;{name}",
        "comment": f"The map of {len(neurons)} safety neurons, kept apart and not part of this.",
        "hashes": _hashes(neurons.hash),
    }


def _properties(result: AuditResult) -> list[dict[str, str]]:
    thresholds = result.thresholds
    found = {
        "verdict": result.verdict,
        "revealed": result.revealed,
        "units": result.units,
        "layout": result.model["layout"],
        "weights": result.model["weights"],
        "threshold:halved": thresholds.halved,
        "threshold:few": thresholds.few,
        "threshold:broken": thresholds.broken,
        "threshold:confidence": thresholds.confidence,
        **{f"setting:{name}": value for name, value in result.settings.items()},
    }
    return [
        {"name": f"safeft:{name}", "value": value if isinstance(value, str) else json.dumps(value)}
        for name, value in found.items()
    ]
