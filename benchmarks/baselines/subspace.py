"""safeft's own: the input directions of safety prompts are held; and the controls of that.

Random directions, and those of benign prompts, as many for each input, in place of the safety
prompts': a control that keeps as much says that any directions would do.
"""

from collections.abc import Callable
from dataclasses import replace

from baselines import Method, Recipe, Setup
from baselines.mixing import mixed
from safeft import SafetyFreezeCallback
from safeft.locators.subspace import locate_subspace
from safeft.subspace import SafetySubspace


def located(setup: Setup, value: float) -> SafetySubspace:
    """Of the harmful calibration prompts and their refusals, at the energy ``value``."""
    return locate_subspace(
        setup.base,
        setup.tokenizer,
        setup.testbed.harmful["calibration"],
        energy=value,
        max_length=setup.testbed.max_length,
    )


def at_random(setup: Setup, value: float) -> SafetySubspace:
    """As many directions of each input, drawn."""
    return located(setup, value).at_random(setup.seed)


def of_benign(setup: Setup, value: float) -> SafetySubspace:
    """As many directions of each input, of benign calibration prompts and their answers."""
    safety = located(setup, value)
    shapes = {inlet: found.shape for inlet, found in safety.directions.items()}
    benign = locate_subspace(
        setup.base,
        setup.tokenizer,
        setup.testbed.benign["calibration"],
        rank_share=max(rank / features for features, rank in shapes.values()),
        max_length=setup.testbed.max_length,
    )
    return replace(  # Directions come with the largest eigenvalue first.
        benign,
        directions={i: found[:, : shapes[i][1]] for i, found in benign.directions.items()},
    )


def holding(find: Callable[[Setup, float], SafetySubspace]) -> Callable[[Setup, float], Recipe]:
    """Tuning with what ``find`` gives held; by default embeddings, norms and head too."""

    def recipe(setup: Setup, value: float) -> Recipe:
        return Recipe(setup.rows, setup.learning_rate, [SafetyFreezeCallback(find(setup, value))])

    return recipe


def replaying(share: float) -> Callable[[Setup, float], Recipe]:
    """The subspace held, and refusals among the rows."""

    def recipe(setup: Setup, value: float) -> Recipe:
        rows = mixed(setup.rows, setup.testbed.harmful["calibration"], share, setup.seed)
        return replace(holding(located)(setup, value), rows=rows)

    return recipe


METHODS = (
    Method("subspace", "safeft", holding(located), (0.7, 0.8, 0.9, 0.95), "energy"),
    Method(
        "tight subspace", "safeft, for data not trusted", holding(located), (0.98, 0.995), "energy"
    ),
    Method(
        "tightest subspace",
        "safeft, where harmful answers are expected: refusals before the domain",
        holding(located),
        (0.995,),
        "energy",
    ),
    *(
        Method(
            f"subspace, {share:.0%} refusals",
            "safeft, with Bianchi et al.'s mixing",
            replaying(share),
            (0.7, 0.8, 0.9),
            "energy",
        )
        for share in (0.03, 0.1)
    ),
    Method(
        "random subspace",
        "the control, of the subspace's ranks",
        holding(at_random),
        (),
        "energy",
        follows="subspace",
    ),
    Method(
        "benign subspace",
        "the control, of the subspace's ranks",
        holding(of_benign),
        (),
        "energy",
        follows="subspace",
    ),
)
