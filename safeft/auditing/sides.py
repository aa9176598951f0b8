"""One side of an audit: what refusal hangs on, or what refusing benign prompts hangs on."""

from collections.abc import Sequence
from dataclasses import dataclass

from safeft.auditing.bench import Asked, Bench
from safeft.auditing.effects import compared, effective, gini, is_real, reach
from safeft.auditing.groups import Judging, Member
from safeft.auditing.result import Side
from safeft.auditing.search import Search, Tested
from safeft.auditing.verdict import Judged, corrected, largest, smallest
from safeft.causal.effect import Outcome
from safeft.causal.trials import Trials
from safeft.intervals import Rate
from safeft.locators.scores import SIDES
from safeft.measure import answer_loss
from safeft.progress import progress

FINALISTS = 8
"""Neurons that are judged by answers one at a time."""


@dataclass(frozen=True, eq=False)
class SideFound:
    """A side, and what its verdict rests on.

    Attributes:
        side: For the result.
        base: The untouched model on its prompts, all of which it refuses.
        singles: The strongest neurons, judged one at a time.
        groups: The strongest together, in growing numbers.
        tested: What the search found.
    """

    side: Side
    base: Outcome
    singles: Sequence[Judged]
    groups: Sequence[Judged]
    tested: Tested


def audited_side(
    bench: Bench,
    name: str,
    letters: tuple[str, str],
    target: Asked,
    other: Asked,
    elsewhere: Asked,
    excluded: int,
    line: float | None = None,
) -> SideFound:
    """Rank, test and judge.

    Args:
        bench: What stages share.
        name: Of the side, in the journal.
        letters: Names of candidates and of random neurons start with these.
        target: Prompts that are refused.
        other: Benign prompts that are answered: ranking compares with them, and on them the model
            has to go on speaking.
        elsewhere: Prompts whose margin should not move.
        excluded: Given prompts that are not among ``target``.
        line: See :meth:`safeft.auditing.search.Search.run`.
    """
    tested = Search(bench, name, letters, target, other, elsewhere).run(line)
    with bench.timed("judging"):
        judging = _judging(bench, name, target.measuring, other.measuring, tested)
        strongest = sorted(tested.candidates, key=lambda each: -compared(each).fall)
        everyone = [*tested.candidates, *tested.controls]
        furthest = sorted(everyone, key=lambda each: -each.best.fall)
        # The first of either order: of what they are compared by, and of what can be done to
        # any: a random neuron that goes further than all candidates is judged too.
        pairs = zip(strongest, furthest, strict=False)
        finalists = {each.neuron.name: each for pair in pairs for each in pair}
        chosen = progress(list(finalists.values())[:FINALISTS], "judging the strongest alone")
        singles = [judging.judged([Member.of(each)]) for each in chosen]
        groups = judging.grown([Member.of(each) for each in strongest])
    most, confidence = reach(tested.controls), bench.thresholds.confidence
    real = [compared(each).fall for each in tested.candidates if is_real(each, most, confidence)]
    side = Side(
        len(target.measuring),
        excluded,
        tuple(tested.candidates),
        tuple(tested.controls),
        tuple(each.trial for each in groups),
        smallest(singles, groups, bench.thresholds),
        largest(singles, bench.thresholds),
        gini([compared(each).fall for each in tested.candidates]),
        effective(real),
        tuple(each.trial for each in singles),
    )
    return SideFound(side, judging.base, singles, groups, tested)


def _judging(bench: Bench, name: str, target: Asked, other: Asked, tested: Tested) -> Judging:
    prompts = dict(zip(SIDES, (target.prompts, other.prompts), strict=True))
    trials = Trials(
        bench.model, bench.tokenizer, prompts, bench.judge, bench.max_new_tokens, False,
        bench.batching,
    )  # fmt: skip
    odd = answer_loss(bench.model, trials.batches("harmful", target.answers), second_half=True)
    base = Outcome(
        Rate.of(len(target), len(target)),
        Rate.of(0, len(other)),
        trials.loss(other.answers),
        odd,
    )
    return Judging(
        trials,
        dict(zip(SIDES, (bench.batches(target), bench.batches(other)), strict=True)),
        other.answers,
        base,
        bench.sites,
        tested.references,
        tested.passes,
        tested.line,
        bench.thresholds,
        corrected(bench.thresholds, len(tested.candidates)),
        bench.seed,
        bench.journal,
        name,
    )
