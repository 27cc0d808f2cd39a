"""The border between a run's ConfigDict and the frozen dataclasses that the library works with.

A command reads `--config=configs/<stage>.py:<size>`, and `parse` turns the locked ConfigDict into the stage's dataclass
exactly once: every key must exist, every field must be there, every value must have the declared type. Behind this border
nothing looks at a ConfigDict again. `describe` and `differences` serve resuming: a run refuses to go on under another config.
"""

import dataclasses
import difflib
import sys
import traceback
import types
import typing
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")


class ConfigError(ValueError):
    """A config that cannot be run; the message names the field, what was expected and what came."""


def parse(cls: type[Config], values: Mapping[str, Any], *, where: str = "config") -> Config:
    """Builds the frozen dataclass `cls` from a (nested) mapping such as a ConfigDict.

    Raises:
      ConfigError: for an unknown key (naming the nearest field), a missing field or a value of another type.
    """
    if hasattr(values, "to_dict"):  # a ConfigDict is no Mapping
        values = values.to_dict()
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where}.{key}: unknown field of {cls.__name__}{suggestion(key, fields)}")
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}.{name}: missing; {cls.__name__} needs a {_name(hints[name])} here")
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:  # a dataclass's own check of its values
        raise ConfigError(f"{where}: {error}") from None


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest of those that are known, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(known) or 'none'}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, parameters = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in parameters:
            return None
        kinds = [parameter for parameter in parameters if parameter is not type(None)]
        several = isinstance(value, (tuple, list))  # of `str | tuple[str, ...]` the second one is meant
        fitting = [kind for kind in kinds if (typing.get_origin(kind) in (tuple, list)) == several]
        return _convert((fitting or kinds)[0], value, where)
    if origin is typing.Literal:
        if value not in parameters:
            raise ConfigError(f"{where}: expected one of {', '.join(map(repr, parameters))}, got {value!r}")
        return value
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected the fields of {hint.__name__}, got {value!r}")
        return parse(hint, value, where=where)
    if origin in (dict, Mapping) or hint is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a mapping, got {value!r}")
        value_hint = parameters[1] if parameters else Any
        return {str(key): _convert(value_hint, item, f"{where}.{key}") for key, item in value.items()}
    if origin in (tuple, list) or hint in (tuple, list):
        if isinstance(value, str) or not isinstance(value, (tuple, list)):
            raise ConfigError(f"{where}: expected a sequence, got {value!r}")
        item_hint = parameters[0] if parameters else Any
        return tuple(_convert(item_hint, item, f"{where}[{i}]") for i, item in enumerate(value))
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where}: expected a {_name(hint)}, got {value!r} ({type(value).__name__})")
    return value


def _name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint))


def check_least(where: str, settings: Any, **least: float) -> None:
    """ValueError for a field of a dataclass, or one of its numbers if it has several, below its least value, or no number.

    `where` is what the field's name stands behind: "ppo" for "ppo.beta", "" for the name alone.
    """
    for field, smallest in least.items():
        value = getattr(settings, field)
        for number in value if isinstance(value, tuple) else (value,):
            if not number >= smallest:
                raise ValueError(f"{_place(where, field)}: expected at least {smallest}, got {number}")


def check_shares(where: str, settings: Any, *fields: str) -> None:
    """ValueError for a field of a dataclass that is no number from 0 to 1; `where` as above."""
    for field in fields:
        if not 0 <= getattr(settings, field) <= 1:
            raise ValueError(f"{_place(where, field)}: expected a number from 0 to 1, got {getattr(settings, field)}")


def check_choices(where: str, settings: Any) -> None:
    """ValueError for a field of a dataclass that is declared as a Literal and holds something else; `where` as above."""
    for field, hint in typing.get_type_hints(type(settings)).items():
        if typing.get_origin(hint) is typing.Literal and getattr(settings, field) not in typing.get_args(hint):
            expected = ", ".join(map(repr, typing.get_args(hint)))
            raise ValueError(f"{_place(where, field)}: expected one of {expected}, got {getattr(settings, field)!r}")


