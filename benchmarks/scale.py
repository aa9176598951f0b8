"""What freezing costs at sizes nobody has at hand: computed from shapes, checked where it can be.

    python benchmarks/scale.py            # tables for 8B, 70B and a large mixture of experts
    python benchmarks/scale.py --check    # and real two-process runs against the same arithmetic

From shapes alone, on the meta device: memory of what is pinned, per process; bytes the mask and
the pin move at each step; bytes processes exchange at each step (none) and at each certificate.
The check trains small models and compares each process's own count of held weights with the
arithmetic's, weight for weight, under DDP, FSDP2 and ZeRO-3; ZeRO-1 and 2 cut a flat buffer of
all parameters, where only the sum over processes is compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
RANKS = (1, 8, 64, 256, 1024)


@dataclass(frozen=True)
class Matrix:
    """A weight with neurons in it, and how many like it the model has."""

    rows: int
    columns: int
    dim: int
    units: tuple[int, ...]
    times: int = 1

    @property
    def held(self) -> int:
        """Held weights in one such matrix."""
        return len(self.units) * (self.columns if self.dim == 0 else self.rows)


def every(count: int, fraction: float) -> tuple[int, ...]:
    """Units at even distances."""
    return tuple(range(0, count, round(1 / fraction)))


def gated(hidden: int, inner: int, times: int, fraction: float) -> list[Matrix]:
    """Gate, up and down of gated MLPs (or of experts)."""
    units = every(inner, fraction)
    reads = Matrix(inner, hidden, 0, units, 2 * times)
    return [reads, Matrix(hidden, inner, 1, units, times)]


MODELS: dict[str, dict[str, Any]] = {
    # hidden, inner, MLPs (layers, or layers times experts), all weights
    "Llama 3 8B": {"hidden": 4096, "inner": 14336, "times": 32, "weights": 8_030_261_248},
    "Llama 3 70B": {"hidden": 8192, "inner": 28672, "times": 80, "weights": 70_553_706_496},
    "Qwen3-235B-A22B (128 experts)": {
        "hidden": 4096, "inner": 1536, "times": 94 * 128, "weights": 235_093_634_560,
    },
}  # fmt: skip


def check_weights() -> None:
    """The two dense models' sizes, off transformers' own classes on the meta device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shapes = {
        "Llama 3 8B": (4096, 14336, 32, 32),
        "Llama 3 70B": (8192, 28672, 80, 64),
    }
    for name, (hidden, inner, layers, heads) in shapes.items():
        config = LlamaConfig(
            vocab_size=128256, hidden_size=hidden, intermediate_size=inner,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8,
        )  # fmt: skip
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        found = sum(parameter.numel() for parameter in model.parameters())
        if found != MODELS[name]["weights"]:
            raise SystemExit(f"{name} has {found} weights, not {MODELS[name]['weights']}")


