# SPDX-License-Identifier: Apache-2.0
"""From one dataclass to a command line, a YAML file and back: flag > YAML > default.

A field made with `option` carries its help and its legal values. Strings from a command line and
values from YAML pass the same conversion, so both are refused for the same reasons. For an
optional field the word `none` means None, in flags as in files. Knows no particular option.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import yaml

from firstlm.errors import ConfigError
from firstlm.results import portable

T = TypeVar("T")
REQUIRED = dataclasses.MISSING
_METAVARS = {int: "N", float: "NUMBER", str: "TEXT"}
_NOUNS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


class Bounds(NamedTuple):
    """Between what a number has to lie."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def hold(self, value: Any) -> bool:
        """Tell whether a number lies within."""
        if self == Bounds():
            return True
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """Say what is expected."""
        low = f"above {self.above}" if self.at_least is None else f"{self.at_least}"
        if self.at_most is not None:
            return f"{low} up to {self.at_most}"
        if self.below is not None:
            return f"{low} up to below {self.below}"
        return f"more than {self.above}" if self.at_least is None else f"{self.at_least} or more"


def option(
    default: Any,
    *,
    help: str,
    choices: Sequence[Any] | None = None,
    positional: bool = False,
    path: bool = False,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare a dataclass field with what its users need to know; `REQUIRED` has no default.

    A `path` may hold ~ and $NAMES, which no shell expands in YAML. Bounds hold for every number of
    a list.
    """
    info = {
        "help": help,
        "choices": choices,
        "positional": positional,
        "path": path,
        "bounds": Bounds(at_least, above, at_most, below),
    }
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=info)
    return dataclasses.field(default=default, metadata=info)


def resolve(cls: type[T], argv: Sequence[str], prog: str) -> T:
    """Return an instance of dataclass `cls` from flags, the --config file and defaults."""
    parser = _parser(cls, prog)
    found, extra = parser.parse_known_intermixed_args(list(argv))
    flags = vars(found)
    if extra:
        _refuse_flag(cls, extra[0], prog)
    file = flags.pop("config", None)
    values = _read_yaml(cls, file) if file is not None else {}
    for name, value in flags.items():
        field = _fields(cls)[name]
        shown = name.upper() if field.metadata.get("positional") else _flag(name)
        values[name] = _value(cls, name, value, shown)
    for name, field in _fields(cls).items():
        no_default = field.default is REQUIRED and field.default_factory is REQUIRED
        if no_default and name not in values:
            shown = name.upper() if field.metadata.get("positional") else _flag(name)
            what = field.metadata.get("help", "")
            raise ConfigError(f"{shown} is missing: {what}. See '{prog} --help'.")
    return cls(**values)


def to_dict(cfg: Any) -> dict[str, Any]:
    """Return the fields of a dataclass instance as plain values for JSON or YAML."""
    values = {}
    for name, field in _fields(type(cfg)).items():
        value = getattr(cfg, name)
        if isinstance(value, tuple):
            value = list(value)
        if field.metadata.get("path") and value is not None:
            value = [portable(v) for v in value] if isinstance(value, list) else portable(value)
        values[name] = value
    return values


def from_dict(cls: type[T], values: Mapping[str, Any], *, where: str = "") -> T:
    """Build `cls` from plain values; unknown names, wrong types and choices are `ConfigError`s.

    `where`, such as " in FILE", says in messages where the values stand.
    """
    checked = _check(cls, values, where)
    try:
        return cls(**checked)
    except ConfigError as error:
        raise ConfigError(f"{where.removeprefix(' in ')}: {error}" if where else error) from error


def check(cfg: Any) -> dict[str, Any]:
    """Return the fields of `cfg` as their types say.

    Raises:
        ConfigError: one has a wrong type or isn't one of its choices.
    """
    return _check(type(cfg), {field: getattr(cfg, field) for field in _fields(type(cfg))}, "")


def to_yaml(cfg: Any) -> str:
    """Return every field of `cfg` as YAML, which `--config` and `load_yaml` read back."""
    values = to_dict(cfg)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None)
    if yaml.safe_load(text) != values:  # PyYAML reads some line ends as others unless escaped
        text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None)
    return text


def load_yaml(cls: type[T], path: str | Path) -> T:
    """Build `cls` from a YAML file; what it leaves out keeps its default."""
    return cls(**_read_yaml(cls, path))


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See '{self.prog} --help'.")


def _parser(cls: type, prog: str) -> _Parser:
    """Build the parser of `cls`; fields stand under the heading of the class that declares them."""
    words = [
        name.upper() for name, field in _fields(cls).items() if field.metadata.get("positional")
    ]
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, *words, "[options]"]).replace("%", "%%"),
        description=_heading(cls),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with these options; flags win over it"
    )
    groups: dict[type, Any] = {cls: parser}
    for name, field in _fields(cls).items():
        owner = next(base for base in reversed(cls.__mro__) if name in _declared(base))
        if owner not in groups:
            groups[owner] = parser.add_argument_group(_heading(owner).rstrip("."))
        place = parser if field.metadata.get("positional") else groups[owner]
        _add(place, field, _hints(cls)[name])
    return parser


def _add(group: Any, field: dataclasses.Field[Any], hint: Any) -> None:
    """Add one field to an argument group; all values stay text until `_convert`."""
    kind, optional, many = _unpack(hint)
    choices = field.metadata.get("choices")
    text = field.metadata.get("help", "").replace("%", "%%")
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if default is not REQUIRED:
        text += f" (default: {_shown(default, kind)})".replace("%", "%%")
    if field.metadata.get("positional"):
        group.add_argument(
            field.name, metavar=field.name.upper(), nargs="*" if many else "?", help=text
        )
    elif kind is bool:
        group.add_argument(
            _flag(field.name),
            action=argparse.BooleanOptionalAction,
            help=text,
            default=argparse.SUPPRESS,
        )
    else:
        metavar = "{" + ",".join(map(str, choices)) + "}" if choices else _METAVARS[kind]
        extra = {"nargs": "+", "action": "extend"} if many else {}
        metavar += "|none" if optional and not many else ""
        group.add_argument(_flag(field.name), metavar=metavar, help=text, **extra)


def _check(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return `values` converted to the types of the fields of `cls`."""
    fields = _fields(cls)
    for name in values:
        if name not in fields:
            hint = closest(str(name), fields) or f"; expected one of {', '.join(fields)}"
            raise ConfigError(f"unknown option {name!r}{where}{hint}.")
    return {name: _value(cls, name, value, name + where) for name, value in values.items()}


def _value(cls: type, name: str, value: Any, shown: str) -> Any:
    """Return the value of a field as its type says; `shown` names it in errors."""
    metadata = _fields(cls)[name].metadata
    found = _convert(_hints(cls)[name], value, shown, metadata.get("choices"))
    bounds = metadata.get("bounds", Bounds())
    for number in found if isinstance(found, list | tuple) else [found]:
        if number is not None and not bounds.hold(number):
            raise ConfigError(f"{shown} is {number}; expected {bounds}.")
    if metadata.get("path") and found is not None:
        many = isinstance(found, list | tuple)
        return [_expanded(path, shown) for path in found] if many else _expanded(found, shown)
    return found


def _expanded(path: str, shown: str) -> str:
    """Return a path without ~ and $NAMES; `shown` names the option in errors."""
    found = os.path.expandvars(path)
    try:
        return str(Path(found).expanduser()) if found.startswith("~") else found
    except RuntimeError as error:
        raise ConfigError(
            f"{shown} is {path!r}, but no user of that name has a home folder here; "
            "put ./ before a name that begins with ~."
        ) from error


def _read_yaml(cls: type, path: str | Path) -> dict[str, Any]:
    """Return the checked options that a YAML file sets."""
    content = read_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds a {type(content).__name__}; expected lines such as 'skip_rate: 0.25'."
        )
    return _check(cls, content, f" in {path}")


