"""Harmfulness from a frozen model's inner activations: on prompts, answers and streams."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safeft.guard.evaluation import evaluate_guard as evaluate_guard
    from safeft.guard.fitter import GuardFitter as GuardFitter
    from safeft.guard.generation import GuardedGeneration as GuardedGeneration
    from safeft.guard.generation import GuardStreamer as GuardStreamer
    from safeft.guard.guards import Guard as Guard
    from safeft.guard.guards import GuardEnsemble as GuardEnsemble
    from safeft.guard.policy import Policy as Policy

_HOMES = {
    "Guard": "guards",
    "GuardEnsemble": "guards",
    "GuardFitter": "fitter",
    "GuardStreamer": "generation",
    "GuardedGeneration": "generation",
    "Policy": "policy",
    "evaluate_guard": "evaluation",
}

__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'safeft.guard' has no attribute {name!r}")
    return getattr(import_module(f"safeft.guard.{_HOMES[name]}"), name)
