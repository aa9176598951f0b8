"""How scalars get into what a trainer logs."""

import gc
from types import SimpleNamespace
from typing import Any

from transformers import trainer as transformers_trainer

from safeft.freeze import relay
from safeft.freeze.relay import ScalarRelay, add_scalars, add_source


class Source:
    def __init__(self, state: Any) -> None:
        self.state, self.scalars = state, {"safeft/a": 1.0}

    def take_scalars(self, state: Any) -> dict[str, float]:
        if state is not self.state:
            return {}
        taken, self.scalars = self.scalars, {}
        return taken


def state_with(row: dict[str, float]) -> Any:
    return SimpleNamespace(log_history=[{"step": 0}, dict(row)])


def log(state: Any, logs: Any) -> None:
    ScalarRelay().on_log(None, state, None, logs)  # pyright: ignore


def test_scalars_go_once_beside_the_loss_of_their_own_training() -> None:
    row = {"loss": 2.0}
    mine, other = state_with(row), state_with(row)
    source = Source(mine)
    add_source(source)
    logs = dict(row)
    log(other, logs)
    assert logs == row
    log(mine, {"eval_loss": 1.0})
    log(mine, None)
    log(mine, logs)
    assert logs == mine.log_history[-1] == {"loss": 2.0, "safeft/a": 1.0}
    assert mine.log_history[0] == {"step": 0}
    later = dict(row)
    add_scalars(source, mine, later)
    assert later == row


def test_the_relay_comes_once_and_ahead_of_the_trackers() -> None:
    for _ in range(3):
        add_source(Source(None))
    assert transformers_trainer.DEFAULT_CALLBACKS.count(ScalarRelay) == 1


def test_a_source_is_not_kept_alive() -> None:
    source = Source(None)
    add_source(source)
    before = len(relay._SOURCES)
    del source
    gc.collect()
    assert len(relay._SOURCES) < before
