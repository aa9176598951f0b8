"""``safeft locate``: a chat model and prompt files in, a neuron set or a subspace out.

A neuron set is then checked: a short causal check, on prompts kept from locating where there are
enough, goes into the artefact. Under ``accelerate launch`` the processes share the prompts, and
under FSDP or ZeRO-3 the weights.
"""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal

from safeft.commands.loading import join_processes, load_model, read_template, shard
from safeft.commands.parsing import parse
from safeft.errors import ConfigError


@dataclass
class LocateConfig:
    """Find the neurons that act on harmful prompts and not on benign ones.

    Or, with `--method subspace`, the input directions that refusing uses: these need no benign
    prompts.
    """

    model_name_or_path: str = field(metadata={"help": "Chat model: folder or hub name."})
    harmful: str = field(
        metadata={"help": "Prompts it refuses: .txt (one a line), .csv, .json(l)."}
    )
    output_dir: str = field(metadata={"help": "Folder for the neuron set or subspace."})
    benign: str | None = field(
        default=None, metadata={"help": "Ordinary prompts, in the same forms; not for `subspace`."}
    )
    harmful_column: str | None = field(default=None, metadata={"help": "Column of a table."})
    benign_column: str | None = field(default=None, metadata={"help": "Column of a table."})
    method: Literal[
        "attribution", "contrast", "variance", "snip", "wanda", "expertise", "random", "subspace"
    ] = field(
        default="attribution",
        metadata={"help": "How units are scored, random being the control; or `subspace`."},
    )
    energy: float | None = field(
        default=None,
        metadata={
            "help": "Of `subspace`: share of each input's energy to hold (0.9 if none said)."
        },
    )
    rank_share: float | None = field(
        default=None, metadata={"help": "Of `subspace`: directions as a share of the inputs."}
    )
    memory: float | None = field(
        default=None, metadata={"help": "Of `subspace`: GiB that holding may take, in float32."}
    )
    response_column: str | None = field(
        default=None,
        metadata={"help": "Of `subspace`: column with refusals; by default the model's own."},
    )
    tokens: Literal["all", "prompt", "response"] = field(
        default="all", metadata={"help": "Of `subspace`: which tokens are read."}
    )
    at_once: float | None = field(
        default=None,
        metadata={"help": "Of `subspace`: GiB of statistics in one pass; more passes if needed."},
    )
    fraction: float | None = field(
        default=None, metadata={"help": "Share of the units, above 0 to 1 (0.05 if none is said)."}
    )
    count: int | None = field(default=None, metadata={"help": "Number of units instead."})
    threshold: float | None = field(default=None, metadata={"help": "Least score instead."})
    scope: Literal["layer", "global"] | None = field(
        default=None, metadata={"help": "Rank within layers or over all; by default the method's."}
    )
    utility_fraction: float | None = field(
        default=None, metadata={"help": "Share of units, top in utility, that are passed over."}
    )
    fill: bool = field(
        default=True, metadata={"help": "Give places of units passed over to the next best."}
    )
    groups: bool = field(
        default=False,
        metadata={"help": "Divide all units into the groups scu, ucu, ru, cu (variance only)."},
    )
    scu: float | None = field(
        default=None, metadata={"help": "Share of safety-critical units, with groups (0.013)."}
    )
    ucu: float | None = field(
        default=None, metadata={"help": "Share of utility-critical units, with groups (0.133)."}
    )
    ru: float | None = field(
        default=None, metadata={"help": "Share of redundant units, with groups (0.148)."}
    )
    sites: Literal["mlp", "attention", "all"] = field(
        default="mlp", metadata={"help": "MLP hidden units, attention heads, or both."}
    )
    towers: list[str] = field(
        default_factory=lambda: ["text"],
        metadata={"help": "Of a model that sees images: text, vision, projector."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of `random`."})
    batch_size: int = field(default=16, metadata={"help": "Prompts per forward pass."})
    max_length: int = field(default=1024, metadata={"help": "Tokens per prompt."})
    limit: int | None = field(default=None, metadata={"help": "Use the first N prompts a side."})
    openings: list[str] | None = field(
        default=None, metadata={"help": "How the model starts a refusal (attribution)."}
    )
    validate: bool = field(
        default=True,
        metadata={
            "help": "Check the set by silencing it, against random sets; a quarter of the prompts "
            "(8 to 32 a side) is kept from locating for this, where there are 32 or more."
        },
    )
    chat_template_path: str | None = field(
        default=None, metadata={"help": "Jinja template, where the tokenizer has none."}
    )
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16, float16."})
    device: str | None = field(default=None, metadata={"help": "cuda where there is one, or cpu."})
    device_map: str | None = field(
        default=None, metadata={"help": "Spread one model over devices instead: auto, balanced."}
    )


def main(arguments: Sequence[str]) -> int:
    """Read, load, locate, check, save."""
    (config,) = parse([LocateConfig], arguments, "locate", LocateConfig.__doc__ or "")
    assert isinstance(config, LocateConfig)
    from safeft.causal import parted
    from safeft.locators import Selection, locate
    from safeft.processes import leave, rank, together
    from safeft.reading import read_prompts

    amount: dict[str, Any] = {
        "fraction": config.fraction,
        "count": config.count,
        "threshold": config.threshold,
    }
    if any(value is not None for value in amount.values()):
        Selection(**amount)  # Says what is wrong before a model is loaded.
    sizes = group_sizes(config)
    check_keys(config)
    if config.method == "subspace":
        return _locate_subspace(config)
    harmful = read_prompts(config.harmful, config.harmful_column)[: config.limit]
    assert config.benign is not None
    benign = read_prompts(config.benign, config.benign_column)[: config.limit]
    sides = parted(harmful, benign)
    if config.validate and sizes is None:
        harmful, benign = sides.locating
    template = read_template(config.chat_template_path)
    join_processes()
    model, tokenizer = load_model(
        config.model_name_or_path, config.dtype, config.device, config.device_map
    )
    shard(model)
    if sizes is not None:
        return _locate_groups(config, sizes, model, tokenizer, harmful, benign, template)
    batching: dict[str, Any] = {
        "batch_size": config.batch_size,
        "max_length": config.max_length,
        "chat_template": template,
        "share": True,
    }
    towers: Any = config.towers  # checked there
    method: Any = config.method
    neurons = locate(
        model,
        tokenizer,
        harmful,
        benign,
        method=method,
        scope=config.scope,
        utility_fraction=config.utility_fraction,
        fill=config.fill,
        sites=config.sites,
        towers=towers,
        seed=config.seed,
        openings=config.openings,
        **batching,
        **amount,
    )
    said = "causal check: left out (--validate false); `safeft validate --write` makes up for it"
    if config.validate:
        neurons, said = _checked(neurons, model, tokenizer, sides, batching)
    first = rank() == 0
    together(lambda: neurons.save_pretrained(config.output_dir) if first else None)
    leave()
    if not first:
        return 0
    total = sum(neurons.model.units[name] for name in neurons.model.units)
    print(f"{len(neurons)} of {total} units by {config.method}, in {config.output_dir}")
    for name, units in neurons.indices.items():
        share = len(units) / neurons.model.units[name]
        print(f"  {name:<32} {len(units):>6}  {share:>6.1%}  {'#' * round(40 * share)}")
    print(said)
    return 0


_OF_SUBSPACE = ("energy", "rank_share", "memory", "at_once", "response_column")
_OF_NEURONS = (
    "benign", "benign_column", "fraction", "count", "threshold", "scope", "utility_fraction",
    "openings", "scu", "ucu", "ru",
)  # fmt: skip


def check_keys(config: LocateConfig) -> None:
    """Refuse keys that the method does not read: they would be without effect.

    Raises:
        ConfigError: There are some, or the benign prompts are missing.
    """
    subspace = config.method == "subspace"
    names = _OF_NEURONS if subspace else _OF_SUBSPACE
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    for name in ("groups", "sites", "towers", "fill") if subspace else ("tokens",):
        given |= {name: getattr(config, name)} if not is_default(config, name) else {}
    if given:
        other = "neurons" if subspace else "`--method subspace`"
        raise ConfigError(
            f"{given}: these are keys of {other}, and method={config.method!r} would leave them "
            "without effect. Remove them, or choose the other method."
        )
    if not subspace and config.benign is None:
        raise ConfigError(
            f"method={config.method!r} compares harmful with ordinary prompts, and `benign` is not "
            "given. Give a file of some 100 prompts that the model does not refuse."
        )


def is_default(config: LocateConfig, name: str) -> bool:
    """Whether a key has the value it has where nothing is said."""
    (known,) = [key for key in fields(config) if key.name == name]
    usual = known.default if known.default_factory is MISSING else known.default_factory()
    return getattr(config, name) == usual


def _locate_subspace(config: LocateConfig) -> int:
    from safeft.locators import locate_subspace
    from safeft.processes import leave, rank, together
    from safeft.reading import read_examples, read_prompts

    if config.response_column is None:
        harmful = read_prompts(config.harmful, config.harmful_column)
    else:
        harmful = read_examples(config.harmful, config.harmful_column, config.response_column)
    template = read_template(config.chat_template_path)
    join_processes()
    model, tokenizer = load_model(
        config.model_name_or_path, config.dtype, config.device, config.device_map
    )
    shard(model)
    subspace = locate_subspace(
        model,
        tokenizer,
        harmful[: config.limit],
        energy=config.energy,
        rank_share=config.rank_share,
        memory=config.memory,
        tokens=config.tokens,
        batch_size=config.batch_size,
        max_length=config.max_length,
        chat_template=template,
        share=True,
        at_once=config.at_once,
    )
    first = rank() == 0
    together(lambda: subspace.save_pretrained(config.output_dir) if first else None)
    leave()
    if first:
        print("\n".join(said_of(subspace, config.output_dir)))
    return 0


def said_of(subspace: Any, folder: str) -> list[str]:
    """Ranks by input, and how well held-out prompts are covered, the worst first."""
    lines = [
        f"{subspace.share:.1%} of the rank of {len(subspace.readers)} layers, in {folder}",
        f"  {'input of':<34} {'rank':>12}  not held of other prompts' tokens: median, worst",
    ]
    coverage = subspace.source["coverage"]
    rows = sorted(subspace.directions, key=lambda name: -coverage.get(name, {}).get("median", 0.0))
    for name in rows:
        features, held = subspace.directions[name].shape
        seen = coverage.get(name)
        text = ""
        if seen:
            text = f"{seen['median']:.2f}  {seen['worst']:.2f} at {seen['worst_token']!r}"
        lines.append(f"  {name:<34} {held:>5} / {features:<5}  {text}")
    if not coverage:
        lines.append("No prompts were kept aside (16 are needed): coverage is unknown.")
    return lines


def group_sizes(config: LocateConfig) -> Any:
    """The sizes of the groups asked for; None where one set is.

    Raises:
        ConfigError: Keys of the one are given with the other, or a method that gives no groups.
        SelectionError: A share that is none.
    """
    from safeft.locators import GroupSizes

    shares = {"scu": config.scu, "ucu": config.ucu, "ru": config.ru}
    given = {name: value for name, value in shares.items() if value is not None}
    if not config.groups:
        if given:
            raise ConfigError(
                f"{given} are sizes of groups, and one set is to be located, so they would be "
                "without effect. Add `--groups`, or give `fraction`."
            )
        return None
    if config.method != "variance":
        raise ConfigError(
            f"method={config.method!r} gives no groups: these add and subtract the importance of a "
            "unit on harmful and on ordinary prompts, which only `variance` measures in one unit. "
            "Use `--method variance --groups`."
        )
    names = ("fraction", "count", "threshold", "utility_fraction")
    extra = {name: value for name in names if (value := getattr(config, name)) is not None}
    if extra:
        raise ConfigError(
            f"{extra} is the size of one set, and `groups` divides all units, so it would be "
            "without effect. Give the shares `scu`, `ucu` and `ru` instead."
        )
    return GroupSizes(**given, scope=config.scope or "global")


def _locate_groups(
    config: LocateConfig,
    sizes: Any,
    model: Any,
    tokenizer: Any,
    harmful: Any,
    benign: Any,
    template: str | None,
) -> int:
    from safeft.locators import locate_groups
    from safeft.locators.groups import GROUPS
    from safeft.processes import leave, rank, together

    groups = locate_groups(
        model,
        tokenizer,
        harmful,
        benign,
        sizes=sizes,
        sites=config.sites,
        batch_size=config.batch_size,
        max_length=config.max_length,
        chat_template=template,
        share=True,
    )
    first = rank() == 0
    together(lambda: groups.save_pretrained(config.output_dir) if first else None)
    leave()
    if not first:
        return 0
    total = sum(map(len, groups.depth.values()))
    print(f"{total} units in four groups by variance, in {config.output_dir}")
    for name in GROUPS:
        count = len(getattr(groups, name))
        print(f"  {name:<4} {count:>8}  {count / total:>6.1%}  {'#' * round(40 * count / total)}")
    return 0


def _checked(
    neurons: Any, model: Any, tokenizer: Any, sides: Any, batching: dict[str, Any]
) -> tuple[Any, str]:
    """The set with the short check's result in it, and what to say of it."""
    from safeft.causal import SHORT, validate, with_effect
    from safeft.errors import SelectionError

    try:
        effect = validate(model, tokenizer, neurons, *sides.checking, **SHORT, **batching)
    except SelectionError as error:  # The set is good for freezing, only too large to be checked.
        return neurons, f"causal check: not possible. {error}"
    effect = replace(effect, held_out=sides.held_out)
    return with_effect(neurons, effect), effect.summary()
