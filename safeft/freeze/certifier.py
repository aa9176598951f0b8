"""What certifies a running training: held slices against what they were at its start."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from safeft.errors import FreezeError
from safeft.freeze.certificate import (
    Certificate,
    Violation,
    bytes_hash,
    describe_set,
    differences,
)
from safeft.freeze.plan import Plan, Slice
from safeft.neurons import NeuronSet
from safeft.sites import plain_model
from safeft.weights import ModelWeights


class Certifier:
    """Compares a plan's slices with the base, by hash; no second copy of them is kept.

    Make it while the model holds its base weights.
    """

    def __init__(self, plan: Plan, model: nn.Module, neurons: NeuronSet) -> None:
        self._plan, self._neurons = plan, neurons
        self._weights = ModelWeights(plain_model(model))
        self._base = [self._hash(piece) for piece in plan.slices]

    def certify(self, run: Mapping[str, Any]) -> Certificate:
        """The certificate as of now. Under DDP every rank must call it; they must agree."""
        slices, violations = [], []
        for piece, base in zip(self._plan.slices, self._base, strict=True):
            now = self._hash(piece)
            count = len(piece.entries) if piece.entries is not None else "all"
            slices.append(
                {
                    "tensor": piece.name,
                    "axis": piece.axis,
                    "count": count,
                    "sha256_base": base,
                    "sha256_now": now,
                }
            )
            if now != base:
                violations.append(Violation(piece.name, "", piece.axis))
        violations += self._moved_factors()
        if disagreeing := _ranks_that_disagree([s["sha256_now"] for s in slices]):
            violations.append(Violation(f"ranks {disagreeing}", "", "rows"))
        return Certificate(
            not violations,
            tuple(violations),
            self._plan.mode,
            describe_set(self._neurons),
            tuple(slices),
            self._plan.frozen_share,
            dict(run),
        )

    def _hash(self, piece: Slice) -> str:
        entries = piece.entries
        if entries is None:
            entries = torch.arange((self._weights.shape(piece.name) or (0,))[0])
        return bytes_hash([self._weights.read(piece.name, piece.axis, entries)])

    def _moved_factors(self) -> list[Violation]:
        """Adapter factors that should be zero where the neurons are."""
        found = []
        for hold in self._plan.holds:
            if not hold.at_zero:
                continue
            values = hold.parameter.detach().cpu().index_select(hold.dim, hold.entries)
            values = values if hold.dim == 0 else values.T.contiguous()
            for entry, changed, gap in differences(torch.zeros_like(values), values):
                index = int(hold.entries[entry])
                found.append(Violation(hold.name, hold.site, hold.axis, index, changed, gap))
        return found


def demand_exact(certificate: Certificate, when: str) -> None:
    """Stop a training whose certificate does not hold.

    Raises:
        FreezeError: It is not exact.
    """
    if not certificate.exact:
        raise FreezeError(
            f"The frozen neurons are not bit-identical to the base {when}:\n"
            f"{certificate.summary()}\n"
            "Something else writes to these weights: another callback, a merge, an averaging of "
            "weights, or a checkpoint from before they were frozen (load_best_model_at_end). Do "
            "not use this model as one whose safety neurons were kept."
        )


def _ranks_that_disagree(hashes: list[str]) -> list[int]:
    """Ranks whose frozen slices differ from rank 0's; under DDP all must agree."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, hashes)
    return [rank for rank, theirs in enumerate(gathered) if theirs != gathered[0]]