def part(matrix: Matrix, engine: str, rank: int, ranks: int) -> int:
    """Held weights of one matrix that a process stores, weight for weight."""
    if engine == "ddp":
        return matrix.held
    if engine == "fsdp2":  # chunks of rows, as torch.chunk cuts them
        chunk = -(-matrix.rows // ranks)
        first, last = min(rank * chunk, matrix.rows), min((rank + 1) * chunk, matrix.rows)
        if matrix.dim == 0:
            return sum(first <= unit < last for unit in matrix.units) * matrix.columns
        return (last - first) * len(matrix.units)
    chunk = -(-matrix.rows * matrix.columns // ranks)  # ZeRO-3: ranges of the flattened matrix
    first = min(rank * chunk, matrix.rows * matrix.columns)
    last = min(first + chunk, matrix.rows * matrix.columns)
    if matrix.dim == 0:
        edges = ((u * matrix.columns, (u + 1) * matrix.columns) for u in matrix.units)
        return sum(max(0, min(last, high) - max(first, low)) for low, high in edges)

    def before(end: int) -> int:
        row, column = divmod(end, matrix.columns)
        return row * len(matrix.units) + sum(unit < column for unit in matrix.units)

    return before(last) - before(first)


def most(matrix: Matrix, engine: str, ranks: int) -> float:
    """Held weights of one matrix in the process that has most; ZeRO-1 and 2: on average."""
    if engine in ("zero1", "zero2"):
        return matrix.held / ranks
    if engine == "ddp":
        return matrix.held
    probes = {0, ranks // 2, max(0, ranks - 2)}
    return max(part(matrix, engine, rank, ranks) for rank in probes)


def cost(matrices: list[Matrix], engine: str, ranks: int) -> dict[str, float]:
    """Bytes, per process. Masters are float32 (4 bytes); gradients and live weights bfloat16."""
    pinned = sum(most(m, engine, ranks) * m.times for m in matrices)
    held = sum(m.held * m.times for m in matrices)
    whole = sum(m.rows * m.columns * m.times for m in matrices)
    master = 2 if engine == "ddp" else 4
    gradient = 4 if engine == "fsdp2" else 2
    if engine.startswith("zero"):
        masked = 2 * gradient * whole + gradient * held  # out of place: read, write, and fill
    else:
        masked = gradient * pinned
    indices = sum(8 * len(m.units) * m.times for m in matrices)
    largest = max(m.held for m in matrices)
    return {
        "pinned_bytes": master * pinned,
        "index_bytes": 2 * indices,
        "mask_bytes_per_microbatch": masked,
        "pin_bytes_per_step": 2 * master * pinned,
        "sent_per_step": 0,
        "sent_per_certificate": 0 if engine in ("ddp", "zero1", "zero2") else 2 * held,
        "largest_certificate_buffer": 4 * largest,
    }


def tables(fraction: float) -> Iterator[dict[str, Any]]:
    """Every model, engine and number of processes."""
    for name, shape in MODELS.items():
        matrices = gated(shape["hidden"], shape["inner"], shape["times"], fraction)
        held = sum(m.held * m.times for m in matrices)
        for engine in ENGINES:
            for ranks in RANKS:
                yield {
                    "model": name,
                    "engine": engine,
                    "processes": ranks,
                    "held_share": held / shape["weights"],
                    **cost(matrices, engine, ranks),
                }


def measured() -> list[dict[str, Any]]:
    """Two real processes: what each says it holds, beside the arithmetic."""
    from tests.engine_cell import Cell
    from tests.engines import launch

    rows = []
    for hidden, inner, layers in ((32, 48, 2), (64, 201, 3)):
        shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
        matrices = gated(hidden, inner, layers, 0.05)
        for engine in ENGINES:
            cell = Cell("cell", set="share", shape=shape, settings={"max_steps": 1})
            with TemporaryDirectory() as place:
                (report, _) = launch(engine, Path(place), [cell])["cell"]
            said = [entry["weights"] for entry in report["run"]["parts"]]
            told = [sum(part(m, engine, r, 2) * m.times for m in matrices) for r in range(2)]
            if engine in ("zero1", "zero2"):
                said, told = [sum(said)], [sum(m.held * m.times for m in matrices)]
            rows.append({"engine": engine, "shape": shape, "measured": said, "computed": told})
            if said != told:
                raise SystemExit(f"the arithmetic is wrong: {rows[-1]}")
    return rows


def main() -> None:
    """Compute, check, save, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/scale.json")
    given = parser.parse_args()
    check_weights()
    rows = list(tables(given.fraction))
    found: dict[str, Any] = {
        "command": "python benchmarks/scale.py --check",
        "fraction": given.fraction,
        "rows": rows,
    }
    if given.check:
        found["checked"] = measured()
    elif given.output.is_file():
        found["checked"] = json.loads(given.output.read_text()).get("checked", [])
    given.output.write_text(json.dumps(found, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['model']:<30} {row['engine']:<6} {row['processes']:>5}  "
            f"pinned {row['pinned_bytes'] / 2**20:>9.1f} MiB  "
            f"mask {row['mask_bytes_per_microbatch'] / 2**30:>7.2f} GiB  "
            f"certificate {row['sent_per_certificate'] / 2**30:>6.2f} GiB"
        )


if __name__ == "__main__":
    main()
