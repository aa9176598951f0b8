"""What certifies a running training: held slices against what they were at its start."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safeft.blocks import count_of, form_of
from safeft.errors import FreezeError
from safeft.freeze.certificate import (
    Certificate,
    Violation,
    bytes_hash,
    describe_set,
    describe_subspace,
    differences,
    off_directions,
)
from safeft.freeze.plan import Plan, Slice
from safeft.neurons import NeuronSet
from safeft.processes import from_first, gathered, rank, ranks
from safeft.shards import keeper, read
from safeft.subspace import SafetySubspace
from safeft.weights import ModelWeights

_CAST_TO = (torch.float32, torch.bfloat16, torch.float16)


class Certifier:
    """Compares a plan's slices with the base, by hash; no second copy of them is kept.

    Make it while the model holds its base weights; those of process 0 count.

    Args:
        plan: What is held, on the model as it is now.
        model: The model.
        neurons: The set, for the certificate.
        subspace: The subspace, likewise.
        casts: The engine may store weights in another dtype than they were loaded in (FSDP2 trains
            in float32, DeepSpeed computes in bfloat16): hash the base in each of them.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        neurons: NeuronSet | None,
        subspace: SafetySubspace | None = None,
        *,
        casts: bool = False,
    ) -> None:
        self._plan = plan
        self._neurons = {} if neurons is None else describe_set(neurons)
        self._subspace = {} if subspace is None else describe_subspace(subspace)
        self._weights = ModelWeights(model)
        self._base: list[dict[str, str]] = []
        self._shared = False
        if rank() == 0 or any(keeper(p) != "plain" for p in model.parameters()):
            self._base = [self._base_hashes(piece, casts) for piece in plan.slices]

    def certify(
        self,
        run: Mapping[str, Any],
        plan: Plan | None = None,
        part: Mapping[str, Any] | None = None,
        directions: Sequence[Mapping[str, Any]] = (),
    ) -> Certificate:
        """The certificate as of now. Every process must call it; they must agree.

        Args:
            run: What the run says about itself.
            plan: The plan on the parameters as they are trained now, where an engine has put
                others in the place of the model's.
            part: What this process says of the part it stores (see :meth:`Pin.report`).
            directions: What is said of held directions (see :meth:`DirectionPin.report`).
        """
        plan = plan or self._plan
        if not self._shared:
            self._base, self._shared = from_first(self._base), True
        slices, violations = [], []
        for piece, base in zip(plan.slices, self._base, strict=True):
            values = self._read(piece)
            dtype, now = str(values.dtype).removeprefix("torch."), bytes_hash([values])
            was = base.get(dtype, next(iter(base.values())))
            slices.append(
                {
                    "tensor": piece.name,
                    "axis": piece.axis,
                    "count": len(piece.entries) if piece.entries is not None else "all",
                    "dtype": dtype,
                    "sha256_base": was,
                    "sha256_now": now,
                }
            )
            if now != was:
                violations.append(Violation(piece.name, "", piece.axis))
        violations += [*_moved_factors(plan), *off_directions(directions)]
        hashes = gathered([piece["sha256_now"] for piece in slices])
        parts = [theirs for theirs in gathered(part) if theirs is not None]
        if differing := [n for n, theirs in enumerate(hashes) if theirs != hashes[0]]:
            violations.append(Violation(f"ranks {differing}", "", "rows"))
        if moved := [n for n, theirs in enumerate(parts) if not theirs["exact"]]:
            violations.append(Violation(f"optimizer's copy on ranks {moved}", "", "rows"))
        return Certificate(
            not violations,
            tuple(violations),
            plan.mode,
            self._neurons,
            tuple(slices),
            plan.frozen_share,
            {**run, "parts": parts} if ranks() > 1 else dict(run),
            self._subspace,
            tuple(directions),
        )

    def _read(self, piece: Slice) -> Tensor:
        entries = piece.entries
        if entries is None:
            shape = self._weights.shape(piece.name)
            assert shape is not None
            entries = torch.arange(count_of(form_of(shape), "rows"))
        return self._weights.read(piece.name, piece.axis, entries)

    def _base_hashes(self, piece: Slice, casts: bool) -> dict[str, str]:
        values = self._read(piece)
        dtypes = dict.fromkeys((values.dtype, *(_CAST_TO if casts else ())))
        return {str(d).removeprefix("torch."): bytes_hash([values.to(d)]) for d in dtypes}


def _moved_factors(plan: Plan) -> list[Violation]:
    """Adapter factors that should be zero where the neurons are."""
    found = []
    for hold in plan.holds:
        if not hold.at_zero:
            continue
        values = read(hold.parameter, hold.axis, hold.entries, hold.form).cpu()
        for entry, changed, gap in differences(torch.zeros_like(values), values):
            index = int(hold.entries[entry])
            found.append(Violation(hold.name, "", hold.axis, index, changed, gap))
    return found


def demand_exact(certificate: Certificate, when: str) -> None:
    """Stop a training whose certificate does not hold.

    Raises:
        FreezeError: It is not exact.
    """
    if not certificate.exact:
        raise FreezeError(
            f"What is held is not where the base has it {when}:\n"
            f"{certificate.summary()}\n"
            "Something else writes to these weights: another callback, a merge, an averaging of "
            "weights, or a checkpoint from before they were frozen (load_best_model_at_end). Do "
            "not use this model as one whose safety was held."
        )