def _place(where: str, field: str) -> str:
    return f"{where}.{field}" if where else field


def parse_flags(argv: list[str]) -> list[str]:
    """`flags_parser` of a command's `app.run`: a flag that names no config, or no field of it, is one line, not a traceback."""
    from absl import flags  # commands only

    _check_file(argv)
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        if isinstance(error, (AttributeError, KeyError)) and (said := _unknown_field(error, argv, commands=flags.FLAGS)):
            sys.exit(f"error: {said}")
        reason = error
        while reason.args and isinstance(reason.args[0], Exception):  # ml_collections wraps the error that says it
            reason = reason.args[0]
        text = reason.args[0] if reason.args and isinstance(reason.args[0], str) else str(reason)
        lines = text.strip().splitlines() or [type(error).__name__]
        # What a config file raises comes as a flags.Error whose text is a traceback; its last line says what is wrong.
        sys.exit(f"error: {lines[-1] if 'Traceback' in text else ' '.join(lines)}")


def _check_file(argv: list[str]) -> None:
    """Ends the process if the file of `--config` is not there. (ml_collections would say so where the config is first used.)"""
    for argument in argv:
        name, _, value = argument.lstrip("-").partition("=")
        file = value.partition(":")[0]
        if argument.startswith("-") and name == "config" and file and not Path(file).exists():
            sys.exit(f"error: config {file!r} not found; expected a file of the checkout: run there or give its whole path")


def _unknown_field(error: Exception, argv: list[str], *, commands: Container[str]) -> str | None:
    """The flag that names a field its config does not have, beside those that it has; None if the error is another one.

    `commands` are the names of the flags that the command has beside.
    ml_collections says the name alone; the config that it looked into is a variable on the way to its error.
    """
    configs = [frame.f_locals.get("config") for frame, _ in traceback.walk_tb(error.__traceback__)]
    whole = next((config for config in configs if hasattr(config, "to_dict")), None)
    for flag in (argument.lstrip("-").partition("=")[0] for argument in argv if argument.startswith(("--config.", "-config."))):
        place, at = "config", whole
        for name in flag.split(".")[1:]:
            if not hasattr(at, "to_dict"):
                break
            if name not in at:
                if name in commands:
                    return f"{place}.{name}: unknown field; --{name} is a flag of its own"
                near = difflib.get_close_matches(name, at.keys(), n=1, cutoff=0.4)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                return f"{place}.{name}: unknown field{hint}, there are {', '.join(at)}"
            place, at = f"{place}.{name}", at[name]
    return None


def describe(config: Any) -> dict[str, Any]:
    """A dataclass as plain nested JSON values, to be stored beside a checkpoint."""
    if dataclasses.is_dataclass(config):
        return {field.name: describe(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): describe(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [describe(value) for value in config]
    return config


def with_defaults(cls: type, described: Mapping[str, Any]) -> Mapping[str, Any]:
    """A described config that may be older than some fields of `cls`: these get defaults. What cannot be read stays."""
    try:
        return describe(parse(cls, described))
    except ConfigError:
        return described


def leaves(value: Any, field: str = "") -> Iterator[tuple[str, Any]]:
    """(field, value) of every value of a described config that is no dict or list: ("data.train.0", "a.jsonl")."""
    if isinstance(value, (dict, list)):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{field}.{name}" if field else str(name))
    else:
        yield field, value


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, prefix: str = "") -> list[str]:
    """Lines `field: old -> new` for every leaf in which two described configs differ."""
    lines = []
    for key in sorted({*old, *new}):
        a, b, name = old.get(key, "(absent)"), new.get(key, "(absent)"), f"{prefix}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, prefix=f"{name}.")
        elif a != b:
            lines.append(f"{name}: {a!r} -> {b!r}")
    return lines
