"""How every command is configured: defaults, then recipe files (TOML), then `--set section.key=value`, each over the one before.

A configuration is a tree of `Section`s whose fields are the documented keys; `describe` prints them for `--help`. Unknown
keys, wrong types and combinations that cannot work raise `UserError` with the key, its value and the remedy.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mlinterf_ds.errors import UserError, refusing

DEEPEST = 8  # parts of a key; no section lies deeper

# Marks of a key. A key without one decides the data, the model or the mathematics of a step.
RESUMABLE: dict[str, Any] = {"mark": "resumable"}  # a resumed run may change it
ADDRESS: dict[str, Any] = {"mark": "address"}  # the key gives a location or a name; a resumed run may change it too

# Keys of earlier versions and why they were removed. Setting one is an error; in an older checkpoint's record they are ignored.
REMOVED = {
    "finetune.dev_share": "--dev LANG=split takes a tenth of --train LANG: give --dev LANG=FILE for another share",
    "finetune.test_share": "--test LANG=split takes a tenth of --train LANG: give --test LANG=FILE for another share",
    "finetune.eval_batch": "a rank predicts 64 rows at once: leave the key out",
    "interference.typology": "languages are compared by their texts: join a table of features to interference.csv yourself",
}

# What a key that is newer than a checkpoint was in effect before it existed, where that is not the default of today.
EARLIER = {"data.boundaries": "none", "data.positions": "row", "meta.text": "held_out"}


def key(default: Any, meaning: str = "", mark: dict[str, Any] | None = None, **limits: Any) -> Any:
    """A key of a section, or a whole section: its default, what `--help` says of it, its mark, pydantic's limits."""
    return Field(default, description=meaning, json_schema_extra=mark, **limits)


class Section(BaseModel):
    """A group of keys; unknown ones are refused, values are checked, results are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_typed(cls, values: Any) -> Any:
        """Refuse true and false for a number or text, and read None as 'none' where that is one of the choices."""
        if not isinstance(values, dict):
            return values
        for name, value in values.items():
            kind = cls.model_fields[name].annotation if name in cls.model_fields else bool
            truth = kind is bool or bool in get_args(kind) or (isinstance(kind, type) and issubclass(kind, Section))
            if not truth and any(isinstance(part, bool) for part in _parts(value)):
                raise ValueError(f"{name}={value!r}: expected no true or false here")
        named = [name for name, field in cls.model_fields.items() if "none" in get_args(field.annotation)]
        return values | {name: "none" for name in named if name in values and values[name] is None}

    @model_validator(mode="after")
    def _within_64_bits(self) -> Self:
        for name, value in self:
            if any(isinstance(part, int) and abs(part) >= 2**63 for part in _parts(value)):
                raise ValueError(f"{name}: expected numbers below 2**63")
        return self


Kind = TypeVar("Kind", bound=Section)


def _parts(value: Any) -> list[Any]:
    """The elements of a list or table; any other value alone."""
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]


# --- loading ---------------------------------------------------------------------------------------------------------
def load_config(kind: type[Kind], recipes: Sequence[str | Path] = (), overrides: Sequence[str] = ()) -> Kind:
    """The configuration of this kind: defaults, then each recipe in order, then each `section.key=value` in order.

    A recipe is a TOML file or the name of one in launch/recipes.
    """
    merged, origin = given_keys(kind, recipes, overrides)
    for key, reason in REMOVED.items():
        if key in origin:
            raise UserError(f"{key} ({origin[key]}) is no longer a key: {reason}")
    try:
        config = kind.model_validate(merged)
        for value in flat(merged).values():
            str(value).encode()  # a checkpoint keeps it as text
        return config
    except ValidationError as error:
        raise UserError(_explain(error, kind, origin)) from None
    except UnicodeEncodeError as error:  # half of a character, from a terminal or a TOML escape
        half = error.object[error.start]
        names = [key for key, source in origin.items() if half in source or error.object in source]
        raise UserError(
            f"{', '.join(names) or 'a key'}: {error.object!a} is no text that UTF-8 can hold; write it anew"
        ) from None


def given_keys(
    kind: type[Section], recipes: Sequence[str | Path] = (), overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree of the keys that recipes and overrides give, not yet checked, and by dotted key which of them gave it."""
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for recipe in recipes:
        _merge(merged, _read_recipe(Path(recipe)), origin, str(recipe))
    for override in overrides:
        _merge(merged, _read_override(override, kind), origin, f"--set {override}")
    return merged, origin


