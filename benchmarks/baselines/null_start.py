"""Adapters that start in the null space of what is to be kept, and are not held there: CorDA.

Yang et al., NeurIPS 2024 (arXiv 2406.05223), by PEFT in its knowledge-preserving mode: with ``C``
the covariance of a layer's inputs on the harmful calibration prompts and their refusals, the
components of ``W C`` with the smallest singular values become the adapter. Training may turn it
anywhere, which is what a basis that is held does not let it.
"""

import dataclasses
import sys
from typing import Any
from unittest import mock

from peft.tuners.lora.config import CordaConfig

from baselines import Method, Recipe, Setup
from safeft.measure import evaluating
from safeft.prompts import batches


def recipe(setup: Setup, value: float) -> Recipe:
    """LoRA from CorDA's start, at ``value`` times the rate: its factors start large."""

    def start(model: Any, config: Any) -> None:
        # PEFT takes one decorator from attrs, which it does not install; the standard one will do.
        with mock.patch.dict(sys.modules, {"attr": sys.modules.get("attr", dataclasses)}):
            from peft.tuners.lora.corda import preprocess_corda

        def run() -> None:
            with evaluating(model):
                for batch in batches(
                    setup.tokenizer,
                    setup.testbed.harmful["calibration"],
                    batch_size=1,  # its hook reads one row at a time
                    max_length=setup.testbed.max_length,
                ):
                    model(**batch.inputs, use_cache=False)

        preprocess_corda(model, config, run_model=run)

    return Recipe(
        setup.rows,
        setup.learning_rate * value,
        start=start,
        lora={"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm")},
    )


METHODS = (
    Method(
        "CorDA start",
        "Yang et al., NeurIPS 2024, knowledge-preserving mode, as PEFT has it",
        recipe,
        (0.1, 0.3, 1.0),
        "factor of plain tuning's rate",
        tunings=("lora",),
        rates=(1.0,),
    ),
)
