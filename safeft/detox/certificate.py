"""What a fold changed, proven from the weights: scaled lines exactly so, all else bit-identical."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safeft.blocks import Axis, count_of, form_of
from safeft.detox.dampener import Dampener
from safeft.detox.folding import Lines, lines_of
from safeft.errors import ArtefactError
from safeft.files import write_whole
from safeft.freeze.certificate import Violation, bytes_hash, differences
from safeft.freeze.verify import model_of_shapes
from safeft.progress import progress
from safeft.sites import plain_model
from safeft.weights import CheckpointWeights, ModelWeights, Weights

CERTIFICATE_NAME = "safeft_fold_certificate.json"
_ROWS = 4096


@dataclass(frozen=True)
class FoldCertificate:
    """Whether a folded model is its base with the gains in it, and nothing else.

    Attributes:
        exact: Scaled rows and columns are base times gain, rounded once; every other weight is
            bit-identical.
        violations: What is neither, a row or column each.
        scaled: Per weight that was to change: name, axis, how many lines, and the SHA-256 of the
            whole weight in the base and now.
        untouched: How many weights were to stay whole, and the SHA-256 over all of them, twice.
        dampener: Hash, number of units, rule and strength.
        run: The two places compared.
    """

    exact: bool
    violations: tuple[Violation, ...]
    scaled: tuple[Mapping[str, Any], ...]
    untouched: Mapping[str, Any]
    dampener: Mapping[str, Any]
    run: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"safeft_fold_certificate": 1, **asdict(self)}

    def save(self, folder: str | Path) -> None:
        """Write it whole into the folded model's folder."""
        write_whole(Path(folder) / CERTIFICATE_NAME, json.dumps(self.to_dict(), indent=2) + "\n")

    def summary(self) -> str:
        """One line, and what violates."""
        lines = sum(int(each["count"]) for each in self.scaled)
        verdict = "EXACT" if self.exact else "VIOLATED"
        head = (
            f"{verdict}: {self.dampener['units']} units dampened by {lines} scaled rows and "
            f"columns of {len(self.scaled)} weights; {self.untouched['count']} others compared bit "
            "by bit."
        )
        return "\n".join([head, *(f"  {violation}" for violation in self.violations[:5])])


@torch.no_grad()
def certify_fold(
    base: str | Path | nn.Module, folded: str | Path | nn.Module, dampener: Dampener
) -> FoldCertificate:
    """Compare a folded model with its base, weight by weight.

    Args:
        base: Folder of the base in safetensors (or the name of a model in the hub's cache), or a
            model in memory.
        folded: Likewise. Where it has another dtype, base and product are rounded into it.
        dampener: What was folded in.

    Raises:
        ArtefactError: A folder without weights, or with other weights than the base.
        FingerprintError: The dampener was made for a model of other names or shapes.

    Example:
        >>> certify_fold("base", "detoxed", dampener).exact  # doctest: +SKIP
        True
    """
    with ExitStack() as files:
        shapes, before = _open(base, files)
        dampener.neurons.check_model(shapes, weights_too=False)
        after = _open(folded, files)[1]
        lines = lines_of(shapes, dampener)
        names = before.names()
        if missing := sorted({*names, *lines} ^ {*after.names()}):
            raise ArtefactError(
                f"Base and folded model have other weights ({', '.join(missing[:3])}); one was not "
                "made from the other. Give the base that was folded."
            )
        scaled, violations = [], []
        digests: tuple[list[str], list[str]] = ([], [])
        for name in progress(names, "comparing weights", len(names)):
            hashes, wrong = _compare(name, lines.get(name), before, after)
            violations += wrong
            if (mine := lines.get(name)) is None:
                digests[0].append(hashes[0])
                digests[1].append(hashes[1])
                continue
            scaled.append({"tensor": name, "axis": mine.axis, "count": len(mine.entries),
                           "sha256_base": hashes[0], "sha256_now": hashes[1]})  # fmt: skip
    source = dampener.neurons.source
    return FoldCertificate(
        not violations,
        tuple(violations),
        tuple(scaled),
        {"count": len(digests[0]), "sha256_base": _joined(digests[0]),
         "sha256_now": _joined(digests[1])},
        {"sha256": dampener.hash, "units": len(dampener), "rule": source.get("rule"),
         "strength": source.get("strength")},
        {"base": _describe(base), "folded": _describe(folded)},
    )  # fmt: skip


