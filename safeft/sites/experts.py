"""What goes through single experts of a stack, which transformers computes all at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

Routed = Callable[[str, Tensor, Tensor], Tensor | None]
"""Called with an inlet (``{path}.{weight}.{expert}``), what that expert's matrix receives
``(tokens, features)``, and which tokens of the flattened batch these are; what it returns, if
anything, is received instead."""

_TAPS: dict[int, tuple[str, Routed]] = {}
"""By the id of an experts module, while it is tapped."""


@contextmanager
def tapped_experts(module: nn.Module, path: str, act: Routed) -> Iterator[None]:
    """Compute a stack of experts one by one, and let ``act`` see what each of them receives.

    Transformers' experts look up how to run in its registry, by the name in their config: there
    they find this way while the context lasts. Llama 4's do not, and are replaced.
    """
    config: Any = getattr(module, "config", None)
    listed = hasattr(module, "is_transposed") and hasattr(config, "_experts_implementation")
    if (known := _TAPS.get(id(module))) is not None:
        path, act = known[0], _both(known[1], act)
    _TAPS[id(module)] = (path, act)
    before: Any = None
    try:
        if listed:
            from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

            ALL_EXPERTS_FUNCTIONS.register("safeft", _one_by_one)
            before = config._experts_implementation
            config._experts_implementation = "safeft"
        else:
            before = module.__dict__.get("forward")
            module.forward = MethodType(_sorted_by_expert, module)
        yield
    finally:
        if known is None:
            del _TAPS[id(module)]
        else:
            _TAPS[id(module)] = known
        if listed:
            config._experts_implementation = before
        elif before is None:
            del module.forward
        else:
            module.forward = before


def _both(first: Routed, second: Routed) -> Routed:
    def act(inlet: str, values: Tensor, places: Tensor) -> Tensor | None:
        new = first(inlet, values, places)
        newer = second(inlet, values if new is None else new, places)
        return new if newer is None else newer

    return act


def _received(module: nn.Module, leaf: str, expert: int, values: Tensor, places: Tensor) -> Tensor:
    path, act = _TAPS.get(id(module), ("", None))
    new = act(f"{path}.{leaf}.{expert}", values, places) if act is not None else None
    return values if new is None else new


def _one_by_one(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The plain computation that transformers' faster ones stand for."""

    def linear(values: Tensor, leaf: str, expert: int) -> Tensor:
        weight = getattr(self, leaf)[expert]
        result = values @ weight if self.is_transposed else values @ weight.T
        return result + getattr(self, f"{leaf}_bias")[expert] if self.has_bias else result

    output = torch.zeros_like(hidden_states)
    for expert in torch.unique(top_k_index).tolist():
        if expert >= self.num_experts:
            continue
        places, choice = torch.where(top_k_index == expert)
        values = _received(self, "gate_up_proj", expert, hidden_states[places], places)
        units = self._apply_gate(linear(values, "gate_up_proj", expert))
        units = _received(self, "down_proj", expert, units, places)
        written = linear(units, "down_proj", expert) * top_k_weights[places, choice, None]
        output = output.index_add(0, places, written.to(output.dtype))
    return output


def _sorted_by_expert(self: Any, hidden_states: Tensor) -> Tensor:
    """Llama 4: every expert gets every token, scaled by the router, zero where it is not routed."""
    experts, size, _ = self.gate_up_proj.shape
    outputs = []
    for expert, tokens in enumerate(hidden_states.view(experts, -1, size)):
        places = (tokens != 0).any(-1).nonzero().flatten()
        values = _received(self, "gate_up_proj", expert, tokens[places], places)
        gate, up = (values @ self.gate_up_proj[expert]).chunk(2, dim=-1)
        units = _received(self, "down_proj", expert, up * self.act_fn(gate), places)
        written = units @ self.down_proj[expert]
        outputs.append(torch.zeros_like(tokens).index_copy(0, places, written.to(tokens.dtype)))
    return torch.cat(outputs)
