"""Detox: find the units that drive toxic output, and dampen them, at inference or in the weights.

In order: :func:`~safeft.detox.experts.find_experts` (which units tell toxic from neutral text
better than chance), :func:`~safeft.detox.rules.dampen` (a gain for each: a
:class:`~safeft.detox.dampener.Dampener`), :func:`~safeft.detox.counterfactual.keep_paying` (each
unit muted on its own), then :func:`~safeft.detox.hooks.dampened` (hooks) or
:func:`~safeft.detox.folding.fold` (in the weights), and
:func:`~safeft.detox.evaluation.measure_arms` (what it bought and cost, beside its controls).
"""