def _compare(
    name: str, lines: Lines | None, before: Weights, after: Weights
) -> tuple[tuple[str, str], list[Violation]]:
    """Hashes of the weight as it was and is, and the rows that are not what they have to be."""
    shape = before.shape(name) or ()
    if after.shape(name) != shape:
        raise ArtefactError(
            f"{name} has shape {shape} in the base and {after.shape(name)} in the folded model: "
            "one was not made from the other."
        )
    axis: Axis = "rows" if lines is None or lines.axis == "columns" else lines.axis
    hashes: tuple[list[str], list[str]] = ([], [])
    violations = []
    for rows in torch.arange(count_of(form_of(shape, axis), axis)).split(_ROWS):
        was, now = (weights.read(name, axis, rows) for weights in (before, after))
        hashes[0].append(bytes_hash([was]))
        hashes[1].append(bytes_hash([now]))
        wanted = _wanted(was.to(now.dtype), rows, lines, shape)
        violations += [
            Violation(name, "", axis, int(rows[entry]), changed, gap)
            for entry, changed, gap in differences(wanted, now)
        ]
    return (_joined(hashes[0]), _joined(hashes[1])), violations


def _wanted(values: Tensor, rows: Tensor, lines: Lines | None, shape: tuple[int, ...]) -> Tensor:
    """What rows of the base have to have become."""
    if lines is None:
        return values
    form = form_of(shape, lines.axis)
    gains = torch.ones(count_of(form, lines.axis))
    gains[lines.entries] = lines.gains
    moved = torch.zeros_like(gains, dtype=torch.bool)
    moved[lines.entries] = True
    if lines.axis == "columns":  # those of each row's own matrix of the stack
        matrix = rows.div(form[1], rounding_mode="floor")
        gain, is_moved = (each.view(form[0], form[2])[matrix] for each in (gains, moved))
    else:
        gain, is_moved = (each[rows].view(-1, *[1] * (values.ndim - 1)) for each in (gains, moved))
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return torch.where(is_moved, (wide * gain.to(wide)).to(values.dtype), values)


def _open(place: str | Path | nn.Module, files: ExitStack) -> tuple[nn.Module, Weights]:
    """A model of the right shapes, and weights under its own names."""
    if isinstance(place, nn.Module):
        return plain_model(place), ModelWeights(place)
    folder = Path(place)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(place), local_files_only=True))
        except (OSError, ValueError) as error:
            raise ArtefactError(
                f"{str(place)!r} is neither a folder nor in the hub's cache. Give the folder of a "
                "saved model."
            ) from error
    shapes: Any = model_of_shapes(folder)
    stored = files.enter_context(CheckpointWeights(folder))
    names = {name for name, _ in shapes.named_parameters()}
    if names == {*stored.names()}:
        return shapes, stored
    # Transformers saves some models under other names than their own, and puts them right itself.
    return shapes, ModelWeights(type(shapes).from_pretrained(folder, dtype="auto"))


def _chunks(values: list[str]) -> Iterator[Tensor]:
    yield torch.tensor(list("".join(values).encode()), dtype=torch.uint8)


def _joined(hashes: list[str]) -> str:
    return hashes[0] if len(hashes) == 1 else bytes_hash(_chunks(hashes))


def _describe(place: str | Path | nn.Module) -> str:
    return type(place).__name__ if isinstance(place, nn.Module) else str(place)
