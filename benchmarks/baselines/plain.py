"""Plain tuning, the same at a lower rate, and with embeddings, norms and head held: no protection.

The last is the control of every method that holds these beside slices of the blocks.
"""

from baselines import Method, Recipe, Setup, hold_whole


def plain(setup: Setup, value: float) -> Recipe:
    """Nothing but the rows, at ``value`` times the rate."""
    return Recipe(setup.rows, setup.learning_rate * value)


def blocks_only(setup: Setup, value: float) -> Recipe:
    """Plain tuning of the blocks alone."""
    return Recipe(setup.rows, setup.learning_rate, prepare=hold_whole)


METHODS = (
    Method("plain", "no protection, at its own best rate", plain, rates=(1.0,)),
    Method(
        "lower rate",
        "what Qi et al. 2023 (arXiv 2310.03693) found to lose less",
        plain,
        (0.03, 0.1, 0.3),
        "factor of plain tuning's rate",
        rates=(1.0,),
    ),
    Method(
        "blocks only",
        "ours, a control: embeddings, norms and head held, no neuron or direction",
        blocks_only,
        tunings=("full",),
    ),
)
