"""One rank of a real training under an engine: `torchrun engine_worker.py ENGINE FOLDER CELLS`.

CELLS is a JSON list of the fields of tests/engine_cell.py; each rank writes what it saw to
`FOLDER/CELL/rank<N>.json`. What is compared is what the run saved to disk, read by transformers
and PEFT, against slices written down by hand in tests/freezing.py.
"""

import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)

from peft import PeftModel  # noqa: E402
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save  # noqa: E402
from transformers import AutoModelForCausalLM, TrainerCallback, training_args  # noqa: E402
from transformers.integrations.deepspeed import unset_hf_deepspeed_config  # noqa: E402

from safeft import SafetyFreezeCallback  # noqa: E402
from safeft.errors import SafeftError  # noqa: E402
from safeft.freeze import pin as pin_module  # noqa: E402
from safeft.freeze.direction_pin import DirectionPin  # noqa: E402
from safeft.freeze.resume import last_complete  # noqa: E402
from tests import fsdp_on_cpu  # noqa: E402
from tests.ending import end  # noqa: E402
from tests.engine_cell import Cell  # noqa: E402
from tests.families import FAMILIES  # noqa: E402
from tests.family import Family  # noqa: E402
from tests.freezing import (  # noqa: E402
    LARGE,
    SMALL,
    arguments,
    freeze,
    frozen_entries,
    lora,
    model_of,
    same_bits,
    state_of,
    trainer_of,
)
from tests.layouts import chosen_of, lora_on, masks_of  # noqa: E402
from tests.spans import product_changes, subspace_of  # noqa: E402

SETS: dict[str, Any] = {"small": SMALL, "large": LARGE}


def family_of(cell: Cell) -> Family:
    return next(family for family in FAMILIES if family.name == cell.family)


def base_of(cell: Cell) -> Any:
    """The model before training, the same in every process."""
    if cell.family:
        return family_of(cell).build().to(getattr(torch, cell.dtype))
    return model_of(getattr(torch, cell.dtype), **(cell.shape or {}))


def indices_of(cell: Cell) -> dict[str, tuple[int, ...]]:
    """The neurons a cell freezes: ``share`` is every twentieth hidden unit of the whole model."""
    if cell.family:
        return chosen_of(family_of(cell))
    if cell.set == "share":
        shape = cell.shape or {}
        units = range(0, shape["intermediate_size"], 20)
        layers = range(shape["num_hidden_layers"])
        return {f"model.layers.{layer}.mlp": tuple(units) for layer in layers}
    return {"model.layers.0.mlp": (1, 7)} if cell.aside else SETS[cell.set or "large"]


