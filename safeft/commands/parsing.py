"""From arguments and YAML to configurations, in TRL's grammar, with errors that help."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from safeft.errors import ConfigError


def parse(
    configurations: Sequence[Any], arguments: Sequence[str], verb: str, about: str
) -> tuple[Any, ...]:
    """Instances of the configuration classes, from ``--config FILE.yaml`` and ``--key value``.

    Raises:
        ConfigError: A file that is not a YAML mapping, or a key that no class has; the nearest
            key is named.
    """
    parser = TrlParser(list(configurations), prog=f"safeft {verb}", description=about)
    _check_file(arguments)
    try:
        *parsed, from_file, from_line = parser.parse_args_and_config(
            list(arguments), return_remaining_strings=True, separate_remaining_strings=True
        )
    except ValueError as error:
        raise ConfigError(f"{error}. See `safeft {verb} --help`.") from error
    unknown = [text for text in [*from_file[::2], *from_line] if text.startswith("--")]
    stray = [text for text in from_line if not text.startswith("--")] if not unknown else []
    if unknown or stray:
        known = sorted({action.dest for action in parser._actions})
        raise ConfigError(_unknown(unknown or stray, known, verb))
    return tuple(parsed)


def _unknown(names: Sequence[str], known: Sequence[str], verb: str) -> str:
    rows = []
    for name in names:
        key = name.removeprefix("--").split("=")[0].replace("-", "_")
        close = get_close_matches(key, known, 1)
        rows.append(f"{key!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    return (
        f"`safeft {verb}` has no key {', '.join(rows)}. A key that is not understood would be "
        f"silently without effect; correct or remove it. `safeft {verb} --help` lists all keys."
    )


def _check_file(arguments: Sequence[str]) -> None:
    given = list(arguments)
    if "--config" not in given:
        return
    place = given.index("--config") + 1
    if place >= len(given):
        raise ConfigError("--config needs a file: --config FILE.yaml.")
    path = Path(given[place])
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The config file {str(path)!r} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{str(path)!r} is not YAML: {error}.") from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"{str(path)!r} holds {type(found).__name__}, not keys with values (`key: value`)."
        )
