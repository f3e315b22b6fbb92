"""A table of settings against the struct that it is for, every mistake named by its dotted key, in words."""

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any, get_args, get_origin

import msgspec
from msgspec import inspect

from edge_client.errors import ConfigError


def check_keys(table: Mapping[str, object], section: type[msgspec.Struct], prefix: str) -> None:
    """Convert key by key: the message can then name the key, the value and the range, where msgspec names the type.

    Raises:
        ConfigError: a key is unknown or missing, or a value of the wrong type or out of range.
    """
    fields = {field.encode_name: field for field in msgspec.structs.fields(section)}
    for name, value in table.items():
        key = prefix + name
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {prefix}{close[0]}? " if close else ""
            raise ConfigError(f"{key} is not a known key; {hint}known here: {', '.join(fields)}")
        kind = fields[name].type
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            if not isinstance(value, dict):
                raise ConfigError(f"{key} is {value!r}; expected a section, [{key}]")
            check_keys(value, kind, f"{key}.")
        elif isinstance(value, dict) and get_origin(kind) is dict:
            of_names, of_values = get_args(kind)
            for entry, number in value.items():
                _check_value(f"name in {key}", entry, of_names)
                _check_value(f"{key}.{entry}", number, of_values)
        else:
            _check_value(key, value, kind)
    for name, field in fields.items():
        if field.required and name not in table:
            if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
                check_keys({}, field.type, f"{name}.")
            raise ConfigError(f"{prefix}{name} is missing; expected {_allowed(inspect.type_info(field.type))}")


def _check_value(key: str, value: object, kind: Any) -> None:
    shown = re.sub(r"//[^@/]*@", "//...@", repr(value))  # an address may hold a password
    problem = ConfigError(f"{key} is {shown}; expected {_allowed(inspect.type_info(kind))}")
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise problem from error
    # TOML has nan and inf, and nan passes every comparison with a bound.
    numbers = value if isinstance(value, list) else [value]
    if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
        raise problem


def _allowed(info: inspect.Type) -> str:
    """What a setting may be, in words."""
    match info:
        case inspect.IntType() | inspect.FloatType():
            words = "a whole number" if isinstance(info, inspect.IntType) else "a number"
            bounds = ((" from", info.ge), (" above", info.gt), (" to", info.le), (" to below", info.lt))
            return words + "".join(f"{word} {bound:,}" for word, bound in bounds if bound is not None)
        case inspect.LiteralType():
            return "one of " + ", ".join(f'"{value}"' for value in info.values)
        case inspect.StrType():
            return f"a text that matches {info.pattern}" if info.pattern else "a text"
        case inspect.BoolType():
            return "true or false"
        case inspect.TupleType():
            return f"a list of {len(info.item_types)}, each {_allowed(info.item_types[0])}"
        case inspect.VarTupleType():
            return f"a list, each {_allowed(info.item_type)}"
        case inspect.DictType():
            return f"a section of names, each with {_allowed(info.value_type)}"
        case inspect.UnionType():
            return " or ".join(_allowed(kind) for kind in info.types if not isinstance(kind, inspect.NoneType))
        case _:
            return "a section" if isinstance(info, inspect.StructType) else "a value"
