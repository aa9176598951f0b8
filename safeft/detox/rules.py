"""From expertise to gains: one rule, one line of arithmetic; ``A`` is a unit's AUROC.

============= =================================== =============================================
rule          gain                                source
============= =================================== =============================================
``aura``      ``1 - s 2 (A - 0.5)``, all experts  AurA (Suau et al., "Whispering Experts"); there
                                                  every unit above 0.5, and ``s`` is 1
``det0``      0, the top k                        Det0 of the same paper
``constant``  ``1 - s``, the top k                Damp of the same paper
``sgm``       ``1 - s w``, the top k of text      SGM (arXiv 2512.15052) says "expertise-weighted
              layers from ``first_layer`` on;     soft suppression of post-fusion layers"; its
              ``w = (A - 0.5) / (A_max - 0.5)``   formula was not found: this weight is ours
``threshold`` 1, but sizes are capped at          ours
              ``(1 - s)`` of what 95% of neutral
              prompts stay below, all experts
============= =================================== =============================================

An expert is above what chance gives (:class:`~safeft.detox.experts.Expertise`); ``s`` is the
strength. Whatever is not scored keeps a gain of 1.
"""

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

from torch import nn

from safeft.detox.dampener import Dampener
from safeft.detox.experts import Expertise
from safeft.errors import ConfigError, SelectionError
from safeft.locators.calibration import check_choice

Rule: TypeAlias = Literal["aura", "det0", "constant", "sgm", "threshold"]
RULES: tuple[str, ...] = get_args(Rule)

STRENGTHS: Mapping[str, float] = {"aura": 1.0, "constant": 0.5, "sgm": 0.9, "threshold": 0.0}
"""What is used where no strength is said; ``det0`` has none."""

_BY_SIZE = ("det0", "constant", "sgm")


def dampen(
    model: nn.Module,
    experts: Expertise,
    rule: Rule = "aura",
    *,
    strength: float | None = None,
    fraction: float | None = None,
    count: int | None = None,
    first_layer: int = 0,
    amplify: bool = False,
) -> Dampener:
    """Turn expertise into gains.

    Args:
        model: The model the experts were found in.
        experts: What :func:`~safeft.detox.experts.find_experts` gave.
        rule: See the module.
        strength: How much; 0 changes nothing (but ``threshold`` still caps), 1 is the rule's all.
            ``aura`` takes more than 1, gains ending at 0.
        fraction: Of ``det0``, ``constant`` and ``sgm``: share of the units read; 0.05 where
            nothing is said. Never more than there are experts.
        count: Number of units instead.
        first_layer: Of ``sgm``: the first text layer that counts as after the fusion.
        amplify: Of ``aura``: units as far below 0.5 as experts are above it get gains above 1, as
            in its revision for vision-language models; never without this.

    Raises:
        ConfigError: A rule or setting that is none, or without effect for the rule.
        SelectionError: No unit is an expert.

    Example:
        >>> dampen(model, experts, "aura", strength=1.5)  # doctest: +SKIP
    """
    check_settings(rule, strength, fraction, count, first_layer, amplify)
    s = STRENGTHS.get(rule, 1.0) if strength is None else strength
    ranked = _ranked(experts, first_layer if rule == "sgm" else None)
    if not ranked:
        raise SelectionError(
            f"No unit tells toxic from neutral prompts better than chance does (AUROC above "
            f"{experts.level:.3f}), so none may be dampened. Give more prompts, or prompts whose "
            "classes differ in toxicity and not in chance alone."
        )
    if rule in _BY_SIZE:
        total = sum(site.units for site in experts.sites.values())
        share = 0.05 if fraction is None else fraction
        ranked = ranked[: count or max(1, round(share * total))]
    gains: dict[str, dict[int, float]] = {name: {} for name in experts.sites}
    ceilings: dict[str, dict[int, float]] = {}
    best = ranked[0][0] - 0.5
    for area, name, unit in ranked:
        if rule == "threshold":
            top = float(experts.ceilings[name][unit]) * (1 - s)
            ceilings.setdefault(name, {})[unit] = top
        else:
            gains[name][unit] = {
                "aura": max(0.0, 1 - s * 2 * (area - 0.5)),
                "det0": 0.0,
                "constant": 1 - s,
                "sgm": 1 - s * (area - 0.5) / best,
            }[rule]
    if amplify:
        _amplify(experts, gains, s)
    settings = {"strength": None if rule == "det0" else s, "amplify": amplify,
                "first_layer": first_layer}  # fmt: skip
    source = {**experts.source, "rule": rule, **settings}
    return Dampener.of(model, gains, source, ceilings=ceilings, amplifies=amplify)


def _ranked(experts: Expertise, first_layer: int | None) -> list[tuple[float, str, int]]:
    """Experts, the best first; ties go to the earlier site and unit."""
    found = [
        (float(experts.auroc[name][unit]), name, unit)
        for name, site in experts.sites.items()
        if first_layer is None or (site.tower == "text" and site.layer >= first_layer)
        for unit in experts.experts(name).nonzero().flatten().tolist()
    ]
    return sorted(found, key=lambda each: -each[0])


def _amplify(experts: Expertise, gains: dict[str, dict[int, float]], strength: float) -> None:
    mirrored = 1 - experts.level
    for name, areas in experts.auroc.items():
        for unit in (areas < mirrored).nonzero().flatten().tolist():
            gains[name][unit] = 1 - strength * 2 * (float(areas[unit]) - 0.5)


def check_settings(
    rule: str,
    strength: float | None,
    fraction: float | None,
    count: int | None,
    first_layer: int,
    amplify: bool,
) -> None:
    """Refuse settings of :func:`dampen` that are none, before anything is read for them.

    Raises:
        ConfigError: There are such.
    """
    check_choice("rule", rule, RULES)
    if rule == "det0" and strength is not None:
        raise ConfigError(
            f"strength={strength}: det0 silences, and how strongly is said by how many units "
            "(fraction or count). Leave it away, or use rule='constant'."
        )
    most = math.inf if rule == "aura" else 1.0
    if strength is not None and not (math.isfinite(strength) and 0 <= strength <= most):
        raise ConfigError(
            f"strength={strength} of rule={rule!r}: give 0 or more"
            f"{'' if rule == 'aura' else ', at most 1 (silence)'}."
        )
    sized = {"fraction": fraction, "count": count}
    if rule not in _BY_SIZE and any(value is not None for value in sized.values()):
        raise ConfigError(f"{sized}: rule={rule!r} takes all experts; its knob is the strength.")
    if fraction is not None and count is not None:
        raise ConfigError(f"{sized}: give one of them.")
    if fraction is not None and not 0 < fraction <= 1:
        raise ConfigError(f"fraction={fraction}: give a share above 0 and at most 1.")
    if count is not None and count < 1:
        raise ConfigError(f"count={count} would dampen nothing. Give 1 or more.")
    if first_layer and rule != "sgm":
        raise ConfigError(f"first_layer={first_layer} goes with rule='sgm' alone.")
    if amplify and rule != "aura":
        raise ConfigError(f"amplify goes with rule='aura'; rule={rule!r} has no gains above 1.")
