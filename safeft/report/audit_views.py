"""All views of an audit in one folder, written together or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path

from safeft.auditing.compare import compare
from safeft.auditing.result import AuditResult
from safeft.files import sha256, write_together
from safeft.neurons import NeuronSet
from safeft.report.audit_card import audit_card
from safeft.report.audit_page import audit_page
from safeft.report.certified import Certified
from safeft.report.mlbom import mlbom
from safeft.report.sarif import sarif

NAMES = ("audit.json", "audit.html", "MODEL_CARD.md", "bom.cdx.json", "audit.sarif")


def write_all(
    result: AuditResult,
    folder: Path,
    *,
    reveal: bool = False,
    before: AuditResult | None = None,
    certificate: Path | None = None,
    neurons: NeuronSet | None = None,
) -> None:
    """Write the audit's JSON and all its views, under :data:`NAMES`.

    Args:
        result: What was found.
        folder: Made if it is not there; files of these names are replaced.
        reveal: Also say where the neurons are, which is withheld otherwise: it is an attack map.
        before: An audit to compare with: of the base, or of a plain tuning; it and ``result`` with
            where their neurons are.
        certificate: The ``safeft_certificate.json`` of this model.
        neurons: The map of safety neurons, for a reference by its hash.

    Raises:
        ArtefactError: The folder cannot be written, the certificate is none, or an audit to compare
            does not say where its neurons are.
        FingerprintError: The audits to compare are of models of unlike shape.

    Example:
        >>> write_all(result, Path("audited"))  # doctest: +SKIP
    """
    write_together(folder, views(result, reveal, before, certificate, neurons))


def views(
    result: AuditResult,
    reveal: bool,
    before: AuditResult | None,
    certificate: Path | None,
    neurons: NeuronSet | None,
) -> Mapping[str, str]:
    """What :func:`write_all` writes, by name."""
    # The one place that decides; every view shows what the result it is given says.
    shown = result if reveal else result.withheld()
    earlier = before if before is None or reveal else before.withheld()
    changes = None if before is None else compare(before, result)
    if changes is not None and not reveal:
        changes = changes.withheld()
    known = Certified.read(certificate) if certificate is not None else None
    found = {
        "audit.json": _json(shown.to_dict()),
        "audit.html": audit_page(shown, before=earlier, changes=changes, certificate=known),
    }
    hashes = {name: sha256(text.encode()) for name, text in found.items()}
    return found | {
        "MODEL_CARD.md": audit_card(shown, before=earlier, changes=changes, certificate=known),
        "bom.cdx.json": _json(mlbom(shown, certificate=known, neurons=neurons, files=hashes)),
        "audit.sarif": _json(sarif(shown, before=earlier)),
    }


def _json(data: Mapping[str, object]) -> str:
    return json.dumps(data, indent=1) + "\n"