class Watch(TrainerCallback):
    """What the run itself says about its engine."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.seen: dict[str, Any] = {}
        self.begun = 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.begun)
        distributed = torch.distributed.is_initialized()
        parameter = next(p for p in self.trainer.model.parameters() if p.requires_grad)
        self.seen = {
            "world_size": torch.distributed.get_world_size() if distributed else 1,
            "distributed_type": str(self.trainer.accelerator.distributed_type.value),
            "wrapper": type(self.trainer.model_wrapped).__name__,
            "parameter": type(parameter.data).__name__,
            "partitioned": hasattr(parameter, "ds_tensor"),
            "checkpoint_wrappers": sum(
                "checkpoint_wrapped" in name for name, _ in self.trainer.model.named_parameters()
            ),
            "backend": torch.distributed.get_backend() if distributed else None,
        }


class Killer(TrainerCallback):
    """SIGKILL, the way a cluster takes a node: after a step, or in the middle of a save."""

    def __init__(self, when: str, step: int, rank: int) -> None:
        self.when, self.step = when, step
        self.mine = rank in (-1, int(os.environ.get("RANK", "0")))

    def strike(self) -> None:
        if self.mine:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)  # the launcher ends the others; none may get further than this

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.when == "between" and state.global_step == self.step:
            self.strike()

    def within(self, trainer: Any) -> Any:
        """The trainer's save, cut off after the weights and half of the optimizer's file."""
        save = trainer._save_optimizer_and_scheduler

        def cut(folder: str) -> None:
            if trainer.state.global_step == self.step:
                (Path(folder) / "optimizer.pt").write_bytes(b"PK half of an archive")
                self.strike()
            save(folder)

        trainer._save_optimizer_and_scheduler = cut


class Toggle(TrainerCallback):
    """Blocks of steps without and with mask and pin, in turn and in one training: paired times.

    The last block is one with, which puts back what the others let go.
    """

    def __init__(self, callback: Any, steps: int) -> None:
        self.callback, self.steps = callback, steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps:
            return
        pin = self.callback._pin
        pin.remove()
        if state.global_step // self.steps % 2 == 0:
            pin._handles = [pin._register(n, hold) for n, hold in enumerate(pin._holds)]
            pin._handles.append(pin._optimizer.register_step_post_hook(pin._after_step))


def resume_of(cell: Cell, folder: Path) -> str | None:
    """The path to resume from."""
    place, _, last = cell.resume.partition(" ")
    if not place:
        return None
    return str(last_complete(folder / place) if last else folder / place)


def engine_settings(engine: str, cell: Cell, folder: Path) -> dict[str, Any]:
    """Training arguments that ask for an engine."""
    bf16 = cell.dtype == "bfloat16"
    settings: dict[str, Any] = {"bf16": bf16}
    if engine == "fsdp2":
        config = {
            "version": 2,
            "transformer_layer_cls_to_wrap": list(base_of(cell)._no_split_modules),
            "state_dict_type": "FULL_STATE_DICT",
        }
        settings |= {"fsdp": True, "fsdp_config": {**config, **(cell.engine or {})}}
    elif engine.startswith("zero"):
        zero = {"stage": int(engine[-1]), "stage3_gather_16bit_weights_on_model_save": True}
        if engine == "zero3":
            zero["stage3_param_persistence_threshold"] = 0
        # As `accelerate launch` does. With use_cpu accelerate would leave DeepSpeed away, and
        # without ddp_backend each process would believe to be alone; launches hide GPUs.
        settings |= {"use_cpu": False, "ddp_backend": "gloo"}
        config = {
            "zero_optimization": {**zero, **(cell.engine or {})},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": bf16},
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
        }
        path = folder / f"zero{os.environ.get('RANK', '0')}.json"
        path.write_text(json.dumps(config))
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)
    return settings


def _count(self: Any, *_: Any) -> None:
    held = self._held if isinstance(self, DirectionPin) else self._holds
    self._stepped |= set(range(len(held)))
    self.pins += 1


def _none(self: Any, number: int, hold: Any) -> Any:
    return torch.zeros(1, requires_grad=True).register_hook(lambda g: g)


def _before(self: Any, *_: Any) -> Any:
    return self.plan


def _idle(self: Any, number: int, *_: Any) -> Any:
    def change(given: Any) -> None:
        self.fired[number] += 1

    return change


BROKEN: dict[str, tuple[type, str, Any]] = {
    "pin": (pin_module.Pin, "_after_step", _count),
    "span": (DirectionPin, "_after_step", _count),
    "mask": (pin_module.Pin, "_register", _none),
    "mask_fill": (pin_module.Pin, "_clear", _idle),
    "early": (SafetyFreezeCallback, "_plan_again", _before),
}


def broken(cell: Cell) -> Any:
    """safeft with one part taken out."""
    return patch.object(*BROKEN[cell.broken]) if cell.broken else nullcontext()


def protection(cell: Cell, model: Any) -> tuple[Any, Any]:
    """The callback of a cell, if it has one, and the subspace it holds."""
    span = subspace_of(model, cell.span) if cell.span else None
    if cell.set is not None:
        hold = cell.hold or None
        return freeze(model, indices_of(cell), hold=hold, mode=cell.mode, subspace=span), span
    return (None if span is None else SafetyFreezeCallback(span)), span


def train(engine: str, folder: Path, cell: Cell) -> dict[str, Any]:
    """Train one cell and say what came of it."""
    torch.manual_seed(0)  # adapters are drawn before the trainer seeds anything
    unset_hf_deepspeed_config()
    model = base_of(cell)
    base = state_of(model)
    watch = Watch()
    callbacks: list[Any] = [watch]
    callback, span = protection(cell, model)
    if callback is not None:
        callbacks.insert(0, callback)
    home = folder / cell.name
    settings: dict[str, Any] = {
        "max_steps": 3,
        "gradient_accumulation_steps": cell.accumulation,
        "learning_rate": 2e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        **engine_settings(engine, cell, home),
        **(cell.settings or {}),
    }
    if cell.load:
        model = loaded_again(model, home, settings)
    report: dict[str, Any] = {"cell": asdict(cell), "error": None}
    with broken(cell):
        try:
            trainer = trainer_of(
                "Trainer",
                model,
                home / "run",
                callbacks,
                peft_config=adapter(cell, model) if cell.tuning == "lora" else None,
                **settings,
            )
            watch.trainer = trainer
            if cell.toggle:
                trainer.callback_handler.callbacks.insert(0, Toggle(callbacks[0], cell.toggle))
            if cell.kill is not None:
                killer = Killer(*cell.kill)
                trainer.add_callback(killer)
                if killer.when == "within":
                    killer.within(trainer)
            report["resumed_from"] = resume_of(cell, folder)
            trainer.train(resume_from_checkpoint=report["resumed_from"])
            trainer.save_model(str(home / "tuned"))
        except SafeftError as error:
            report["error"] = f"{type(error).__name__}: {error}"
            report |= watch.seen
            return report
    report |= watch.seen
    report["seconds"] = watch.seconds
    logs = trainer.state.log_history
    report["losses"] = [row["loss"] for row in logs if "loss" in row]
    report["grad_norms"] = [float(row["grad_norm"]) for row in logs if "grad_norm" in row]
    if callback is not None:
        report["directions"] = [dict(d) for d in callbacks[0].certificate.directions]
        report["run"] = dict(callbacks[0].certificate.run)
        report["restored"] = callbacks[0]._restored
        report["exact"] = callbacks[0].certificate.exact
        if cell.tamper:
            report |= tampered(callbacks[0], model, trainer.args.process_index)
    if trainer.args.process_index == 0:
        report |= compared(base, home / "tuned", cell, span)
    return report


def adapter(cell: Cell, model: Any) -> Any:
    """LoRA as the cell wants it."""
    if cell.family:
        return lora_on(model, family_of(cell))
    more = {"target_modules": list(cell.targets)} if cell.targets else {}
    return lora(r=cell.rank, **more)


def loaded_again(model: Any, home: Path, settings: dict[str, Any]) -> Any:
    """The same weights, loaded from a folder while the engine is on."""
    place, ready = home / "base", home / "base" / "ready"
    if os.environ.get("RANK", "0") == "0":
        model.save_pretrained(place)
        ready.touch()
    while not ready.exists():
        time.sleep(0.05)
    engine_on = arguments(home / "run", **settings)  # transformers reads the engine off these
    again = AutoModelForCausalLM.from_pretrained(place, dtype=model.dtype)
    del engine_on
    return again


def tampered(callback: Any, model: Any, rank: int) -> dict[str, Any]:
    """What certificates say after a change of something free, and of something held, in rank 1."""
    certifier, parameters = callback._certifier, dict(model.named_parameters())
    norm = next(p for name, p in parameters.items() if name.endswith("model.norm.weight"))
    held = next(p for n, p in parameters.items() if "0.mlp.up_proj" in n and "lora" not in n)
    if rank == 1:
        with torch.no_grad():
            norm.add_(1)
    report = {"exact_after_free_change": certifier.certify({}).exact}
    if rank == 1:
        with torch.no_grad():
            held[LARGE["model.layers.0.mlp"][0]].add_(1)
    return report | {"violations": [str(v) for v in certifier.certify({}).violations]}


def allow_bf16_on_cpu() -> None:
    """transformers asks for a GPU unless `use_cpu`, with which accelerate leaves DeepSpeed away."""
    training_args.is_torch_bf16_gpu_available = lambda: True


def compared(base: Any, tuned: Path, cell: Cell, span: Any = None) -> dict[str, Any]:
    """The saved model against the base, by hand."""
    unset_hf_deepspeed_config()  # or rank 0 alone would wait for the others to load with it
    checkpoints = sorted(tuned.parent.glob("run/checkpoint-*/pytorch_model_fsdp_0"))
    if not tuned.is_dir() and checkpoints:  # a sharded state dict is saved in torch's own format
        whole = tuned.parent / "whole.pt"
        dcp_to_torch_save(checkpoints[-1], whole)
        now = torch.load(whole, weights_only=True)["model"]
    elif cell.tuning == "lora":  # PEFT saves the adapter alone
        now = state_of(PeftModel.from_pretrained(base_of(cell), str(tuned)))
    else:
        now = state_of(AutoModelForCausalLM.from_pretrained(tuned))
    changes = {} if span is None else product_changes(base, now, span, base_of(cell))
    indices = indices_of(cell) if cell.set and not cell.aside else {}
    if cell.family:
        untouched = {n: torch.zeros_like(w, dtype=torch.bool) for n, w in base.items()}
        masks = untouched | masks_of(base_of(cell), family_of(cell), indices)
    else:
        masks = frozen_entries(base, indices, cell.mode)
    shares = {}
    changed = 0
    for name, mask in masks.items():
        same = same_bits(base[name].to(now[name].dtype), now[name])
        changed += int((~same & mask).sum())
        trained = cell.tuning == "full" or any(t in name for t in cell.targets or ("_proj",))
        if cell.family and cell.tuning == "lora":  # which trains matrices only
            trained = not name.endswith(("bias", "sinks"))
        trained &= not (("norms" in cell.hold or cell.span) and "norm" in name)
        trained &= not cell.family or not cell.set or bool(mask.any())  # what neurons live in
        if trained and not mask.all() and name != "model.embed_tokens.weight":
            shares[name] = float((~same)[~mask].float().mean())
    return {
        "dtype": str(next(iter(now.values())).dtype),
        "changes": changes,
        "frozen_changed": changed,
        "frozen": int(sum(mask.sum() for mask in masks.values())),
        "least_moved": min(shares.values(), default=0.0),
        "mean_moved": sum(shares.values()) / max(1, len(shares)),
    }


def main(engine: str, folder: Path, cells: list[Cell]) -> None:
    if engine == "fsdp2":
        fsdp_on_cpu.allow()
    if engine.startswith("zero"):
        allow_bf16_on_cpu()
    rank = int(os.environ.get("RANK", "0"))
    for cell in cells:
        (folder / cell.name).mkdir(parents=True, exist_ok=True)
        report = train(engine, folder, cell)
        (folder / cell.name / f"rank{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [Cell(**cell) for cell in json.loads(sys.argv[3])])
    end()
