"""Options from a YAML file: every value checked against the dataclass that it fills, every fault one line."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError

from videoclip.errors import InputError

Options = TypeVar("Options")


def read_options(path: Path, kind: type[Options]) -> Options:
    """An instance of the dataclass `kind` from a YAML file; what has no default and is not there stays to be given.

    Raises InputError, one line with file and option, for a file that cannot be read, an unknown name, a wrong type.
    """
    values = _read_yaml(path)
    if not isinstance(values, Mapping):
        raise InputError(f"{path}: expected options by name")
    filled: dict[str, Any] = {}
    types = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]  # a dataclass, which `type` cannot say
        if item.name in values:
            filled[item.name] = _check(values[item.name], types[item.name], item.name, path)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            filled[item.name] = tyro.MISSING
    for name in values:
        if name not in types:
            raise InputError(f"{path}: {_unknown(name, types)}")
    return kind(**filled)


def read_value(path: Path, name: str, default: object) -> object:
    """One value of a YAML file, unchecked. Raises InputError if the file cannot be read."""
    values = _read_yaml(path)
    return values.get(name, default) if isinstance(values, Mapping) else default


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """YAML in which 5e-5 is a number, as in Python and in YAML 1.2, and not a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read_yaml(path: Path) -> Any:
    """What the file holds, as JSON would, with option names as Python spells them."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
        return {} if values is None else _plain(values)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise InputError(f"{path}: {reason}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name).replace("-", "_"): _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)  # dates


def _check(value: Any, kind: Any, name: str, path: Path) -> Any:
    """`value` as the type `kind`. By way of JSON, whose strict rules are a file's: paths are texts, tuples lists, and
    nothing else becomes anything else."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(value), strict=True, extra="forbid")
    except ValidationError as errors:
        error = errors.errors(include_url=False)[0]
    # Of several types that a value may have the first is told of; what pydantic calls them is no place in the file.
    place = ".".join([name, *(part for part in map(str, error["loc"]) if "[" not in part)])
    if error["type"] == "unexpected_keyword_argument":
        known = ", ".join(item.name for item in dataclasses.fields(kind))
        raise InputError(f"{path}: unknown option {place}; known in {name} are {known}")
    if error["type"] == "dataclass_type":
        raise InputError(f"{path}: {place}: expected options by name, not {json.dumps(error['input'])}")
    reason = error["msg"].removeprefix("Input ")
    raise InputError(f"{path}: {place}: {reason}, not {json.dumps(error['input'])}")


def _unknown(name: str, types: Mapping[str, Any]) -> str:
    """What to say about a name that is no option, though perhaps one inside another."""
    for outer, kind in types.items():
        if dataclasses.is_dataclass(kind) and name in {item.name for item in dataclasses.fields(kind)}:
            return f"unknown options {name}; it belongs inside {outer}, as {outer}: {{{name}: ...}}"
    return f"unknown options {name}; known are {', '.join(types)}"


def with_recipe(kind: type[Options], name: str) -> type[Options]:
    """A stage's options whose `recipe` is `name` and whose `--model.*` are that recipe's. Raises InputError for an
    unknown one."""
    from videoclip.recipes import recipe_named

    options = recipe_named(name).Options
    chosen = [
        ("recipe", str, dataclasses.field(default=name)),
        ("model", options, dataclasses.field(default_factory=options)),
    ]
    made: type[Options] = dataclasses.make_dataclass(
        kind.__name__, chosen, bases=(kind,), frozen=True, namespace={"__doc__": kind.__doc__}
    )
    return made
