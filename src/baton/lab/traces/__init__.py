"""Recorded arrivals and lengths: samples that come along (see LICENSES.md here) and files of the same formats.

Formats, told apart by their content:

* CSV with `arrived_at,num_prefill_tokens,num_decode_tokens` (seconds), or as Azure publishes it:
  `TIMESTAMP,ContextTokens,GeneratedTokens` (dates);
* JSON lines with `timestamp` (milliseconds), `input_length`, `output_length` and, if known, `hash_ids`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from baton.base.errors import ConfigError, unknown

HERE = Path(__file__).parent
TRACES = {
    "azure-conversation": HERE / "azure_conversation.csv",
    "azure-code": HERE / "azure_code.csv",
    "mooncake-conversation": HERE / "mooncake_conversation.jsonl",
}


@dataclass(frozen=True, slots=True)
class TraceRow:
    arrived_at: float
    """Seconds, from any origin."""
    input_len: int
    output_len: int
    blocks: tuple[int, ...] = ()
    """Equal numbers in front are equal beginnings of prompts; empty: not known."""


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def load_trace(name: str) -> list[TraceRow]:
    """A trace that comes along, or the file at that path, by time. Raises `ConfigError` with the line at fault."""
    path = TRACES.get(name, Path(name).expanduser())
    if not path.is_file():
        raise ConfigError(unknown("dataset", name, ["synthetic", *TRACES]) + "; nor is it a file")
    lines = path.read_text("utf-8").splitlines()
    read = _json_row if lines and lines[0].lstrip().startswith("{") else _csv_reader(path, lines)
    skip = 0 if read is _json_row else 1
    rows: list[TraceRow] = []
    for number, line in enumerate(lines[skip:], start=skip + 1):
        if not line.strip():
            continue
        try:
            rows.append(read(line))
        except (ValueError, IndexError, msgspec.MsgspecError) as error:
            raise ConfigError(f"{path}, line {number}: not a row of a trace ({error}): {line[:80]}") from error
    if not rows:
        raise ConfigError(f"{path} has no rows")
    return sorted(rows, key=lambda row: row.arrived_at)


def _json_row(line: str) -> TraceRow:
    row = msgspec.json.decode(line, type=_Line)
    return TraceRow(row.timestamp / 1000, row.input_length, row.output_length, row.hash_ids)


@dataclass(frozen=True, slots=True)
class _CsvReader:
    time: int
    input: int
    output: int
    dates: bool

    def __call__(self, line: str) -> TraceRow:
        cells = next(csv.reader([line]))
        text = cells[self.time]
        # Azure writes seven digits of a second; Python 3.11 reads them, dropping the last
        when = datetime.fromisoformat(text).timestamp() if self.dates else float(text)
        return TraceRow(when, int(cells[self.input]), int(cells[self.output]))


def _csv_reader(path: Path, lines: Iterable[str]) -> _CsvReader:
    header = [cell.strip() for cell in next(csv.reader(lines), [])]
    for time, prompt, answer, dates in (
        ("arrived_at", "num_prefill_tokens", "num_decode_tokens", False),
        ("TIMESTAMP", "ContextTokens", "GeneratedTokens", True),
    ):
        if {time, prompt, answer} <= set(header):
            return _CsvReader(header.index(time), header.index(prompt), header.index(answer), dates)
    raise ConfigError(
        f"{path} is no trace: its first line must be arrived_at,num_prefill_tokens,num_decode_tokens "
        "or TIMESTAMP,ContextTokens,GeneratedTokens, or JSON with timestamp, input_length, output_length"
    )
