"""``SafetySubspace``: a frozen value that says which input directions of a model safety uses.

Per distinct input of the linear layers (queries, keys and values share one) an orthonormal basis
U; holding it means that ``W U`` stays as it was. On disk a folder with ``config.json`` and
``model.safetensors``, never a pickle. Directions are kept as float16 and made orthonormal when
they are used, so that a saved subspace is the very one it was saved from.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save
from torch import Tensor, nn

from safeft.artefacts import intact, read_tensors
from safeft.blocks import count_of, form_of
from safeft.errors import ArtefactError, ConfigError, FingerprintError, SelectionError
from safeft.files import sha256, upload, write_together
from safeft.fingerprint import ModelFingerprint, check_layout
from safeft.neurons import (
    CARD_NAME,
    CONFIG_NAME,
    TENSORS_NAME,
    NeuronSet,
    check_own,
    read_config,
)
from safeft.sites import find_linears
from safeft.weights import ModelWeights, Weights

SCHEMA_VERSION = 1

_SAMPLED_ROWS = 16
"""Rows of a weight that tell one checkpoint from another; to read all would cost a pass."""

_TOKENS = "safeft.tokens"

_CARD = """---
library_name: safeft
tags: [safeft, safety, subspace]
---
# Safety subspace

Input directions of {count} linear layers of `{model}`, {share:.0%} of their rank, for `safeft`.
Load it with `safeft.SafetySubspace.from_pretrained(folder)`.

