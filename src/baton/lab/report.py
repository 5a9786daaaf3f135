"""A run for people (a table) and for programs (one JSON line), with the conditions under which it was measured."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Group
from rich.table import Table
from rich.text import Text

from baton.lab.config import BenchConfig
from baton.lab.metrics import Record, Stats, Summary

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")

BUSY_GENERATOR = 0.5
"""Cores; a generator that uses more is suspected of slowing the server, or of sending late."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """Where and how: what somebody else needs to measure the same."""

    date: str
    host: str
    cpu: str
    isa: str
    """Instruction sets that decide how fast a model runs on this CPU."""
    cores: int
    """That this process may use."""
    load_before: float
    """Load average over the last minute when the run began: 0 on a quiet machine."""
    python: str
    baton: str
    git: str
    """Commit of the working tree, `+` if it had changes; empty outside of one."""

    @classmethod
    def here(cls) -> Conditions:
        return cls(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            host=platform.node(),
            cpu=_cpuinfo("model name") or platform.processor() or platform.machine(),
            isa=" ".join(name for name in INSTRUCTION_SETS if name in _cpuinfo("flags").split()),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            load_before=round(os.getloadavg()[0], 2),
            python=platform.python_version(),
            baton=metadata.version("baton-llm"),
            git=_git(),
        )


def _cpuinfo(field: str) -> str:
    """Of the first core, where Linux tells; else empty."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def _git() -> str:
    """Only where this file is tracked: a virtual environment inside of somebody's repository says nothing about us."""
    here = Path(__file__)
    if _run_git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return ""
    return _run_git(here.parent, "describe", "--always", "--dirty=+", "--exclude=*") or ""


def _run_git(directory: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything of one run."""

    config: BenchConfig
    model: str
    summary: Summary
    records: Sequence[Record]
    conditions: Conditions
    client_cpu: float
    """Seconds of CPU that the generator used."""
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """0: all well. 1: requests failed, or none completed. 130: interrupted."""
        if self.interrupted:
            return 130
        return 1 if self.summary.failed or not self.summary.completed else 0


def json_line(outcome: Outcome) -> str:
    """The run as one line. Secrets are left out, and times have microseconds, not more."""
    config = dataclasses.asdict(outcome.config)
    config["api_key"] = bool(config["api_key"])
    document = {
        "bench": outcome.config.label or outcome.config.dataset,
        "model": outcome.model,
        **dataclasses.asdict(outcome.summary),
        "client_cpu_seconds": outcome.client_cpu,
        "config": config,
        "conditions": dataclasses.asdict(outcome.conditions),
    }
    return msgspec.json.encode(rounded(document)).decode()


def rounded(value: Any) -> Any:
    """Floats to three digits after the point (ms: microseconds), in whatever they are nested."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def raw_lines(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        yield msgspec.json.encode(dataclasses.asdict(record)).decode()


def table(outcome: Outcome) -> Group:
    """Latencies, totals, doubts and conditions."""
    title = f"{outcome.config.label or outcome.config.dataset}: {outcome.model} at {outcome.config.url}"
    grid = Table(title=title, title_justify="left")
    for name in ("ms", "mean", "p50", "p90", "p99", "max"):
        grid.add_column(name, justify="left" if name == "ms" else "right")
    for name, stats in _latencies(outcome.summary):
        grid.add_row(name, *_cells(stats))
    totals = Table.grid(padding=(0, 2))
    for name, text in _totals(outcome):
        totals.add_row(f" {name}", text)
    return Group(grid, totals, Text(_caption(outcome.conditions), style="dim"))


def _latencies(summary: Summary) -> Iterator[tuple[str, Stats]]:
    late = summary.late is not None and summary.late.max >= 1.0  # a timer's millisecond is not lateness
    rows = {
        "TTFT": summary.ttft,
        "TTFT from due": summary.ttft_due if late else None,
        "TTST": summary.ttst,
        "TPOT": summary.tpot,
        "ITL": summary.itl,
        "E2E": summary.e2e,
        "sent late": summary.late if late else None,
    }
    return ((name, stats) for name, stats in rows.items() if stats is not None)


def _cells(stats: Stats) -> Iterator[str]:
    return (f"{value:,.1f}" for value in (stats.mean, stats.p50, stats.p90, stats.p99, stats.max))


def _totals(outcome: Outcome) -> Iterator[tuple[str, str]]:
    summary = outcome.summary
    errors = ", ".join(f"{count} {kind}" for kind, count in summary.errors.items())
    yield "requests", f"{summary.completed} completed, {summary.failed} failed" + (f": {errors}" if errors else "")
    if summary.interrupted:
        yield "", f"{summary.interrupted} interrupted"
    yield "seconds", f"{summary.seconds:,.2f}"
    yield "requests/s", f"{summary.requests_per_s:,.2f}"
    yield "input tok/s", f"{summary.input_tok_per_s:,.1f}"
    yield "output tok/s", f"{summary.output_tok_per_s:,.1f}"
    if summary.cached_tokens:
        yield "cached tokens", f"{summary.cached_tokens:,} of {summary.prompt_tokens:,}"
    if summary.goodput_per_s is not None:
        yield "goodput/s", f"{summary.goodput_per_s:,.2f} ({summary.attainment or 0:.0%} within the objectives)"
    for warning in warnings(outcome):
        yield "note", warning


def warnings(outcome: Outcome) -> Iterator[str]:
    """What makes the figures doubtful."""
    summary = outcome.summary
    if summary.seconds > 0 and outcome.client_cpu / summary.seconds > BUSY_GENERATOR:
        yield f"the generator used {outcome.client_cpu / summary.seconds:.2f} cores: it may have slowed the server"
    if summary.counted:
        yield f"{summary.counted} answers had no usage: their tokens are counted chunks"
    for record in outcome.records:
        if record.error and record.detail:
            yield f"first error: {record.error}: {record.detail}"
            return


def _caption(conditions: Conditions) -> str:
    git = f" ({conditions.git})" if conditions.git else ""
    return (
        f"{conditions.date}, {conditions.host}: {conditions.cores} cores {conditions.cpu} ({conditions.isa}), "
        f"load before {conditions.load_before}; Python {conditions.python}, Baton {conditions.baton}{git}"
    )
