"""Writes docs/configuration.md from the configuration dataclasses; `--check` only says whether it is up to date."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from pathlib import Path
from typing import Any

from baton.base.config import DisaggConfig, EngineConfig, GatewayConfig, WorkerConfig
from baton.lab.config import BenchConfig

TARGET = Path(__file__).parents[1] / "docs" / "configuration.md"
SECTIONS: list[tuple[str, str, type]] = [
    ("Engine", "`baton serve`, `baton worker`", EngineConfig),
    ("Prefill and decode apart", "`baton serve`, `baton worker`", DisaggConfig),
    ("Worker", "`baton worker`", WorkerConfig),
    ("Gateway", "`baton serve`, `baton gateway`", GatewayConfig),
    ("Bench", "`baton bench`", BenchConfig),
]
HEAD = """\
# Configuration

Made by `make docs` from the dataclasses in `baton.base.config` and `baton.lab.config`, where each default stands once.
`BATON_<COMMAND>_<OPTION>` in the environment works too: `BATON_SERVE_PORT=8080`. Which command takes which option:
[the command line](cli.md).
"""


def render() -> str:
    return "\n".join([HEAD, *(section(*row) for row in SECTIONS)])


def section(title: str, commands: str, config: type) -> str:
    types = typing.get_type_hints(config)
    rows = [row(field, types[field.name]) for field in dataclasses.fields(config)]
    head = ["| option | default | meaning |", "|---|---|---|"]
    doc = (inspect.getdoc(config) or "").partition("\n")[0]
    return "\n".join([f"## {title}", "", f"{doc} ({commands})", "", *head, *rows, ""])


def row(field: dataclasses.Field[Any], kind: type) -> str:
    name = "--" + field.name.replace("_", "-")
    names = [name if kind is not bool else f"{name}, --no-{name[2:]}", *field.metadata["flags"]]
    return f"| `{', '.join(names)}` | {default(field.default)} | {meaning(field)} |"


def default(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value in ("", ()) else f"`{value}`"


def meaning(field: dataclasses.Field[Any]) -> str:
    """The help text, and the choices where it does not name all of them."""
    text, choices = field.metadata["help"].replace("|", "\\|"), field.metadata["choices"] or ()
    if all(choice in text for choice in choices):
        return str(text)
    return f"{text} ({', '.join(f'`{choice}`' for choice in choices)})"


def main() -> int:
    text = render()
    if "--check" in sys.argv[1:]:
        return int(TARGET.read_text() != text)
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
