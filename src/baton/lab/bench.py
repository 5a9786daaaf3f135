"""`baton bench`: put load on a server and say honestly what came back."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from baton.base.clock import MonotonicClock
from baton.base.errors import ConfigError, Unavailable
from baton.lab.client import Client, WireError
from baton.lab.config import BenchConfig
from baton.lab.endpoints import endpoint
from baton.lab.load import Load
from baton.lab.metrics import Objectives, Record, summarize
from baton.lab.report import Conditions, Outcome, json_line, raw_lines, table
from baton.lab.workload import plan, warmup

OnDone = Callable[[Record], None]


def run(config: BenchConfig) -> int:
    """Measure, print the table and, as the last line of stdout, the JSON document. Returns the exit code: 0; 1 if
    requests failed; 130 if interrupted (the report is then a partial one). Raises `BatonError` if nothing could be
    measured at all."""
    save = _open_for_writing(config.save) if config.save else None
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(save) if save is not None else None
        on_done = stack.enter_context(_progress(config))
        outcome = run_async(measure(config, on_done))
        if file is not None:
            file.writelines(line + "\n" for line in raw_lines(outcome.records))
    if not config.quiet:
        Console().print(table(outcome))
    sys.stdout.write(json_line(outcome) + "\n")
    sys.stdout.flush()
    return outcome.exit_code


def run_async(main: Coroutine[Any, Any, Outcome]) -> Outcome:
    """On uvloop where it is there: a quarter less CPU per chunk (benchmarks/generator.py)."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    outcome: Outcome = uvloop.run(main)
    return outcome


async def measure(config: BenchConfig, on_done: OnDone = lambda record: None) -> Outcome:
    """One run, warm-up first. SIGINT and SIGTERM end it early with what there is. Raises `Unavailable` if the server
    cannot be reached, `ConfigError` if the workload cannot be made."""
    jobs, first = plan(config), warmup(config)
    clock = MonotonicClock()
    conditions = Conditions.here()
    with contextlib.closing(
        Client(config.url, clock, api_key=config.api_key, connect_timeout=config.connect_timeout)
    ) as client:
        model = config.model or await served_model(client, config)
        wire = endpoint(config, model)
        load = Load(client, wire, config, clock)

        async def both() -> None:
            warm = Load(client, wire, config, clock)
            for job in first:
                await warm.run([job])
            await load.run(jobs, on_done)

        task = asyncio.ensure_future(both())
        with _interruptible(task) as interrupted:
            try:
                await task
            except asyncio.CancelledError:
                if not interrupted:
                    raise
    objectives = Objectives(config.slo_ttft, config.slo_tpot, config.slo_itl)
    summary = summarize(load.records, objectives)
    return Outcome(config, model, summary, load.records, conditions, load.cpu_seconds, interrupted=bool(interrupted))


class _Models(msgspec.Struct):
    class Card(msgspec.Struct):
        id: str

    data: list[Card]


async def served_model(client: Client, config: BenchConfig) -> str:
    """The first model that the server names; for `/generate`, which needs no name, the URL will do."""
    if config.endpoint == "generate":
        return config.url
    try:
        reply = await client.get("/v1/models")
    except WireError as error:
        raise Unavailable(f"nothing to measure at {config.url}: {error}") from error
    if reply.status != 200:
        raise Unavailable(f"{config.url}/v1/models answered {reply.status}; name the model with --model")
    try:
        models = msgspec.json.decode(reply.body, type=_Models)
        return models.data[0].id
    except (msgspec.MsgspecError, IndexError) as error:
        raise Unavailable(f"{config.url}/v1/models names no model; name it with --model") from error


@contextlib.contextmanager
def _interruptible(task: asyncio.Task[None]) -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM cancels the task and stands in the list. Outside of the main thread: nothing."""
    loop = asyncio.get_running_loop()
    seen: list[int] = []

    def interrupt(number: int) -> None:
        seen.append(number)
        task.cancel()

    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
                handler = signal.getsignal(number)
                loop.add_signal_handler(number, interrupt, number)
                before[number] = handler
        yield seen
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)  # the loop would leave the default: a caller's own handler was there


@contextlib.contextmanager
def _progress(config: BenchConfig) -> Iterator[OnDone]:
    """A bar on stderr, drawn twice a second at most: drawing costs CPU that the server may need."""
    console = Console(stderr=True)
    if config.quiet or not console.is_terminal:
        yield lambda record: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[failed]}"), console=console, refresh_per_second=2) as bar:
        failed = 0
        task = bar.add_task(config.label or "bench", total=len(plan(config)), failed="")

        def on_done(record: Record) -> None:
            nonlocal failed
            failed += bool(record.error)
            bar.update(task, advance=1, failed=f"[red]{failed} failed" if failed else "")

        yield on_done


def _open_for_writing(path: str) -> Any:
    """Before the run, so that a wrong path costs nothing."""
    try:
        return Path(path).expanduser().open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"save: cannot write {path}: {error}") from error
