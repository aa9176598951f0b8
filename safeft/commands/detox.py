"""``safeft detox``: find the units that drive toxic output, dampen them, measure, fold, undo."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safeft.commands.loading import load_model, read_template
from safeft.commands.parsing import parse
from safeft.errors import ConfigError


@dataclass
class DetoxConfig:
    """Find the units that tell toxic from neutral text, and turn them down.

    Texts of either class come as prompts, or as rows with a `response` that the model is to have
    written. With `--prompts` and `--judge` the trade-off is measured, with `--fold` the gains go
    into the weights.
    """

    model_name_or_path: str = field(metadata={"help": "Model: folder or hub name."})
    output_dir: str = field(metadata={"help": "Folder for dampener and report; of undo, model."})
    toxic: str | None = field(default=None, metadata={"help": "Toxic texts: .txt, .csv, .json(l)."})
    neutral: str | None = field(default=None, metadata={"help": "Other texts, in the same forms."})
    labelled: str | None = field(
        default=None, metadata={"help": "Both in one table instead, with labels 1 (toxic) and 0."}
    )
    label_column: str = field(default="label", metadata={"help": "Its column of labels."})
    text_column: str = field(default="text", metadata={"help": "Its column of texts."})
    toxic_column: str | None = field(default=None, metadata={"help": "Column of a table."})
    neutral_column: str | None = field(default=None, metadata={"help": "Column of a table."})
    response_column: str | None = field(
        default=None, metadata={"help": "Column with what the model is to have written."}
    )
    dampener: str | None = field(
        default=None, metadata={"help": "Use this dampener (folder) instead of finding units."}
    )
    rule: Literal["aura", "det0", "constant", "sgm", "threshold", "fitted"] = field(
        default="aura",
        metadata={"help": "How expertise becomes gains; fitted: gains by their effect instead."},
    )
    ordinary: str | None = field(
        default=None,
        metadata={"help": "Of fitted: texts whose loss may not rise; none: `neutral`."},
    )
    strength: float | None = field(
        default=None,
        metadata={"help": "How much: 1 if none is said; constant 0.5, sgm 0.9, threshold 0."},
    )
    fraction: float | None = field(
        default=None, metadata={"help": "Share of units: det0, constant, sgm 0.05, fitted 0.3."}
    )
    count: int | None = field(default=None, metadata={"help": "Number of units instead."})
    first_layer: int = field(default=0, metadata={"help": "Of sgm: first layer after fusion."})
    amplify: bool = field(default=False, metadata={"help": "Of aura: let gains rise above 1."})
    pool: Literal["max", "mean", "last"] = field(
        default="max", metadata={"help": "A unit's response to a text, over its tokens."}
    )
    signed: bool = field(default=False, metadata={"help": "Read activations with their sign."})
    chance: float = field(
        default=0.05, metadata={"help": "Share of label shuffles whose best unit may pass; 1: all."}
    )
    shuffles: int = field(default=200, metadata={"help": "How often labels are shuffled."})
    sites: Literal["mlp", "attention", "all"] = field(
        default="mlp", metadata={"help": "MLP hidden units, attention heads, or both."}
    )
    towers: list[str] = field(
        default_factory=lambda: ["text"],
        metadata={"help": "Of a model that sees images: text, projector, vision."},
    )
    check: bool = field(
        default=False,
        metadata={"help": "Mute each unit on its own, on texts kept back; keep those that pay."},
    )
    price: float | None = field(
        default=None,
        metadata={"help": "What costs weigh; of check (0.5) and fitted (20)."},
    )
    prompts: str | None = field(default=None, metadata={"help": "What is continued and judged."})
    prompts_column: str | None = field(default=None, metadata={"help": "Column of a table."})
    neutral_test: str | None = field(
        default=None, metadata={"help": "Texts for perplexity (rows with `response`, or texts)."}
    )
    benign: str | None = field(
        default=None, metadata={"help": "Ordinary prompts, to count refusals among them."}
    )
    groups: str | None = field(
        default=None, metadata={"help": "JSON of identity groups: prompts, words, texts."}
    )
    judge: str | None = field(
        default=None,
        metadata={"help": "A text classifier (folder or hub name), or a .txt of toxic words."},
    )
    toxic_label: str = field(default="toxic", metadata={"help": "The classifier's label."})
    strengths: list[float] = field(
        default_factory=list, metadata={"help": "Strengths to draw the trade-off with."}
    )
    draws: int = field(
        default=0, metadata={"help": "Continuations drawn a prompt (nucleus 0.9); 0: one greedy."}
    )
    max_new_tokens: int = field(default=32, metadata={"help": "Of each continuation."})
    fold: str | None = field(
        default=None, metadata={"help": "Put the gains into the weights and save the model here."}
    )
    undo: bool = field(default=False, metadata={"help": "Take a fold out of the model again."})
    seed: int = field(default=0, metadata={"help": "Of shuffles, bootstrap and controls."})
    batch_size: int = field(default=16, metadata={"help": "Prompts per pass."})
    max_length: int = field(default=1024, metadata={"help": "Tokens per prompt."})
    limit: int | None = field(default=None, metadata={"help": "Use the first N rows of each file."})
    chat_template_path: str | None = field(
        default=None, metadata={"help": "Jinja template, where the tokenizer has none."}
    )
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16, float16."})
    device: str | None = field(default=None, metadata={"help": "cuda where there is one, or cpu."})


def main(arguments: Sequence[str]) -> int:
    """Read, load, find, dampen, measure, fold."""
    (config,) = parse([DetoxConfig], arguments, "detox", DetoxConfig.__doc__ or "")
    assert isinstance(config, DetoxConfig)
    check_keys(config)
    if config.undo:
        return _undo(config)
    from safeft.detox.dampener import Dampener
    from safeft.detox.folding import check_not_folded
    from safeft.detox.saving import check_free

    if config.fold:
        check_free(config.fold)
    given = Dampener.from_pretrained(config.dampener) if config.dampener else None
    texts = _texts(config) if given is None else None
    measured = _measured(config)
    template = read_template(config.chat_template_path)
    model, tokenizer = load_model(config.model_name_or_path, config.dtype, config.device)
    check_not_folded(model)
    batching: dict[str, Any] = {
        "batch_size": config.batch_size,
        "max_length": config.max_length,
        "chat_template": template,
    }
    made: dict[float, Any] = {}
    if given is None:
        assert texts is not None
        dampener, made = _found(config, model, tokenizer, texts, batching)
        dampener.save_pretrained(config.output_dir)
    else:
        given.neurons.check_model(model)
        dampener = given
    rule, place = dampener.neurons.source.get("rule"), config.dampener or config.output_dir
    print(f"{len(dampener)} units in {len(dampener.gains)} blocks by {rule}: {place}")
    if measured is not None:
        neutral = measured.pop("neutral") or (texts[1] if texts else [])
        measured["neutral"], command = neutral, " ".join(["safeft detox", *arguments])
        _measure(config, model, tokenizer, dampener, made, measured, batching, command)
    return _fold(config, model, tokenizer, dampener) if config.fold else 0


def check_keys(config: DetoxConfig) -> None:
    """Refuse keys that would be without effect, or that lack what they need.

    Raises:
        ConfigError: There are such.
    """
    if config.undo:
        given = [n for n in ("toxic", "neutral", "labelled", "dampener", "fold", "prompts", "judge")
                 if getattr(config, n)]  # fmt: skip
        if given:
            raise ConfigError(f"undo takes a folded model back and reads no {given}.")
        return
    apart, whole = bool(config.toxic and config.neutral), bool(config.labelled)
    if config.dampener is None and apart == whole:
        raise ConfigError(
            "Give `toxic` and `neutral` texts to find units with, or both in one `labelled` table, "
            "or a `dampener` that was found before: with one class only nothing can be told apart."
        )
    if config.dampener is not None and (config.toxic or config.neutral or whole or config.check):
        raise ConfigError("`dampener` is found already: leave texts and check out.")
    if (config.prompts is None) != (config.judge is None):
        raise ConfigError(
            "Measuring needs both `prompts` to be continued and a `judge` that says which "
            "continuations are toxic (a classifier, or a .txt of words)."
        )
    if config.prompts is None and (config.strengths or config.groups or config.benign):
        raise ConfigError("strengths, groups and benign are for measuring: give prompts and judge.")
    if config.dampener is not None and config.prompts and not config.neutral_test:
        raise ConfigError("Give `neutral_test` texts: perplexity is half of the trade-off.")
    if config.strengths and (config.rule == "det0" or config.dampener):
        raise ConfigError(
            "strengths draws the trade-off of a rule with a strength, found in this run: use aura, "
            "constant, sgm or threshold, and no `dampener`."
        )
    if config.dampener is None:
        _check_rule(config)


def _check_rule(config: DetoxConfig) -> None:
    """Refuse what the rule does not read."""
    if config.rule != "fitted":
        if config.ordinary:
            raise ConfigError("`ordinary` texts go with rule='fitted' alone.")
        if config.rule == "threshold" and config.fold:
            raise ConfigError(
                "rule='threshold' caps activations, and no weight does that, so it cannot be "
                "folded. Leave `fold` out, or use a rule of gains (aura, constant, sgm, det0)."
            )
        from safeft.detox.rules import check_settings

        for strength in (config.strength, *config.strengths):
            check_settings(config.rule, strength, config.fraction, config.count,
                           config.first_layer, config.amplify)  # fmt: skip
        return
    usual = DetoxConfig("", "")
    given = [n for n in ("count", "first_layer", "amplify", "pool", "signed", "chance", "shuffles",
                         "towers", "check")
             if getattr(config, n) != getattr(usual, n)]  # fmt: skip
    if given:
        raise ConfigError(
            f"rule='fitted' reads no {', '.join(given)}: it ranks no unit by what it knows, and "
            "weighs what each costs itself. Its keys are ordinary, price, fraction, strength, "
            "sites and seed."
        )
    for strength in (config.strength, *config.strengths):
        if strength is not None and not 0 < strength <= 1:
            raise ConfigError(f"strength={strength}: of fitted gains give above 0, at most 1.")


def _read(config: DetoxConfig, path: str, column: str | None = None) -> list[Any]:
    from safeft.reading import read_examples, read_prompts

    if config.response_column is not None:
        return list(read_examples(path, column, config.response_column)[: config.limit])
    return read_prompts(path, column)[: config.limit]


def _texts(config: DetoxConfig) -> tuple[list[Any], list[Any]]:
    """Toxic and neutral ones."""
    if not config.labelled:
        return (
            _read(config, config.toxic or "", config.toxic_column),
            _read(config, config.neutral or "", config.neutral_column),
        )
    from safeft.detox.experts import by_label
    from safeft.reading import read_columns

    found = read_columns(config.labelled, [config.text_column, config.label_column])
    known = {"0": 0, "1": 1, "false": 0, "true": 1}
    labels = [known.get(label.lower(), label) for label in found[config.label_column]]
    toxic, neutral = by_label(found[config.text_column], labels)
    return list(toxic[: config.limit]), list(neutral[: config.limit])


def _measured(config: DetoxConfig) -> dict[str, Any] | None:
    """Everything that is measured with, read before a model is loaded."""
    if config.prompts is None:
        return None
    from safeft.detox.groups import read_groups, read_words
    from safeft.judge import as_judge
    from safeft.reading import read_prompts

    judge = str(config.judge)
    return {
        "prompts": read_prompts(config.prompts, config.prompts_column)[: config.limit],
        "neutral": _read(config, config.neutral_test) if config.neutral_test else [],
        "benign": read_prompts(config.benign)[: config.limit] if config.benign else None,
        "groups": read_groups(config.groups) if config.groups else None,
        "judge": read_words(judge)
        if judge.endswith(".txt")
        else as_judge(judge, refusal_label=config.toxic_label),
    }


def _found(
    config: DetoxConfig, model: Any, tokenizer: Any, texts: tuple[list[Any], list[Any]],
    batching: dict[str, Any],
) -> tuple[Any, dict[float, Any]]:  # fmt: skip
    """The dampener, checked if asked for, and one for each strength of the trade-off."""
    if config.rule == "fitted":
        return _fitted(config, model, tokenizer, texts, batching)
    from safeft.causal import parted
    from safeft.detox.counterfactual import keep_paying
    from safeft.detox.experts import find_experts
    from safeft.detox.rules import dampen

    sides = parted(*texts)
    kinds = ("mlp", "attention") if config.sites == "all" else (config.sites,)
    towers: Any = config.towers  # checked there
    experts = find_experts(
        model, tokenizer, *(sides.locating if config.check else texts), pool=config.pool,
        signed=config.signed, chance=config.chance, shuffles=config.shuffles, kinds=kinds,
        towers=towers, seed=config.seed, **batching,
    )  # fmt: skip
    units = sum(site.units for site in experts.sites.values())
    best = max(float(areas.max()) for areas in experts.auroc.values())
    print(
        f"{experts.count} of {units} units tell toxic from neutral text better than chance "
        f"(AUROC above {experts.level:.3f}; the best {best:.3f})"
    )
    sized: dict[str, Any] = {"first_layer": config.first_layer, "amplify": config.amplify}
    sized |= {"fraction": config.fraction, "count": config.count}
    dampener = dampen(model, experts, config.rule, strength=config.strength, **sized)
    made = {s: dampen(model, experts, config.rule, strength=s, **sized) for s in config.strengths}
    if not config.check:
        return dampener, made
    before = len(dampener)
    dampener, _ = keep_paying(
        model, tokenizer, dampener, *sides.checking,
        price=0.5 if config.price is None else config.price, **batching,
    )  # fmt: skip
    kept = {name: set(units) for name, units in dampener.neurons.indices.items()}
    print(f"{len(dampener)} of {before} units pay when muted on their own; the others are left out")
    return dampener, {s: each.only(kept) for s, each in made.items()}


def _fitted(
    config: DetoxConfig, model: Any, tokenizer: Any, texts: tuple[list[Any], list[Any]],
    batching: dict[str, Any],
) -> tuple[Any, dict[float, Any]]:  # fmt: skip
    """One fit, and the same gains at each strength of the trade-off."""
    from safeft.detox.fitting import fit_gains

    sized = {"price": config.price, "fraction": config.fraction}
    whole = fit_gains(
        model, tokenizer, *texts, seed=config.seed,
        ordinary=_read(config, config.ordinary) if config.ordinary else None,
        kinds=("mlp", "attention") if config.sites == "all" else (config.sites,),
        **{name: value for name, value in sized.items() if value is not None}, **batching,
    )  # fmt: skip
    made = {s: whole.scaled(s) for s in config.strengths}
    return whole.scaled(1.0 if config.strength is None else config.strength), made


def _measure(
    config: DetoxConfig, model: Any, tokenizer: Any, dampener: Any, made: dict[float, Any],
    measured: dict[str, Any], batching: dict[str, Any], command: str,
) -> None:  # fmt: skip
    from safeft.detox.evaluation import POLITE, Arm, measure_arms
    from safeft.detox.tradeoff import Tradeoff
    from safeft.errors import SelectionError
    from safeft.report.detox_page import write_page

    source = dampener.neurons.source
    rule, strength = str(source.get("rule", "given")), source.get("strength")
    arms = [Arm("as it is"), Arm("dampened", dampener, rule=rule, strength=strength)]
    arms += [Arm(f"{rule} {s:g}", each, rule=rule, strength=s) for s, each in made.items()]
    try:
        control = dampener.at_random(config.seed)
        arms.append(Arm("random, same size", control, rule="random", strength=strength))
    except SelectionError as error:
        print(f"no random control: {error}")
    arms += [
        Arm("prefix", None, POLITE, "prefix"),
        Arm("prefix, dampened", dampener, POLITE, "prefix", strength),
    ]
    outcomes = measure_arms(
        model,
        tokenizer,
        arms,
        draws=config.draws,
        max_new_tokens=config.max_new_tokens,
        **measured,
        **batching,
    )
    settings = {
        "command": command,
        "model": config.model_name_or_path,
        "rule": rule,
        "judge": measured["judge"].name,
        "prompts": len(measured["prompts"]),
        "continuations a prompt": f"{config.draws} drawn" if config.draws else "one, greedy",
        "neutral texts": len(measured["neutral"]),
        "neutral texts were": "held out" if config.neutral_test else "those it was found with",
        "dampener": dampener.hash,
    }
    tradeoff = Tradeoff(tuple(outcomes), settings)
    place = Path(config.output_dir)
    tradeoff.save(place / "detox.json")
    write_page(tradeoff, place / "detox.html")
    print(tradeoff.table())
    print(f"report: {place / 'detox.html'}")


def _fold(config: DetoxConfig, model: Any, tokenizer: Any, dampener: Any) -> int:
    from safeft.detox.certificate import certify_fold
    from safeft.detox.folding import fold
    from safeft.detox.saving import save_folded

    out = str(config.fold)
    save_folded(model, tokenizer, fold(model, dampener), out)
    certificate = certify_fold(config.model_name_or_path, out, dampener)
    certificate.save(out)
    print(f"folded into {out}")
    print(certificate.summary())
    return 0 if certificate.exact else 1


def _undo(config: DetoxConfig) -> int:
    from safeft.detox.folding import Fold
    from safeft.detox.saving import check_free, undo_fold

    check_free(config.output_dir)
    Fold.load(config.model_name_or_path)  # Says what is wrong before a model is loaded.
    model, tokenizer = load_model(config.model_name_or_path, config.dtype, config.device)
    undo_fold(model, tokenizer, config.model_name_or_path, config.output_dir)
    print(f"the fold is taken out, bit for bit, in {config.output_dir}")
    return 0
