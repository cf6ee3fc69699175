"""Recipes: configurations as files, which the flags of a command override.

A recipe is TOML with the names of the flags, on their own or in tables named like the groups of `--help`:

    student = "r18"                  [model]
    batch-size = 16        or        student = "r18"

run.json of an earlier run is a recipe, too, which repeats that run.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from common.errors import UserError

FLAG = "--config"
Config = TypeVar("Config")


def recipe_of(arguments: list[str]) -> Path | None:
    """The file that a command line names as its recipe."""
    for number, argument in enumerate(arguments):
        if argument.startswith(f"{FLAG}="):
            return Path(argument.removeprefix(f"{FLAG}="))
        if argument == FLAG and number + 1 < len(arguments):
            return Path(arguments[number + 1])
    return None


def read_recipe(path: Path, resume: bool = False) -> dict[str, Any]:
    """The values in a file, as `configured` takes them. UserError if it cannot be read.

    resume: of a run.json, keep the run's folder, so that the run goes on; else the values make a new run.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise UserError(f"expected a recipe at {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        kind = "json" if path.suffix == ".json" else "TOML"
        raise UserError(f"{path}: expected {kind}, found a mistake: {str(error).splitlines()[0]}") from None
    if path.suffix != ".json":
        return values  # type: ignore[no-any-return]
    if not isinstance(values, dict) or not isinstance(values.get("config"), dict):
        raise UserError(f"{path}: expected run.json of a run, found no configuration in it: a recipe is a .toml file")
    config: dict[str, Any] = {name: dict(group) for name, group in values["config"].items() if isinstance(group, dict)}
    output = config.setdefault("output", {})
    output |= {"name": None, "resume": False}
    if resume:
        output |= {"out": str(path.resolve().parent.parent), "name": path.resolve().parent.name}
    return config


def configured(defaults: Config, values: Mapping[str, Any], source: str) -> Config:
    """A configuration with these values in the place of its own.

    defaults: a dataclass of groups, themselves dataclasses. values: by flag (dashes or underscores), on their own or
    in a mapping by group. source: what a UserError says is wrong: an unknown name, with the nearest known, or a value
    of another type.
    """
    groups = {field.name: getattr(defaults, field.name) for field in dataclasses.fields(defaults)}  # type: ignore[arg-type]
    groups = {name: group for name, group in groups.items() if dataclasses.is_dataclass(group)}
    group_of = {field.name: name for name, group in groups.items() for field in dataclasses.fields(group)}
    found: dict[str, dict[str, Any]] = {name: {} for name in groups}

    def take(name: str, value: Any, table: str | None = None) -> None:
        field = name.replace("-", "_")
        known = [other for other, group in group_of.items() if table in (None, group)]
        if field not in known:
            if table is None and field in groups:
                raise UserError(f"{source}: expected one table [{name}], found {value!r}")
            if table is None:
                known += list(groups)
            nearest = difflib.get_close_matches(field, known, n=1, cutoff=0.0)[0]
            where = f" in [{table}]" if table else ""
            raise UserError(f"{source}: unknown key {name!r}{where}, the nearest is {_spelt(nearest, name)!r}")
        group = groups[group_of[field]]
        found[group_of[field]][field] = _typed(group, field, value, f"{source}: {name}")

    for name, value in values.items():
        if name in groups and isinstance(value, Mapping):
            for inner, inner_value in value.items():
                take(inner, inner_value, name)
        else:
            take(name, value)
    changed = {name: dataclasses.replace(groups[name], **fields) for name, fields in found.items() if fields}
    return dataclasses.replace(defaults, **changed)  # type: ignore[type-var]


def _typed(group: Any, field: str, value: Any, place: str) -> Any:
    kind = get_type_hints(type(group), include_extras=True)[field]
    try:
        text = json.dumps(value, default=str)
        typed = TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"][0].lower() + first["msg"][1:]
        raise UserError(f"{place} = {value!r}: {reason}") from None
    except RecursionError:
        raise UserError(f"{place}: expected a plain value, found lists within lists too deep to read") from None
    for number in typed if isinstance(typed, tuple) else (typed,):
        if isinstance(number, float | int) and not abs(number) < 2**63:  # NaN is in no range
            raise UserError(f"{place} = {value!r}: expected a finite number, and fewer than 64 bits")
    if "\\u0000" in text:
        raise UserError(f"{place} = {value!r}: expected text without zero bytes")
    return typed


def _spelt(field: str, like: str) -> str:
    return field if "_" in like else field.replace("_", "-")