class _Loader(yaml.SafeLoader):
    """Refuses a name that stands twice, of which YAML would take the last without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set[tuple[str, Any]]()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"{key.value!r} stands twice", problem_mark=key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node


def read_yaml(path: str | Path) -> Any:
    """Return what a YAML file holds; one that cannot be read is a `ConfigError`."""
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"can't read the options file {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{path} is not YAML: {problem}") from error


def _convert(hint: Any, value: Any, name: str, choices: Sequence[Any] | None) -> Any:
    """Return `value` as the type `hint`, or raise `ConfigError` with the legal values."""
    kind, optional, many = _unpack(hint)
    if optional and value in (None, "none", ["none"]):
        return None
    if not many:
        return _scalar(kind, value, name, choices, optional)
    if isinstance(value, str):  # one value is a list of one, too
        value = [value]
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name} is {value!r}; expected a list, each {_NOUNS[kind]}.")
    items = [_scalar(kind, item, name, choices, optional) for item in value]
    return tuple(items) if many is tuple else items


def _scalar(
    kind: type, value: Any, name: str, choices: Sequence[Any] | None, optional: bool
) -> Any:
    """Return one value as `kind`; text is parsed, other types must fit."""
    result = None
    if isinstance(value, str) and kind in (int, float):
        try:  # also YAML's own: it reads 1e-3 as text
            result = kind(value)
        except ValueError:
            result = None
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        result = float(value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        result = value
    if result is None or (isinstance(result, float) and not math.isfinite(result)):
        more = " or none" if optional else ""
        quote = "; put it in quotes" if kind is str else ""
        legal = f"one of {', '.join(map(str, choices))}" if choices else _NOUNS[kind]
        raise ConfigError(f"{name} is {value!r}; expected {legal}{more}{quote}.")
    if choices is not None and result not in choices:
        hint = closest(str(result), [str(choice) for choice in choices])
        legal = ", ".join(map(str, choices)) + (" or none" if optional else "")
        raise ConfigError(f"{name} is {value!r}; expected one of {legal}{hint}.")
    return result


def _refuse_flag(cls: type, word: str, prog: str) -> NoReturn:
    """Raise for a word of the command line that no option takes."""
    if not word.startswith("-"):
        raise ConfigError(f"unexpected argument {word!r}. See '{prog} --help'.")
    flag = word.partition("=")[0]
    name = flag.removeprefix("--").replace("-", "_")
    if name in _fields(cls):  # a positional one, then
        raise ConfigError(f"{flag} is given without a flag: {prog} {name.upper()} [options].")
    hint = closest(flag, [_flag(name) for name in (*_fields(cls), "config")])
    raise ConfigError(f"unknown option {flag}{hint}. See '{prog} --help'.")


def closest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """Return the known word that looks like `word` as the tail of a message, or nothing."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {match[0]}" if match else ""


