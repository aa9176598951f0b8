"""``safeft sites``: which units of a model can be named, before anything is located or trained."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from safeft.commands.parsing import parse


@dataclass
class SitesConfig:
    """Show which neurons of a model safeft can name, and what of it belongs to none."""

    model_name_or_path: str = field(
        metadata={"help": "Folder or hub name; only its config is read."}
    )
    json: bool = field(default=False, metadata={"help": "Print every site with its parts as JSON."})


def main(arguments: Sequence[str]) -> int:
    """Read the config, build the model without weights, list its sites."""
    if arguments and not arguments[0].startswith("-"):  # safeft sites MODEL
        arguments = ["--model_name_or_path", *arguments]
    (config,) = parse([SitesConfig], arguments, "sites", SitesConfig.__doc__ or "")
    assert isinstance(config, SitesConfig)
    from safeft.freeze.verify import model_of_shapes
    from safeft.sites import find_sites, unaddressed

    model = model_of_shapes(config.model_name_or_path)
    sites = find_sites(model)
    if config.json:
        print(json.dumps([asdict(site) for site in sites.values()], indent=1))
        return 0
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__name__}, {weights:,} weights, {len(sites)} sites")
    for row in rows_of(sites):
        print(
            f"  {row['tower']:<10} {row['kind']:<10} {row['sites']:>5} x {row['units']:>7,} units  "
            f"{row['like']}: reads {row['reads']}, writes {row['writes']}"
        )
    for name in dict.fromkeys(_pattern(name) for name in unaddressed(model, sites)):
        print(f"  no unit's: {name}")
    return 0


def rows_of(sites: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Like sites together: tower, kind, how many, of how many units, and what they live in."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for site in sites.values():
        like = _pattern(site.name)
        reads = " ".join(dict.fromkeys(_below(part, site.name) for part in site.reads))
        row = {
            "tower": site.tower,
            "kind": site.kind,
            "units": site.units,
            "like": like,
            "reads": reads,
            "writes": _below(site.writes, site.name),
        }
        found.setdefault(tuple(row.values()), {**row, "sites": 0})["sites"] += 1
    return list(found.values())


def _pattern(name: str) -> str:
    return ".".join("N" if step.isdigit() else step for step in name.split("."))


def _below(part: Any, site: str) -> str:
    """A weight by its name inside the site, with how its entries count."""
    name = part.name.removeprefix(
        f"{site.rpartition('.')[0] if part.expert is not None else site}."
    )
    return f"{name.removesuffix('.weight')}[{'rows' if part.axis != 'columns' else 'columns'}]"
