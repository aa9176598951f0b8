"""``GuardFitter``: labelled texts in, a guard out.

Style of SIREN (Jiao et al., arXiv 2604.18519, section 3; their released runtime is ``llm-siren``):
sparse probes say which units of each layer tell harmful from harmless, layers weigh by how well
they do, and a small network reads the selected units. Unlike the paper: what is chosen is chosen
by what transfers to a source left out (:mod:`safeft.guard.transfer`), the depth to read from among
it, and the probes' own verdict is half of the score. Beside the paper: MLP units as well as the
residual stream, standardised units, calibrated probabilities, further labels, thresholds for a
wanted false-positive rate.
"""

import logging
import tempfile
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from safeft.errors import ConfigError, PromptError, SelectionError
from safeft.fingerprint import ModelFingerprint
from safeft.guard.figures import auroc, by_source, mean_f1, platt
from safeft.guard.folds import folds
from safeft.guard.guards import Guard
from safeft.guard.head import GuardHead, LayerProbe, weights_of
from safeft.guard.places import KINDS, Kind, find_places
from safeft.guard.pooling import FeatureStore, fill
from safeft.guard.probes import chunks
from safeft.guard.reading import Example, as_examples, longest, text_hashes, windows
from safeft.guard.training import outputs, searched
from safeft.guard.transfer import parts_of, transferring
from safeft.prompts import Reader, tokenizer_of

logger = logging.getLogger(__name__)

Label: TypeAlias = bool | int | Iterable[str]
"""Whether a text is harmful; or the names of what it is, none for a harmless one."""


@dataclass(frozen=True)
class _Text:
    """A text on its way into a guard; ``key`` is its hash, ``row`` where its activations are."""

    key: int
    row: int
    label: bool | frozenset[str]
    source: str
    group: Hashable

    @property
    def kind(self) -> tuple[str, bool]:
        return self.source, bool(self.label)


LEAST = 20
"""Texts of a further label, below which it gets no output."""


