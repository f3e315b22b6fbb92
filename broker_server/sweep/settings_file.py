"""A federation's settings as the TOML file that they could have been read from."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from broker_server.config import Federation


def differing(section: msgspec.Struct) -> dict[str, Any]:
    """The settings that are not the default, as plain data; and those that have none."""
    found: dict[str, Any] = {}
    for field in msgspec.structs.fields(section):
        value = getattr(section, field.name)
        if isinstance(value, msgspec.Struct):
            if inner := differing(value):
                found[field.encode_name] = inner
            continue
        made = field.default_factory
        default = field.default if made is msgspec.NODEFAULT else made()
        if value != default:
            found[field.encode_name] = msgspec.to_builtins(value)
    return found


def settings_file(settings: Federation) -> str:
    """The text of a file that `broker_server.config.load` reads as these settings; defaults are left out."""
    return "\n".join(_tables(differing(settings), "")).strip() + "\n"


def toml_value(value: object) -> str:
    """A value in TOML, on one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(name)} = {toml_value(inner)}" for name, inner in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, str):
        # JSON's texts are TOML's but for one character; without ASCII alone there are no pairs of surrogates.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value) if isinstance(value, float) else json.dumps(value)


def _tables(tree: Mapping[str, Any], prefix: str) -> Iterator[str]:
    inner = {name: value for name, value in tree.items() if isinstance(value, dict)}
    if prefix and len(inner) < len(tree):
        yield f"\n[{prefix}]"
    yield from (f"{_key(name)} = {toml_value(value)}" for name, value in tree.items() if name not in inner)
    for name, table in inner.items():
        yield from _tables(table, f"{prefix}.{_key(name)}" if prefix else _key(name))


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else toml_value(name)