def _read_recipe(path: Path) -> dict[str, Any]:
    shipped = Path(__file__).resolve().parents[1] / "launch" / "recipes" / f"{path}.toml"
    exists = os.path.isfile(path)  # unlike Path.is_file, it raises nothing for a name that is too long
    if not exists and len(path.parts) == 1 and os.path.isfile(shipped):
        path, exists = shipped, True
    if not exists:
        known = ", ".join(sorted(file.stem for file in shipped.parent.glob("*.toml")))
        raise UserError(f"--recipe {path}: no such file; give a TOML file or one of the shipped recipes: {known}")
    with refusing(f"{path}: not a TOML file"):
        data = path.read_bytes()  # UTF-8, or as an editor may save it: with a byte-order mark, or UTF-16
        return tomllib.loads(data.decode(json.detect_encoding(data)).removeprefix("\ufeff"))


def _read_override(override: str, kind: type[Section]) -> dict[str, Any]:
    """`train.steps=7` as {'train': {'steps': '7'}}; the values none and null of a key that may be unset are None."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: expected section.key=value, e.g. --set train.steps=1000")
    parts = key.strip().split(".")
    if len(parts) > DEEPEST:
        raise UserError(f"--set {override}: unknown key; --help lists every key")
    tree: Any = None if value.lower() in ("none", "null") and _may_be_none(kind, parts) else value
    for part in reversed(parts):
        tree = {part: tree}
    return tree


def _may_be_none(kind: type[Section], parts: Sequence[str]) -> bool:
    """Whether a dotted key can be None; text such as `tracking.tags.note` is the word none."""
    for part in parts:
        field = kind.model_fields.get(part)
        if field is None:
            return True  # refused later
        if not isinstance(field.default, Section):
            return not {type(None), "none"}.isdisjoint(get_args(field.annotation))
        kind = type(field.default)
    return True


def _merge(into: dict[str, Any], new: dict[str, Any], origin: dict[str, str], source: str, prefix: str = "") -> None:
    """Set `new`'s values in `into`, and note `source` as the origin of their keys."""
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key, {}), dict):
            _merge(into.setdefault(key, {}), value, origin, source, f"{prefix}{key}.")
            origin |= {} if value else {f"{prefix}{key}": source}  # an empty table has no keys that say where it stands
        else:
            into[key] = value
            origin[f"{prefix}{key}"] = source