class GuardFitter:
    """Gathers labelled texts and their activations, then fits.

    Args:
        model: Any transformers model with a known layout: a chat model, an encoder, a guard model.
        tokenizer: Its tokenizer.
        kinds: What to read: ``residual``, ``mlp`` or both.
        chat: Show texts as user turns of its chat template; by default where it has one.
        chat_template: A Jinja template instead of the tokenizer's.
        max_length: Tokens of a text; by default 512, or as many as the model takes.
        batch_size: Texts a pass.
        cache: Folder where activations are kept between runs; by default they go with the fitter.

    Example:
        >>> fitter = GuardFitter(model, tokenizer)  # doctest: +SKIP
        >>> fitter.update(["How do I bake bread?", "How do I poison a well?"], [False, True])
        ... # doctest: +SKIP
        >>> fitter.fit().save_pretrained("guard")  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Reader,
        *,
        kinds: Sequence[Kind] = KINDS,
        chat: bool | None = None,
        chat_template: str | None = None,
        max_length: int | None = None,
        batch_size: int = 16,
        cache: str | Path | None = None,
    ) -> None:
        self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size
        self._places = find_places(model, kinds)
        plain = tokenizer_of(tokenizer)
        if chat is None:
            chat = chat_template is not None or plain.chat_template is not None
        self.reading: dict[str, Any] = {
            "chat": chat,
            "chat_template": chat_template,
            "max_length": longest(model, max_length or min(512, longest(model))),
        }
        self._weights = weights_of(model)
        owner = f"{self._weights}/{[place.name for place in self._places]}"
        self._store = FeatureStore(cache, owner, sum(place.width for place in self._places))
        self._texts: dict[int, _Text] = {}
        self._contradicted: set[int] = set()
        self._repeated = self._cut = self._answers = 0

    def __len__(self) -> int:
        return len(self._texts)

    def update(
        self,
        examples: Iterable[Example],
        labels: Iterable[Label],
        *,
        source: str = "texts",
        groups: Iterable[Hashable] | None = None,
    ) -> None:
        """Take in labelled texts; a text that was given before counts once.

        Of a text above ``max_length`` tokens the beginning is fitted on. Texts that are called
        harmful and harmless, case and punctuation aside, are left out of the fit.

        Args:
            examples: Texts; or chats, of which the answer is read where there is one.
            labels: One a text.
            source: Where they come from: sources weigh alike, and in each its harmful and harmless
                texts, however many they are.
            groups: Texts of one group (variants of one template) are kept on one side.

        Raises:
            PromptError: An empty text, or not as many labels as texts.
            ActivationError: Activations that are no numbers.
        """
        prompts = as_examples(examples)
        named = [_label(label) for label in labels]
        grouped = list(groups) if groups is not None else list(range(len(prompts)))
        if not len(prompts) == len(named) == len(grouped):
            raise PromptError(
                f"{len(prompts)} texts come with {len(named)} labels and {len(grouped)} groups, "
                "so it is unknown which belongs to which. Give one of each a text."
            )
        new: dict[int, int] = {}
        for number, key in enumerate(text_hashes(prompts).tolist()):
            known = self._texts[key].label if key in self._texts else named[new.get(key, number)]
            if bool(known) is not bool(named[number]):
                self._contradicted.add(key)
            if key not in self._texts:
                new.setdefault(key, number)
        self._repeated += len(prompts) - len(new)
        length, chat, template = (
            self.reading[name] for name in ("max_length", "chat", "chat_template")
        )
        first = []
        for number in new.values():
            parts = windows(self._tokenizer, prompts[number], length, chat, template)
            self._cut += len(parts) > 1
            self._answers += prompts[number].response is not None
            first.append(parts[0])
        rows = fill(
            self._store, self._model, self._tokenizer, self._places, first, self._batch_size
        )
        for (key, number), row in zip(new.items(), rows.tolist(), strict=True):
            group = (source, groups is not None, grouped[number])
            self._texts[key] = _Text(key, row, named[number], source, group)

    def fit(
        self,
        *,
        share: float = 0.9,
        validation: float = 0.2,
        search: int = 8,
        members: int = 5,
        seed: int = 0,
    ) -> Guard:
        """Select units, weigh layers, train and calibrate.

        Args:
            share: Of each probe's absolute weight that the selected units hold.
            validation: Share of the texts by which probes' strengths are chosen and scores
                calibrated; no weight is trained on them.
            search: Recipes of the network to try.
            members: Networks, each stopped by another part of the training texts.
            seed: Of the parts and the networks.

        Raises:
            PromptError: Harmful or harmless texts are missing, or too few.
            ConfigError: A share out of range.
            SelectionError: The activations do not tell harmful from harmless texts.
        """
        _check_shares(share, validation, search, members)
        started = time.perf_counter()
        texts = self._agreed()
        harmful = torch.tensor([bool(text.label) for text in texts])
        _check_sides(harmful, members)
        keys, groups = [text.kind for text in texts], [text.group for text in texts]
        parts = folds(keys, groups, max(2, round(1 / validation)), seed)
        held, trained = parts[0], torch.cat(parts[1:]).sort().values
        rows = torch.tensor([text.row for text in texts])
        by = by_source([texts[n].source for n in held.tolist()], harmful[held])
        names, targets = _targets(texts, trained, held)
        counts = _counts(texts)
        parts, apart = parts_of([text.source for text in texts], groups, harmful, trained, seed)
        probes, transfer = self._probes(
            rows, harmful, counts, trained, held, by, parts, apart, share
        )
        probed = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            inputs = self._inputs(probes, rows, Path(folder) / "inputs.float32")
            inner = trained.tolist()
            stops = folds([keys[n] for n in inner], [groups[n] for n in inner], members, seed + 1)
            network, about = searched(
                inputs, targets, counts, [trained[s] for s in stops], search, seed
            )
            line, offset = _line(probes)
            network = network.beside(line, offset, inputs, trained)
            # As it is saved: a guard scores the same after loading.
            network = replace(network, first=network.first.half().float())
            logits = outputs(network, inputs, held)
            del inputs
        calibration = _calibrated(logits, targets[held])
        scores = (logits * calibration[0] + calibration[1]).sigmoid()[:, 0]
        ranked = auroc(scores, harmful[held])
        if not (ranked > 0.5 and calibration[0, 0] > 0):
            raise SelectionError(
                f"On {len(held)} validation texts the guard ranks harmful above harmless ones in "
                f"{ranked:.0%} of pairs, no better than chance. Are the labels right?"
            )
        source = {
            "kinds": sorted({place.kind for place in self._places}),
            "share": share,
            "seed": seed,
            "texts": {"train": len(trained), "validation": len(held)},
            "sources": {
                name: {"texts": count, "harmful": sum(h for s, h in keys if s == name)}
                for name, count in Counter(text.source for text in texts).items()
            },
            "repeated": self._repeated,
            "contradicted": len(self._contradicted),
            "cut": self._cut,
            "answers": self._answers,
            "transfer": {"over": "sources" if apart else "random parts", **transfer},
            "network": about,
            "validation": {
                "macro_f1": float(mean_f1(torch.logit(scores)[:, None], harmful[held], by)),
                "auroc": ranked,
            },
            "seconds": {"probes": probed - started, "network": time.perf_counter() - probed},
        }
        head = GuardHead(
            tuple(probes),
            network,
            names,
            calibration,
            scores[~harmful[held]].sort().values,
            torch.tensor(sorted(self._texts)),
            ModelFingerprint.of(self._model),
            self._weights,
            self.reading,
            source,
        )
        return Guard(head, self._model, self._tokenizer)

    def _agreed(self) -> list[_Text]:
        """The texts whose labels agree."""
        if self._contradicted:
            logger.warning(
                "%d texts are called harmful once and harmless once, case and punctuation aside; "
                "they are left out.", len(self._contradicted),
            )  # fmt: skip
        return [text for key, text in self._texts.items() if key not in self._contradicted]

    def _probes(self, rows: Tensor, *given: Any) -> tuple[list[LayerProbe], dict[str, Any]]:
        return transferring(self._store.features, self._places, rows, *given)

    def _inputs(self, probes: Sequence[LayerProbe], rows: Tensor, path: Path) -> Tensor:
        """Selected units, standardised and weighed, float32 ``(texts, units)``, on disk."""
        units = sum(len(probe.selected) for probe in probes)
        made = torch.from_numpy(np.memmap(path, np.float32, "w+", shape=(len(rows), units)))
        at = 0
        for part in chunks(self._store.features, rows):
            start, pieces = 0, []
            for probe in probes:
                chosen = probe.selected
                piece = part[:, start + chosen].sub_(probe.mean[chosen]).div_(probe.scale[chosen])
                pieces.append(piece.mul_(probe.layer_weight))
                start += probe.place.width
            made[at : at + len(part)] = torch.cat(pieces, 1)
            at += len(part)
        return made


def _line(probes: Sequence[LayerProbe]) -> tuple[Tensor, float]:
    """What the probes say together, as one line over the units that are read."""
    offset = sum(probe.layer_weight * probe.bias for probe in probes if len(probe.selected))
    return torch.cat([probe.weights[probe.selected] for probe in probes]), offset


def _targets(
    texts: Sequence[_Text], trained: Tensor, held: Tensor
) -> tuple[tuple[str, ...], Tensor]:
    """Names of the outputs, and ``(texts, outputs)``: NaN where a source names no labels."""
    named = {text.source for text in texts if isinstance(text.label, frozenset)}
    counts = Counter(
        name for text in texts if isinstance(text.label, frozenset) for name in text.label
    )
    names: list[str] = []
    columns = [torch.tensor([float(bool(text.label)) for text in texts])]
    for name in sorted(counts):
        column = torch.tensor(
            [
                float("nan")
                if text.source not in named
                else float(isinstance(text.label, frozenset) and name in text.label)
                for text in texts
            ]
        )
        few = column[trained].nansum() < LEAST or column[held].nansum() < LEAST // 4
        if few or name == "harmful":
            logger.warning(
                "%r is the label of %d texts, too few for an output of its own (%d); they count "
                "as harmful all the same.", name, counts[name], LEAST * 5 // 4,
            )  # fmt: skip
            continue
        names.append(name)
        columns.append(column)
    return ("harmful", *names), torch.stack(columns, 1)


def _counts(texts: Sequence[_Text]) -> Tensor:
    """What each text counts for: sources alike, and in each harmful and harmless alike."""
    sizes = Counter(text.kind for text in texts)
    counts = torch.tensor([1 / sizes[text.kind] for text in texts])
    return counts / counts.mean()


def _label(label: Any) -> bool | frozenset[str]:
    if isinstance(label, bool | int) and label in (0, 1):
        return bool(label)
    if isinstance(label, Iterable) and not isinstance(label, str):
        names = frozenset(label)
        if all(isinstance(name, str) for name in names):
            return names
    raise PromptError(
        f"A text has the label {label!r}. Give True or False, or the names of what it is (none "
        "for a harmless text)."
    )


def _check_shares(share: float, validation: float, search: int, members: int) -> None:
    if not (0 < share <= 1 and 0 < validation <= 0.5 and search >= 1 and members >= 2):
        raise ConfigError(
            f"share={share}, validation={validation}, search={search}, members={members}: the "
            "first is above 0 to 1, the second above 0 to 0.5, and there is at least 1 recipe and "
            "2 members."
        )


def _check_sides(harmful: Tensor, members: int) -> None:
    counts = int(harmful.sum()), int((~harmful).sum())
    if min(counts) == 0:
        raise PromptError(
            f"All {len(harmful)} texts are called {'harmful' if counts[0] else 'harmless'}; there "
            "is nothing to tell apart. Give texts of both kinds."
        )
    if min(counts) < 4 * members:
        raise PromptError(
            f"There are {counts[0]} harmful and {counts[1]} harmless texts, too few to train "
            f"{members} members and to check them; some 100 of each are a start, and {4 * members} "
            "the least."
        )


def _calibrated(logits: Tensor, targets: Tensor) -> Tensor:
    """Slope and offset of each output, float32 ``(2, outputs)``."""
    found = []
    for logit, target in zip(logits.T, targets.T, strict=True):
        known = ~target.isnan()
        found.append(platt(logit[known], target[known]))
    return torch.tensor(found).T.contiguous()
