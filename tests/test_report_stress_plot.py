"""The picture of a stress test shows all tests, and marks where a model no longer speaks."""

from dataclasses import replace

from safeft.auditing.result import Thresholds
from safeft.auditing.stressed import Level, Strain, StressResult
from safeft.intervals import Rate
from safeft.report.stress_plot import stress_curves


def level(strength: float, refused: int, harm: float = 0.0) -> Level:
    return Level(strength, (Rate.of(refused, 10), Rate.of(refused, 10)), (harm, harm))


RESULT = StressResult(
    {}, {}, Thresholds(), level(0, 10),
    (
        Strain("noise", (level(0.1, 10), level(0.2, 3, 2.0))),
        Strain("neurons", (level(1, 4), level(2, 0)), (level(1, 10), level(2, 9))),
        Strain("direction", (level(0.5, 6), level(1, 0)), (level(0.5, 10), level(1, 10))),
        Strain("rounding", (level(8, 10), level(4, 9))),
        Strain("tuning", (level(1, 9), level(4, 0)), (level(1, 9), level(4, 8))),
    ),
    1.0,
)  # fmt: skip


def test_a_panel_a_test_with_its_control() -> None:
    picture = stress_curves(RESULT)
    assert picture.startswith("<svg")
    for words in ("noise on all matrices", "noise on located neurons", "as many random neurons",
                  "the harmful direction taken out", "random direction", "rounded", "bits",
                  "tuned on harmful answers", "tuned on its own benign answers"):  # fmt: skip
        assert words in picture
    assert stress_curves(RESULT) == picture


def test_a_model_that_no_longer_speaks_looks_otherwise() -> None:
    silent = replace(RESULT, strains=RESULT.strains[:1])
    speaking = Strain("noise", (level(0.1, 10), level(0.2, 3)))
    assert stress_curves(silent) != stress_curves(replace(silent, strains=(speaking,)))
    assert "fill: #ffffff" in stress_curves(silent)


def test_no_test_is_an_empty_picture() -> None:
    assert stress_curves(replace(RESULT, strains=())).startswith("<svg")