def _unpack(hint: Any) -> tuple[type, bool, type | None]:
    """Split a type into its scalar kind, whether None is legal, and list or tuple if it is many."""
    inner: Any = hint
    optional = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    if optional:
        (inner,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    many = typing.get_origin(inner)
    kind = typing.get_args(inner)[0] if many else inner
    if kind not in _NOUNS or many not in (None, list, tuple):
        raise TypeError(f"{hint} can't be an option; use int, float, str, bool or lists of them.")
    return kind, optional, many


def _fields(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields of a dataclass by name."""
    return {field.name: field for field in dataclasses.fields(cls)}


@cache
def _hints(cls: type) -> dict[str, Any]:
    """Return the types of the fields; annotations are text under `from __future__`."""
    return typing.get_type_hints(cls)


def _declared(cls: type) -> dict[str, Any]:
    """Return the annotations of a class without those it inherits."""
    return inspect.get_annotations(cls)


def _heading(cls: type) -> str:
    """Return the first line of a class's docstring."""
    return (cls.__doc__ or cls.__name__).strip().splitlines()[0]


def _flag(name: str) -> str:
    """Return the flag of a field."""
    return "--" + name.replace("_", "-")


def _shown(default: Any, kind: type) -> str:
    """Return a default as one would type it."""
    if default is None:
        return "none"
    if isinstance(default, list | tuple):
        return " ".join(map(str, default)) or "nothing"
    return {True: "yes", False: "no"}[default] if kind is bool else str(default)
