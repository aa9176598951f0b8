"""safeft: fine-tune a chat model on your domain, keep its refusals, and prove both.

Names load on first use, so that ``import safeft`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safeft.auditing.audit import audit as audit
    from safeft.auditing.result import AuditResult as AuditResult
    from safeft.auditing.stress import stress as stress
    from safeft.causal import validate as validate
    from safeft.causal.effect import CausalEffect as CausalEffect
    from safeft.detox.dampener import Dampener as Dampener
    from safeft.errors import SafeftError as SafeftError
    from safeft.evaluation import Evaluation as Evaluation
    from safeft.evaluation import evaluate as evaluate
    from safeft.freeze.callback import SafetyFreezeCallback as SafetyFreezeCallback
    from safeft.freeze.certificate import Certificate as Certificate
    from safeft.freeze.verify import verify as verify
    from safeft.guard.fitter import GuardFitter as GuardFitter
    from safeft.guard.generation import GuardedGeneration as GuardedGeneration
    from safeft.guard.guards import Guard as Guard
    from safeft.hardening.callback import SafetyDropoutCallback as SafetyDropoutCallback
    from safeft.judge import Judge as Judge
    from safeft.judge import as_judge as as_judge
    from safeft.locators import locate as locate
    from safeft.locators import locate_subspace as locate_subspace
    from safeft.monitor.callback import SafetyMonitorCallback as SafetyMonitorCallback
    from safeft.monitor.neurons import NeuronMonitor as NeuronMonitor
    from safeft.neurons import NeuronSet as NeuronSet
    from safeft.reading import read_prompts as read_prompts
    from safeft.sites import find_sites as find_sites
    from safeft.subspace import SafetySubspace as SafetySubspace

__version__ = "0.1.0"

_HOMES = {
    "AuditResult": "safeft.auditing.result",
    "CausalEffect": "safeft.causal.effect",
    "Certificate": "safeft.freeze.certificate",
    "Dampener": "safeft.detox.dampener",
    "Evaluation": "safeft.evaluation",
    "Guard": "safeft.guard.guards",
    "GuardFitter": "safeft.guard.fitter",
    "GuardedGeneration": "safeft.guard.generation",
    "Judge": "safeft.judge",
    "NeuronMonitor": "safeft.monitor.neurons",
    "NeuronSet": "safeft.neurons",
    "SafeftError": "safeft.errors",
    "SafetyDropoutCallback": "safeft.hardening.callback",
    "SafetyFreezeCallback": "safeft.freeze.callback",
    "SafetyMonitorCallback": "safeft.monitor.callback",
    "SafetySubspace": "safeft.subspace",
    "as_judge": "safeft.judge",
    "audit": "safeft.auditing",
    "evaluate": "safeft.evaluation",
    "find_sites": "safeft.sites",
    "locate": "safeft.locators",
    "locate_subspace": "safeft.locators",
    "read_prompts": "safeft.reading",
    "stress": "safeft.auditing.stress",
    "validate": "safeft.causal",
    "verify": "safeft.freeze.verify",
}

__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'safeft' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