**Sensitive.** It says where a model computes its refusals. Share this folder as you would share a
vulnerability report.
"""


@dataclass(frozen=True, eq=False)
class SafetySubspace:
    """Input directions of linear layers, of which model, found how.

    Attributes:
        directions: Input (the path of the first module that receives it) to float16
            ``(features, rank)``, linearly independent columns.
        readers: Weight name to the input it is multiplied with.
        outputs: Weight name to its number of outputs.
        digests: Weight name to a digest of some of its rows.
        tokens: The tokens of the calibration prompts and answers, int64, sorted: whose embeddings
            must stay where they are too.
        model: The fingerprint of the model it was found in.
        source: Method, settings, hashes of the calibration data, and how well other safety
            prompts are covered.

    Example:
        >>> subspace = safeft.locate_subspace(model, tokenizer, harmful)  # doctest: +SKIP
        >>> subspace.basis("model.layers.0.mlp.up_proj.weight").shape  # doctest: +SKIP
        torch.Size([4096, 512])
    """

    directions: Mapping[str, Tensor]
    readers: Mapping[str, str]
    outputs: Mapping[str, int]
    digests: Mapping[str, int]
    tokens: Tensor
    model: ModelFingerprint
    source: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        directions: Mapping[str, Tensor],
        readers: Mapping[str, str],
        source: Mapping[str, Any] | None = None,
        tokens: Tensor | None = None,
    ) -> Self:
        """The subspace of these directions in ``model``, with digests of its weights as they are.

        Args:
            model: The model.
            directions: Input to ``(features, rank)``; need not be orthonormal.
            readers: Weight name to input.
            source: How they were found.
            tokens: Of the prompts they were found on.

        Raises:
            SelectionError: No weight or an unknown one, a rank of 0, one that leaves no free
                direction, or numbers that are no directions.
        """
        linears = find_linears(model, ("text", "vision", "projector"))
        _check_some(readers)
        for name, inlet in readers.items():
            if name not in linears:
                raise SelectionError(f"The model has no linear layer {name!r} to hold.")
            if inlet not in directions:
                raise SelectionError(
                    f"{name} is said to receive {inlet!r}, of which no directions are given; they "
                    f"are given of {', '.join(list(directions)[:3])}."
                )
            _check_rank(name, tuple(directions[inlet].shape), linears[name].features)
        weights = ModelWeights(model)
        return cls(
            {inlet: _kept(inlet, found) for inlet, found in directions.items()},
            dict(readers),
            {name: linears[name].outputs for name in readers},
            {name: _digest(weights, name) for name in readers},
            torch.zeros(0, dtype=torch.long) if tokens is None else tokens.unique().cpu(),
            ModelFingerprint.of(model),
            dict(source or {"method": "given"}),
        )

    @cached_property
    def _bases(self) -> dict[str, Tensor]:
        return {inlet: torch.linalg.qr(d.float()).Q for inlet, d in self.directions.items()}

    def basis(self, weight: str) -> Tensor:
        """The orthonormal basis of a weight's held inputs, float32 ``(features, rank)``."""
        return self._bases[self.readers[weight]]

    @property
    def share(self) -> float:
        """Share of the rank of all its weights that is held, outputs weighing, 0 to 1."""
        held = whole = 0
        for name, inlet in self.readers.items():
            features, rank = self.directions[inlet].shape
            held += rank * self.outputs[name]
            whole += features * self.outputs[name]
        return held / whole

    @cached_property
    def hash(self) -> str:
        """SHA-256 over directions, readers and digests: what a certificate refers to."""
        digest = hashlib.sha256(self.model.layout.encode())
        for name, inlet in self.readers.items():
            digest.update(json.dumps([name, inlet, self.digests[name]]).encode())
        for inlet, found in self.directions.items():
            digest.update(json.dumps([inlet, *found.shape]).encode())
            digest.update(found.contiguous().view(torch.uint8).numpy().data)
        digest.update(self.tokens.numpy().tobytes())
        return digest.hexdigest()

    def at_random(self, seed: int = 0) -> Self:
        """As many directions of each input, drawn at random: the control."""
        draw = torch.Generator().manual_seed(seed)
        drawn = {
            inlet: torch.linalg.qr(torch.randn(found.shape, generator=draw)).Q.half()
            for inlet, found in self.directions.items()
        }
        source = {"method": "random", "seed": seed, "ranks_of": dict(self.source)}
        kept = (self.readers, self.outputs, self.digests, self.tokens, self.model)
        return type(self)(drawn, *kept, source)

    def moved(self, weights: Weights) -> list[str]:
        """The weights that are not those the subspace was found in."""
        return [name for name, was in self.digests.items() if _digest(weights, name) != was]

    def check_model(self, model: nn.Module, *, weights_too: bool = True) -> None:
        """Refuse a model that this subspace was not found in.

        Raises:
            FingerprintError: Other names or shapes, or other weights.
        """
        here = ModelFingerprint.of(model)
        check_layout(self.model, here)
        if weights_too:
            self.check_weights(ModelWeights(model), here.name_or_path or "the model")

    def check_weights(self, weights: Weights, where: str) -> None:
        """The part of :meth:`check_model` that reads weights.

        Raises:
            FingerprintError: Some are others.
        """
        if moved := self.moved(weights):
            raise FingerprintError(
                f"{len(moved)} of {len(self.digests)} weights ({moved[0]}) are not in {where} what "
                f"they were in {self.model.name_or_path or 'the model'!r}, in which this subspace "
                "was found: this is another checkpoint, whose safety may use other directions. "
                "Locate in this checkpoint."
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the subspace as a folder: ``config.json``, ``model.safetensors`` and a card.

        Raises:
            ArtefactError: The folder holds something else, or cannot be written.
        """
        folder = Path(folder)
        check_own(folder, "SafetySubspace")
        tensors = {inlet: found.contiguous() for inlet, found in self.directions.items()}
        data = save(tensors | {_TOKENS: self.tokens})
        config = {
            "safeft": SCHEMA_VERSION,
            "kind": "SafetySubspace",
            "base_model": self.model.to_dict(),
            "source": dict(self.source),
            "share": self.share,
            "readers": dict(self.readers),
            "outputs": dict(self.outputs),
            "digests": dict(self.digests),
            "ranks": {inlet: list(found.shape) for inlet, found in self.directions.items()},
            "tensors_sha256": sha256(data),
        }
        card = _CARD.format(
            count=len(self.readers),
            model=self.model.name_or_path or self.model.model_type,
            share=self.share,
        )
        settings = json.dumps(config, indent=2) + "\n"
        write_together(folder, {TENSORS_NAME: data, CONFIG_NAME: settings, CARD_NAME: card})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a subspace that :meth:`save_pretrained` wrote.

        Raises:
            ArtefactError: Missing, truncated, edited, or something else.
        """
        folder = Path(folder)
        config = read_config(folder)
        if config.get("kind") != "SafetySubspace" or config.get("safeft") != SCHEMA_VERSION:
            raise ArtefactError(
                f"{str(folder)!r} is no safety subspace of schema {SCHEMA_VERSION} (kind: "
                f"{config.get('kind')!r}, schema {config.get('safeft')!r}). Give the folder that "
                "`safeft locate --method subspace` wrote."
            )
        with intact(folder, "Locate again"):
            tensors = read_tensors(folder / TENSORS_NAME, config["tensors_sha256"], "Locate again")
            fingerprint = ModelFingerprint.read(config["base_model"])
            found = {str(inlet): tensors[inlet] for inlet in config["ranks"]}
            readers = {str(name): str(inlet) for name, inlet in config["readers"].items()}
            outputs = {str(name): int(count) for name, count in config["outputs"].items()}
            digests = {str(name): int(digest) for name, digest in config["digests"].items()}
            whole = set(readers) == set(outputs) == set(digests)
            if not whole or not set(readers.values()) <= set(found):
                raise ValueError("it names inputs or weights that it does not hold")
            _check_some(readers)
            for name, inlet in readers.items():
                _check_rank(name, tuple(found[inlet].shape), found[inlet].shape[0])
            tokens = tensors[_TOKENS]
            source = dict(config.get("source", {}))
        return cls(found, readers, outputs, digests, tokens, fingerprint, source)

    def push_to_hub(self, repo_id: str, *, private: bool = True) -> None:
        """Upload the folder to a hub repository, private unless you say otherwise."""
        upload(self.save_pretrained, repo_id, private)


def load_protected(folder: str | Path) -> "NeuronSet | SafetySubspace":
    """The artefact in a folder that ``safeft locate`` wrote, of whichever kind it is.

    Raises:
        ArtefactError: It is none, or is damaged.
    """
    if read_config(Path(folder)).get("kind") == "SafetySubspace":
        return SafetySubspace.from_pretrained(folder)
    return NeuronSet.from_pretrained(folder)


def protected_pair(
    protected: NeuronSet | SafetySubspace | str | Path,
    subspace: SafetySubspace | str | Path | None = None,
) -> tuple[NeuronSet | None, SafetySubspace | None]:
    """What is to be held, a set or a subspace or one beside the other, read where it is a folder.

    Raises:
        ArtefactError: A folder holds neither, or is damaged.
        ConfigError: Two subspaces.
    """
    if isinstance(protected, (str, Path)):
        protected = load_protected(protected)
    if isinstance(subspace, (str, Path)):
        subspace = SafetySubspace.from_pretrained(subspace)
    if isinstance(protected, NeuronSet):
        return protected, subspace
    if subspace is not None:
        raise ConfigError(
            "Two subspaces are given, and which of them is to be held is not said. Give one, "
            "located with the prompts of both; beside it a neuron set."
        )
    return None, protected


def _kept(inlet: str, directions: Tensor) -> Tensor:
    """Directions at length 1 as float16, whose range lengths could leave."""
    found = directions.detach().to("cpu", torch.float32)
    lengths = found.norm(dim=0)
    if not bool((lengths.isfinite() & (lengths > 0)).all()):
        raise SelectionError(
            f"Of the {found.shape[1]} directions of what {inlet} receives, some are zero or not "
            "finite, and would hold nothing that is meant. Leave them out."
        )
    return (found / lengths).half()


def _check_some(readers: Mapping[str, str]) -> None:
    if not readers:
        raise SelectionError(
            "The subspace names no layer. Holding nothing protects nothing, and it would look like "
            "protection."
        )


def _check_rank(name: str, shape: tuple[int, ...], features: int) -> None:
    if len(shape) != 2 or shape[0] != features or not 0 < shape[1] < features:
        rank = shape[1] if len(shape) == 2 else 0
        raise SelectionError(
            f"{name} has {features} inputs, of which {rank} directions (a basis of shape {shape}) "
            "are to be held. A rank of 0 holds nothing, and one of all inputs leaves the layer "
            f"nothing to learn with; give between 1 and {features - 1}."
        )


def _digest(weights: Weights, name: str) -> int:
    """64 bits of BLAKE2b over some rows, rounded to bfloat16 as those of neurons are."""
    shape = weights.shape(name)
    if shape is None:
        raise FingerprintError(
            f"The model has no weight {name!r}, which the subspace was found for. It was made for "
            "another model; locate in this one."
        )
    count = count_of(form_of(shape), "rows")
    rows = torch.linspace(0, count - 1, min(count, _SAMPLED_ROWS)).long().unique()
    values = weights.read(name, "rows", rows).to(torch.bfloat16).contiguous()
    found = hashlib.blake2b(values.view(torch.int16).numpy().tobytes(), digest_size=8)
    return int.from_bytes(found.digest(), "little", signed=True)
