"""Command line options made from configuration dataclasses: name, default, help, aliases and choices stand there once.

`--x` and `--no-x` for booleans; other spellings come from the field's metadata. Options of one dataclass are one
section of the help text.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import click

Config = TypeVar("Config")
Function = TypeVar("Function", bound=Callable[..., Any])


class Option(click.Option):
    """An option that knows its section of the help text, and which of its spellings to show there."""

    def __init__(self, *args: Any, section: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class Command(click.Command):
    """Help in sections; the options that have none come last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                sections.setdefault(getattr(param, "section", "") or "Options", []).append(record)
        for section in sorted(sections, key="Options".__eq__):
            with formatter.section(section):
                formatter.write_dl(sections[section])


def config_options(
    config: type,
    section: str,
    *,
    skip: Collection[str] = (),
    only: Collection[str] | None = None,
    extra: Mapping[str, tuple[str, ...]] | None = None,
) -> Callable[[Function], Function]:
    """A decorator that adds an option for each field of `config` (but `skip`); `extra` adds spellings per field,
    those of a boolean as `--on/--off`, either side may be missing."""

    def decorate(function: Function) -> Function:
        for field in reversed(dataclasses.fields(config)):
            if field.name not in skip and (only is None or field.name in only):
                function = _option(config, field, section, (extra or {}).get(field.name, ()))(function)
        return function

    return decorate


def build(config: Callable[..., Config], values: dict[str, Any]) -> Config:
    """An instance of the dataclass from the values of its options; others are ignored, missing ones default."""
    names = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    return config(**{name: value for name, value in values.items() if name in names})


def default_of(config: type, name: str) -> Any:
    """The default of a field, for options that are not made from it."""
    return next(field.default for field in dataclasses.fields(config) if field.name == name)


def _option(
    config: type, field: dataclasses.Field[Any], section: str, extra: tuple[str, ...]
) -> Callable[[Function], Function]:
    kind = _types(config)[field.name]
    main = "--" + field.name.replace("_", "-")
    metadata = field.metadata
    spellings = [s for s in (*metadata["flags"], *extra) if s != main]
    common: dict[str, Any] = {"default": field.default, "show_default": True, "help": metadata["help"]}
    if kind is bool:
        declared = [f"{main}/--no-{main[2:]}", *spellings]
    elif typing.get_origin(kind) is tuple:
        declared = [main, *spellings]
        common["multiple"] = True
        common["show_default"] = False
    else:
        declared = [main, *spellings]
        common["type"] = click.Choice(metadata["choices"]) if metadata["choices"] else kind
        if field.default == "":
            common["show_default"] = False
    return click.option(field.name, *declared, cls=Option, section=section, **common)


@functools.cache
def _types(config: type) -> dict[str, type]:
    return typing.get_type_hints(config)
