"""One rank of monitored trainings under an engine: `torchrun monitor_worker.py ENGINE FOLDER`.

Trains without a monitor, with one, and with one that stops and (but for ZeRO) rolls back; each
rank writes what it saw to `FOLDER/rank<N>.json`, the first also the models, as saved.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.integrations.deepspeed import unset_hf_deepspeed_config  # noqa: E402

from safeft import SafetyMonitorCallback  # noqa: E402
from safeft.demo import world  # noqa: E402
from safeft.errors import SafeftError  # noqa: E402
from tests import fsdp_on_cpu  # noqa: E402
from tests.ending import end  # noqa: E402
from tests.engine_cell import Cell  # noqa: E402
from tests.engine_worker import Watch, allow_bf16_on_cpu, engine_settings  # noqa: E402
from tests.freezing import trainer_of  # noqa: E402
from tests.monitoring import monitor, neurons_of, refusing  # noqa: E402


class Seen(Watch):
    """What the parameters are while the optimizer's work is done; FSDP2 may leave them gathered."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        model = kwargs["model"]
        self.seen["gathered"] = sum(type(p.data) is torch.Tensor for p in model.parameters())


def train(engine: str, home: Path, watch: Any, base: Any = None, **settings: Any) -> dict[str, Any]:
    """One training and what this rank saw of it."""
    unset_hf_deepspeed_config()
    home.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model, engine_is = base or refusing(attention_dropout=0.2), Seen()
    callbacks: list[Any] = [engine_is]
    if watch is not None:
        callbacks.insert(0, watch(neurons_of(model)))
    chosen: dict[str, Any] = {"max_steps": 4, "learning_rate": 1e-3, "weight_decay": 0.1}
    chosen |= engine_settings(engine, Cell("monitored"), home) | settings
    try:
        trainer = trainer_of("Trainer", model, home / "run", callbacks, **chosen)
        engine_is.trainer = trainer
        trainer.train()
    except SafeftError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    trainer.save_model(str(home / "tuned"))
    report = {
        **engine_is.seen,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "steps": trainer.state.global_step,
    }
    if watch is not None:
        record = callbacks[0].record
        report |= {
            "looks": [asdict(look) for look in record.looks],
            "final": asdict(record.final),
            "back": record.rolled_back_to,
            "openings": callbacks[0].to_dict()["openings"],
        }
    return report


def main(engine: str, folder: Path) -> None:
    if engine == "fsdp2":
        fsdp_on_cpu.allow()
    if engine.startswith("zero"):
        allow_bf16_on_cpu()

    def stopping(neurons: Any) -> Any:
        return monitor(neurons=neurons, every=1, stop_below=0.9, roll_back=True)

    def watching(neurons: Any) -> Any:
        return monitor(neurons=neurons)

    def demo_monitor(neurons: Any) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(world.MODEL_PATH)
        return SafetyMonitorCallback(world.harmful("test")[:8], tokenizer=tokenizer)

    found = {
        "without": train(engine, folder / "without", None),
        "with": train(engine, folder / "with", watching),
        "stopped": train(engine, folder / "stopped", stopping, max_steps=20, learning_rate=3e-3),
    }
    unset_hf_deepspeed_config()
    demo = AutoModelForCausalLM.from_pretrained(world.MODEL_PATH, dtype=torch.float32)
    found["demo"] = train(engine, folder / "demo", demo_monitor, demo, max_steps=1)
    back = found["stopped"].get("back") or 1
    found["good"] = train(engine, folder / "good", None, max_steps=back, learning_rate=3e-3)
    (folder / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    end()