def _explain(error: ValidationError, kind: type[Section], origin: dict[str, str]) -> str:
    """A line for each problem: the key, its value, where it was set, what was expected."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        related = (key, key.rpartition(".")[0])
        sources = [source for name, source in origin.items() if name in related or name.startswith(f"{key}.")]
        source = f" ({sources[0]})" if sources else ""
        given = f"{key}={problem.get('input')!r}{source}"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{given}: unknown key; {_nearest(key, kind)}")
        elif problem["type"] == "value_error":  # the sections' own validators name key and value themselves
            said = problem["msg"].removeprefix("Value error, ")
            whole_key = f"{key}.{re.split('[:=]', said)[0]}"  # a section's validator knows its own keys' short names
            lines.append(f"{key}.{said} ({origin[whole_key]})" if whole_key in origin else said + source)
        elif problem["type"] == "string_pattern_mismatch" and re.search(
            problem["ctx"]["pattern"], lower := str(problem["input"]).lower()
        ):
            lines.append(f"{given}: must be lower-case: {lower!r}")
        else:
            lines.append(f"{given}: {problem['msg']}")
    return "\n".join(lines)


def _nearest(key: str, kind: type[Section]) -> str:
    """A hint for an unknown key: the known ones that it resembles."""
    known = [name for name, _, _ in fields(kind)]
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    close += [name for name in known if name.split(".")[-1] == key.split(".")[-1] and name not in close]
    return f"did you mean {' or '.join(close)}?" if close else "--help lists every key"


# --- help ------------------------------------------------------------------------------------------------------------
def fields(kind: type[Section], prefix: str = "") -> list[tuple[str, Any, str]]:
    """Dotted key, default and meaning of every key."""
    rows: list[tuple[str, Any, str]] = []
    for name, field in kind.model_fields.items():
        if isinstance(field.default, Section):
            rows += fields(type(field.default), f"{prefix}{name}.")
        else:
            choices = get_args(field.annotation) if getattr(field.annotation, "__origin__", None) is Literal else ()
            meaning = field.description or ""
            if choices:
                meaning += " [" + " | ".join(map(str, choices)) + "]"
            rows.append((f"{prefix}{name}", field.default, meaning))
    return rows


def describe(kind: type[Section], values: Section | None = None) -> str:
    """The keys as `--help` shows them, a line for each, with their defaults or these values."""
    given = flat(values.model_dump()) if values else {}
    rows = [(name, given.get(name, default), meaning) for name, default, meaning in fields(kind)]
    width = max(len(f"{key}={default}") for key, default, _ in rows)
    return "\n".join(f"  {f'{key}={default}':<{width}}  {meaning}" for key, default, meaning in rows)


def parser(description: str, kind: type[Section], recipe: str = "") -> argparse.ArgumentParser:
    """The arguments that every launcher takes; its `--help` lists every key of the configuration.

    recipe: the one that a start without `--recipe` uses.
    """
    values, source = (load_config(kind, [recipe]), f" (of the recipe {recipe})") if recipe else (None, "")
    arguments = argparse.ArgumentParser(
        description=description,
        epilog=f"keys for --set and recipes, with the values of a start without --recipe{source}:\n{describe(kind, values)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    arguments.add_argument(
        "--deepspeed_config", default="ds_configs/zero2.json", help="DeepSpeed's JSON file, e.g. one of ds_configs/"
    )
    arguments.add_argument(
        "--recipe", action="append", default=[], help="TOML file or a shipped recipe's name; may be repeated"
    )
    arguments.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="set a key; may be repeated"
    )
    arguments.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    return arguments


# --- comparing -------------------------------------------------------------------------------------------------------
def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A dumped configuration by dotted keys: {'train': {'steps': 7}} as {'train.steps': 7}."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def marked(kind: type[Section], marks: Sequence[str], prefix: str = "") -> Iterator[str]:
    """The dotted names of the keys and whole sections that carry one of the marks."""
    for name, field in kind.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("mark") in marks:
            yield f"{prefix}{name}"
        elif isinstance(field.default, Section):
            yield from marked(type(field.default), marks, f"{prefix}{name}.")


def decisive(
    kind: type[Section], dump: Mapping[str, Any], marks: Sequence[str] = ("resumable", "address")
) -> dict[str, Any]:
    """The keys of a dumped configuration that a resumed run must not change, by dotted name.

    marks: what to leave out; with ("address",) the result holds all that can change a number.
    """
    free = tuple(f"{name}." for name in marked(kind, marks))
    return {key: value for key, value in flat(dump).items() if not f"{key}.".startswith(free)}


def differences(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Each key whose value differs, as 'key is X, was Y'."""
    keys = sorted(now.keys() | before.keys())
    return [f"{key} is {now.get(key)}, was {before.get(key)}" for key in keys if now.get(key) != before.get(key)]


def with_present_keys(dump: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that an earlier version saved, without keys that were removed since and with those that came since."""
    present = {
        section: {key: value for key, value in keys.items() if f"{section}.{key}" not in REMOVED}
        if isinstance(keys, dict)
        else keys
        for section, keys in dump.items()
    }
    for name, value in EARLIER.items():
        section, _, key = name.partition(".")
        if section in present:
            present[section].setdefault(key, value)
    return present
