"""Which rows and columns of which parameters are neuron j: the only file that knows architectures.

A *site* is one family of like units in one block: an MLP's hidden units, one expert's, an
attention's query heads. A unit reads with rows of some matrices and writes with a column block of
one (turned round where a layer stores its matrix as inputs by outputs); grouped keys and values
belong to every query head of their group. Names are module paths of the plain model
(``model.layers.1.mlp``), also where the model is wrapped by PEFT or DDP.

What a block holds is read off the names and classes of its modules, never off shapes: a square
matrix does not say which side is which. ``TOWERS`` lists the models for which that has been proven
against the model's own forward pass (``tests/test_families.py``); any other is an error, because a
guess would freeze the wrong weights in silence.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from safeft.errors import UnsupportedModelError
from safeft.shards import shape_of
from safeft.sites.layouts import Where, attention_of, has, mlp_of, mlps_of
from safeft.sites.linears import Linear, head_of, linears_in
from safeft.sites.parts import TOWER_NAMES, Kind, Part, Site, TowerName
from safeft.sites.tables import BLOCK, IN_BLOCK, PROJECTOR, PROJECTORS, TOWERS, WHOLES
from safeft.sites.wrapped import bare, dense, is_quantised, plain_model, plain_name

__all__ = [
    "TOWERS",
    "TOWER_NAMES",
    "WHOLES",
    "Kind",
    "Linear",
    "Part",
    "Site",
    "TowerName",
    "bare",
    "blocks_of",
    "check_type",
    "dense",
    "find_linears",
    "find_sites",
    "in_blocks",
    "is_quantised",
    "plain_model",
    "plain_name",
    "unaddressed",
]


def in_blocks(path: str, module: nn.Module) -> bool:
    """Whether a module lies inside a block, or blocks lie inside it."""
    if IN_BLOCK.search(path):
        return True
    return any(BLOCK.search(inner) for inner, _ in module.named_modules(prefix=path))


def find_sites(model: nn.Module, kinds: tuple[Kind, ...] = ("mlp", "attention")) -> dict[str, Site]:
    """The sites of a model, by name, in order of depth; of several towers, one after the other.

    Args:
        model: A transformers model, also on the meta device, also wrapped by PEFT or DDP.
        kinds: Which families to list.

    Raises:
        UnsupportedModelError: The model type is not known here, or a block does not look as
            models of that type do.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=12,
        ...                      num_hidden_layers=1, num_attention_heads=2)
        >>> find_sites(LlamaForCausalLM(config))["model.layers.0.mlp"].units
        12
    """
    model = plain_model(model)
    sites: list[Site] = []
    for path, layer, block, model_type, config in _blocks(model):
        tower = TOWERS[model_type]
        where = Where(plain_name(path), bare(block), layer, model_type, tower.name)
        if "mlp" in kinds:
            sites += mlps_of(where, tower)
        if "attention" in kinds:
            sites += attention_of(where, tower, config)
    if not sites:
        raise UnsupportedModelError(
            f"No block with such units was found in {type(model).__name__}. Load it "
            "with a task class such as AutoModelForCausalLM."
        )
    if "mlp" in kinds and _type_of(model) in WHOLES:
        sites += _projectors(model)
    return {site.name: site for site in sites}


def find_linears(model: nn.Module, towers: Sequence[TowerName] = ("text",)) -> dict[str, Linear]:
    """The linear layers in the blocks of some towers, and the head of the text, by weight.

    What is stacked (experts) or is no linear layer (routers of some models) is not among them.

    Raises:
        UnsupportedModelError: The model type is not known here.

    Example:
        >>> find_linears(model)["model.layers.0.mlp.down_proj.weight"].features  # doctest: +SKIP
        11008
    """
    model = plain_model(model)
    found: list[Linear] = []
    for path, _, block, model_type, _ in _blocks(model):
        if TOWERS[model_type].name in towers:
            found += linears_in(path, block)
    if "text" in towers:
        found += head_of(model)
    return {linear.name: linear for linear in found}


def unaddressed(model: nn.Module, sites: Mapping[str, Site]) -> list[str]:
    """Names of the matrices inside blocks that belong to no unit (routers, latent attention)."""
    known = {name for site in sites.values() for part in site.parts for name, _ in part.tensors}
    return [
        name
        for name, parameter in plain_model(model).named_parameters()
        if IN_BLOCK.search(name)
        and len(shape_of(parameter)) > 1
        and ".lora_" not in name
        and plain_name(name).replace(".base_layer.", ".") not in known
    ]


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of all towers, by path."""
    return {path: block for path, _, block, _, _ in _blocks(plain_model(model))}


def _type_of(module: nn.Module) -> str:
    return str(getattr(getattr(module, "config", None), "model_type", type(module).__name__))


def check_type(model_type: str) -> None:
    """Refuse a model whose layout nobody has proven, by its config's ``model_type``.

    Raises:
        UnsupportedModelError: It is in neither table.
    """
    if model_type in TOWERS or model_type in WHOLES:
        return
    known = ", ".join(sorted({*TOWERS, *WHOLES}))
    raise UnsupportedModelError(
        f"There is no site rule for model type {model_type!r}, so its neurons cannot be named; "
        f"guessing would freeze the wrong weights. Supported: {known}. A new one is an entry in "
        "safeft/sites/tables.py and its proof in tests/families.py."
    )


def _blocks(model: nn.Module) -> Iterator[tuple[str, int, nn.Module, str, Any]]:
    """Blocks with the type and the config of the tower they stand in."""
    check_type(_type_of(model))
    configs: dict[str, Any] = {}
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if hasattr(module, "get_input_embeddings") and hasattr(config, "model_type"):
            configs[path] = config
        match = BLOCK.search(path)
        if match is None or IN_BLOCK.search(path[: match.start()]):
            continue
        owner = path[: match.start()]
        while owner not in configs:
            owner = owner.rpartition(".")[0]
        model_type = str(configs[owner].model_type)
        check_type(model_type)
        yield path, int(match.group(1)), module, model_type, configs[owner]


def _projectors(model: nn.Module) -> list[Site]:
    found: list[Site] = []
    for path, module in model.named_modules():
        path, module = plain_name(path), bare(module)
        if not PROJECTOR.search(path) or IN_BLOCK.search(path) or "base_layer" in path:
            continue
        rule = next((rule for rule in PROJECTORS if has(module, *rule[0], rule[1])), None)
        if rule is not None:
            where = Where(path, module, len(found), _type_of(model), "projector")
            found.append(mlp_of(where, path, module, *rule))
    return found
