"""``attribution``: units on which the decision to refuse hangs (single-neuron study style)."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeft.capture import watch_inputs
from safeft.errors import PromptError
from safeft.judge import PrefixJudge, default_refusal_openings
from safeft.locate.gradients import input_gradients
from safeft.locate.scores import Moments, Scores, Side, forward
from safeft.prompts import Batch, Prompt, generate
from safeft.sites import Site

logger = logging.getLogger(__name__)


class AttributionFitter:
    """``max_t (g_H + g_B) (a_B - a_H)`` at the template tokens t after the instruction.

    ``g`` is the mean gradient of ``L = -log(p / (1 - p))`` with respect to the unit's activation,
    ``p`` the probability of a first token that opens a refusal, ``a`` the mean activation: the
    first-order effect on refusal of giving the unit its benign value. A unit that is no more
    active on harmful prompts gets at most 0. Source: "A Single Neuron Is Sufficient to Bypass
    Safety Alignment" (arXiv 2605.08513); the paper looks at the first two thirds of the layers,
    here all are scored. One forward and backward pass, no weight gradients.

    Args:
        model: The model.
        sites: The sites to score.
        openings: Token numbers that start a refusal, see :func:`refusal_tokens`.
    """

    needs_responses = False

    def __init__(
        self, model: PreTrainedModel, sites: Mapping[str, Site], openings: Sequence[int]
    ) -> None:
        self._model, self._sites = model, sites
        self._openings = torch.tensor(sorted(set(openings)))
        self._by_writer = {site.writes.module: site.name for site in sites.values()}
        self._activations: dict[tuple[Side, str], Moments] = {}
        self._gradients: dict[tuple[Side, str], Moments] = {}
        for side in ("harmful", "benign"):
            for name in sites:
                self._activations[side, name] = Moments()
                self._gradients[side, name] = Moments()

    def update(self, side: Side, batch: Batch) -> None:
        """One forward and backward pass over ``batch``."""
        chosen = batch.choose("post_instruction")

        def gather(moments: Moments) -> Callable[[Tensor], None]:
            return lambda values: moments.update(
                values.detach()[chosen].unflatten(0, (len(chosen), batch.tail)).flatten(1)
            )

        def observe(writer: str, inputs: Tensor) -> None:
            name = self._by_writer[writer]
            gather(self._activations[side, name])(inputs)
            inputs.register_hook(gather(self._gradients[side, name]))

        last = batch.choose("last_prompt").long().argmax(1)
        with input_gradients(self._model):
            with watch_inputs(self._model, list(self._by_writer), observe):
                logits = forward(self._model, batch, keep_logits=0)
            at_last = logits[torch.arange(len(last)), last].float()
            self._refusal_loss(at_last).sum().backward()

    def _refusal_loss(self, logits: Tensor) -> Tensor:
        """``-log(p / (1 - p))`` per prompt, from logits so that it does not saturate."""
        refuses = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        refuses[self._openings.to(logits.device)] = True
        inside = logits.masked_fill(~refuses, -torch.inf).logsumexp(-1)
        return logits.masked_fill(refuses, -torch.inf).logsumexp(-1) - inside

    def scores(self) -> Scores:
        """One score per unit; there is no separate utility side."""
        return Scores(
            {name: self._score(site) for name, site in self._sites.items()}, None, "plain"
        )

    def _score(self, site: Site) -> Tensor:
        def mean(moments: Mapping[tuple[Side, str], Moments], side: Side) -> Tensor:
            found = moments[side, site.name].mean
            return found.unflatten(0, (-1, site.units, site.width))

        harmful, benign = mean(self._activations, "harmful"), mean(self._activations, "benign")
        slope = mean(self._gradients, "harmful") + mean(self._gradients, "benign")
        effect = (slope * (benign - harmful)).sum(-1)
        more_active = harmful.norm(dim=-1) > benign.norm(dim=-1)
        return torch.where(more_active, effect, effect.clamp(max=0)).amax(0)


def refusal_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[Prompt],
    benign: Sequence[Prompt],
    *,
    openings: Sequence[str] | None = None,
    chat_template: str | None = None,
    sample: int = 32,
) -> dict[int, str]:
    """First tokens of a refusal, with the text each stands for.

    Taken from ``openings`` where given; else from the model's own refusals of up to ``sample``
    harmful prompts; where the judge knows none of these as refusals (another language, say), from
    what opens them and hardly any benign answer; else from the default list. Tokens that the model
    also opens benign answers with (more often than it opens refusals with them) say nothing about
    refusal and are dropped.

    Raises:
        PromptError: Nothing is left, so refusal cannot be told from the first token.
    """

    def first_token(text: str) -> int:
        return tokenizer(text, add_special_tokens=False)["input_ids"][0]  # pyright: ignore

    if openings:
        given = {first_token(text): text for text in openings if text.strip()}
        if not given:
            raise PromptError(
                f"The refusal openings {list(openings)} hold no text, so refusal cannot be read "
                "from a first token. Give some, or leave `openings` out."
            )
        return given

    def answers(prompts: Sequence[Prompt]) -> list[str]:
        return generate(
            model, tokenizer, prompts[:sample], max_new_tokens=12, chat_template=chat_template
        )

    asked, replies = harmful[:sample], answers(harmful)
    refused = PrefixJudge()([prompt.text for prompt in asked], replies)
    refusals = [reply for reply, said_no in zip(replies, refused, strict=True) if said_no and reply]
    served = Counter(first_token(reply) for reply in answers(benign) if reply)
    shares = Counter(first_token(text) for text in refusals)
    if not refusals:
        shares = _setting_apart(Counter(first_token(reply) for reply in replies if reply), served)
        logger.warning(
            "None of %d answers to harmful prompts starts as a known refusal; taking %s for one. "
            "Give `openings` if that is wrong.",
            len(replies),
            [tokenizer.decode([token]) for token in shares] or "the default list",
        )
        shares = shares or Counter(first_token(text) for text in default_refusal_openings())
    kept = {
        token: str(tokenizer.decode([token]))
        for token, count in shares.items()
        if count / sum(shares.values()) > served[token] / max(1, sum(served.values()))
    }
    if not kept:
        raise PromptError(
            f"The model opens benign answers with the same first tokens as refusals "
            f"({[tokenizer.decode([token]) for token in shares]}), so refusal cannot be read from "
            "them. Give refusal openings that set them apart (`openings`)."
        )
    return kept


def _setting_apart(harmful: Counter[int], benign: Counter[int]) -> Counter[int]:
    """First tokens of at least a quarter of the harmful answers and half as many benign ones."""
    of_harmful, of_benign = max(1, sum(harmful.values())), max(1, sum(benign.values()))
    shares = {token: count / of_harmful for token, count in harmful.items()}
    apart = {t for t, share in shares.items() if share >= max(0.25, 2 * benign[t] / of_benign)}
    return Counter({token: count for token, count in harmful.items() if token in apart})
