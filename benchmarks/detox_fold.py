"""A dampener in the weights: equal to its hooks, run without safeft, and before or after a freeze.

    python benchmarks/detox_fold.py

On the model that ships: what turns its apologies down (``aura``, heads too) is folded in, and
compared with the hooks; the checkpoint is run by plain transformers in a process in which safeft
cannot be imported; a protected fine-tuning comes before the fold, and after it. Under a minute.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

BENCHMARKS = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCHMARKS))

from build_demo_model import collate, encode  # noqa: E402
from testbed.texts import exchange  # noqa: E402

from safeft import Dampener, SafetyFreezeCallback, locate, verify  # noqa: E402
from safeft.demo import world  # noqa: E402
from safeft.detox.certificate import certify_fold  # noqa: E402
from safeft.detox.experts import find_experts  # noqa: E402
from safeft.detox.folding import FoldError, fold  # noqa: E402
from safeft.detox.hooks import dampened  # noqa: E402
from safeft.detox.rules import dampen  # noqa: E402
from safeft.detox.saving import save_folded, undo_fold  # noqa: E402
from safeft.files import write_whole  # noqa: E402
from safeft.generation import generate  # noqa: E402

RESULTS = BENCHMARKS / "results" / "detox_fold.json"
MODEL = BENCHMARKS.parent / "safeft" / "demo" / "model"
TOKENS = 16
_ALONE = """
import json, sys
sys.modules["safeft"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    print(json.dumps(model(ids).logits.tolist()))
"""


def model_of(folder: str | Path = MODEL) -> Any:
    """A model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def same_bits(one: Any, other: Any) -> bool:
    """Whether all weights of two models are equal, bit for bit."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def tuned(model: Any, tokenizer: Any, callbacks: list[Any], place: Path, steps: int) -> Any:
    """The model after some steps on the shipped domain."""
    rows = encode(tokenizer, world.domain("train"))
    arguments = TrainingArguments(
        str(place), max_steps=steps, learning_rate=1e-3, per_device_train_batch_size=16,
        save_strategy="no", report_to=[], use_cpu=True, seed=0, disable_tqdm=True,
    )  # fmt: skip
    Trainer(
        model, arguments, train_dataset=rows, callbacks=callbacks,  # pyright: ignore[reportArgumentType]
        data_collator=lambda some: collate(some, tokenizer.pad_token_id, False),
    ).train()  # fmt: skip
    return model.eval()


def equal(base: Any, tokenizer: Any, dampener: Dampener, place: Path) -> dict[str, Any]:
    """Folded against hooked, here and in plain transformers, and undone."""
    asked = [exchange(text) for text in (*world.harmful("test")[:40], *world.benign("test")[:40])]
    ids = tokenizer([p.text for p in asked[:8]], padding=True, return_tensors="pt").input_ids
    folded = deepcopy(base)
    done = fold(folded, dampener)
    save_folded(folded, tokenizer, done, place)
    shown = subprocess.run(
        [sys.executable, "-c", _ALONE, str(place), json.dumps(ids.tolist())],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    alone = torch.tensor(json.loads(shown.strip().splitlines()[-1]))
    plain = generate(base, tokenizer, asked, max_new_tokens=TOKENS, batch_size=40)
    with torch.no_grad():
        without, inside = base(ids).logits, folded(ids).logits
        with dampened(base, dampener):
            hooked = base(ids).logits
            said = generate(base, tokenizer, asked, max_new_tokens=TOKENS, batch_size=40)
    again = generate(folded, tokenizer, asked, max_new_tokens=TOKENS, batch_size=40)
    certificate = certify_fold(MODEL, place, dampener)
    undo_fold(model_of(place), tokenizer, place, place.with_name("undone"))
    try:
        fold(model_of(place), dampener)
        twice = "done"
    except FoldError:
        twice = "refused"
    return {
        "answers": len(asked),
        "answers_changed_by_the_dampener": sum(a != b for a, b in zip(plain, said, strict=True)),
        "answers_alike_hooked_and_folded": sum(a == b for a, b in zip(said, again, strict=True)),
        "largest_logit": float(hooked.abs().max()),
        "logits_moved_by_the_dampener": float((hooked - without).abs().max()),
        "logits_hooked_against_folded": float((hooked - inside).abs().max()),
        "logits_folded_against_plain_transformers": float((inside - alone).abs().max()),
        "certificate_exact": certificate.exact,
        "weights_scaled": len(certificate.scaled),
        "weights_untouched": certificate.untouched["count"],
        "undone_bit_for_bit": same_bits(model_of(place.with_name("undone")), base),
        "a_second_fold": twice,
    }


def with_freeze(base: Any, tokenizer: Any, dampener: Dampener, place: Path,
                steps: int) -> dict[str, Any]:  # fmt: skip
    """A protected run before the fold, and one after it; what both certificates say of each."""
    harmful, benign = world.harmful("train")[:100], world.benign("train")[:100]

    def protected(start: Any) -> tuple[Any, Any]:
        neurons = locate(start, tokenizer, harmful, benign, method="variance", fraction=0.1)
        model = tuned(deepcopy(start), tokenizer, [SafetyFreezeCallback(neurons)], place, steps)
        return neurons, model

    neurons, model = protected(base)
    first = verify(base, model, neurons)
    after = deepcopy(model)
    # The tuned model's own weights are what the dampener's digests have to name.
    moved = Dampener.of(model, {
        name: dict(zip(units, dampener.gains[name], strict=True))
        for name, units in dampener.neurons.indices.items()
    })  # fmt: skip
    fold(after, moved)
    certificate = certify_fold(model, after, moved)
    second = verify(base, after, neurons)
    both = {(n, u) for n, us in moved.neurons.indices.items() for u in us
            if u in neurons.indices.get(n, ())}  # fmt: skip
    said = {violation.neuron for violation in second.violations}
    start = deepcopy(base)
    fold(start, dampener)
    held, last = protected(start)
    return {
        "steps": steps,
        "frozen": len(neurons),
        "dampened": len(dampener),
        "freeze_exact_before_the_fold": first.exact,
        "fold_exact_after_the_freeze": certificate.exact,
        "frozen_and_dampened": len(both),
        "violations_named_by_the_freeze": len(said),
        "both_name_the_same": said == {f"{name}#{unit}" for name, unit in both},
        "freeze_exact_after_the_fold": verify(start, last, held).exact,
    }


def main() -> None:
    """Run both and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=20, help="of protected fine-tuning")
    given = parser.parse_args()
    torch.set_num_threads(1)
    base, tokenizer = model_of(), AutoTokenizer.from_pretrained(MODEL)
    sides = world.harmful("train")[:100], world.benign("train")[:100]
    experts = find_experts(base, tokenizer, *sides, kinds=("mlp", "attention"), batch_size=50)
    dampener = dampen(base, experts, "aura")
    with tempfile.TemporaryDirectory() as name:
        result = {
            "command": f"python benchmarks/detox_fold.py --steps {given.steps}",
            "units": len(dampener),
            "equal": equal(base, tokenizer, dampener, Path(name) / "folded"),
            "with_freeze": with_freeze(base, tokenizer, dampener, Path(name), given.steps),
        }
    write_whole(given.results, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
