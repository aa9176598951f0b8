"""Frozen neurons: located ones, and random ones as the control."""

from functools import partial

from baselines import HELD, Method, Recipe, Setup
from safeft import SafetyFreezeCallback, locate
from safeft.locators import Method as Locator


def frozen(setup: Setup, value: float, locator: Locator) -> Recipe:
    """Freeze a share of each layer's MLP units."""
    neurons = locate(
        setup.base,
        setup.tokenizer,
        setup.testbed.harmful["calibration"],
        setup.testbed.benign["calibration"],
        method=locator,
        fraction=value,
        seed=setup.seed,
        batch_size=32,
        max_length=setup.testbed.max_length,
    )
    return Recipe(setup.rows, setup.learning_rate, [SafetyFreezeCallback(neurons, hold=HELD)])


SHARES = (0.1, 0.4, 0.7)

METHODS = (
    Method(
        "random neurons", "the control", partial(frozen, locator="random"), SHARES, "share frozen"
    ),
    Method(
        "located neurons",
        "single-neuron study (arXiv 2605.08513), attribution style",
        partial(frozen, locator="attribution"),
        SHARES,
        "share frozen",
    ),
)
