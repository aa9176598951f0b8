"""One rank of a real two-process training: `torchrun --nproc_per_node 2 ddp_worker.py DIR`.

Each rank writes what it saw to `DIR/TUNING/rank<N>.json`; tests/test_ddp.py reads that.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)

from transformers import TrainerCallback  # noqa: E402

from tests.freezing import (  # noqa: E402
    LARGE,
    changed_frozen,
    freeze,
    frozen_entries,
    least_moved,
    lora,
    model_of,
    state_of,
    trainer_of,
)


class Watch(TrainerCallback):
    """What the run itself says about its engine."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.seen: dict[str, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen = {
            "world_size": args.world_size,
            "distributed_type": str(self.trainer.accelerator.distributed_type.value),
            "wrapper": type(self.trainer.model_wrapped).__name__,
            "backend": torch.distributed.get_backend(),
        }


def train(tuning: str, folder: Path) -> None:
    model = model_of()
    base = state_of(model)
    callback, watch = freeze(model, LARGE), Watch()
    trainer = trainer_of(
        "Trainer",
        model,
        folder / "run",
        [callback, watch],
        peft_config=lora() if tuning == "lora" else None,
        max_steps=3,
        gradient_accumulation_steps=2,
        learning_rate=2e-2,
        weight_decay=0.1,
        save_strategy="steps",
        save_steps=2,
    )
    watch.trainer = trainer
    trainer.train()
    trainer.save_model(str(folder / "tuned"))

    now = state_of(trainer.model)
    masks = frozen_entries(base, LARGE, "freeze")
    free = {name: mask for name, mask in masks.items() if tuning == "full" or "_proj" in name}
    free.pop("model.embed_tokens.weight", None)
    certificate, certifier = callback.certificate, callback._certifier
    assert certificate is not None
    assert certifier is not None
    rank = trainer.args.process_index
    report = {
        **watch.seen,
        "changed": changed_frozen(base, now, masks),
        "least_moved": least_moved(base, now, free)[0],
        "exact": certificate.exact,
        "run": dict(certificate.run),
        "sum": sum(float(weight.double().sum()) for weight in now.values()),
        "scalars": [row for row in trainer.state.log_history if "safeft/frozen_share" in row],
    }
    if rank == 1:
        with torch.no_grad():
            dict(model.named_parameters())["model.norm.weight"].add_(1)  # held by nobody
    report["exact_after_free_change"] = certifier.certify({}).exact
    if rank == 1:
        part = next(
            p for n, p in model.named_parameters() if "0.mlp.up_proj" in n and "lora" not in n
        )
        with torch.no_grad():
            part[LARGE["model.layers.0.mlp"][0]].add_(1)
    report["violations_after_change"] = [str(v) for v in certifier.certify({}).violations]
    (folder / f"rank{rank}.json").write_text(json.dumps(report))


def main(folder: Path) -> None:
    for tuning in ("full", "lora"):
        (folder / tuning).mkdir(exist_ok=True)
        train(tuning, folder / tuning)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
