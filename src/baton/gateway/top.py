"""`baton top`: what the dashboard shows, in a terminal. Asks a gateway over HTTP, like any other client."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import httpx
import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from baton.base.errors import BatonError, Unavailable
from baton.gateway.views import Percentiles, Point, Requests, RequestView, Stats, WorkerView

BARS = "▁▂▃▄▅▆▇█"
STYLES = {"prefill": "dark_orange3", "decode": "dark_cyan", "regular": "medium_purple3"}
STATES = {"ready": "green", "down": "red", "open": "red", "half_open": "yellow", "draining": "yellow"}
ROWS = 15
KEYS = "q: quit"


@dataclass(frozen=True, slots=True)
class Frame:
    stats: Stats
    requests: list[RequestView]


class Gateway:
    """One gateway, asked again and again."""

    def __init__(self, url: str, key: str) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=5.0)

    def close(self) -> None:
        self._http.close()

    def frame(self) -> Frame:
        """Raises `BatonError` with what is wrong, for people."""
        try:
            return Frame(
                msgspec.json.decode(self._get("/stats"), type=Stats),
                msgspec.json.decode(self._get(f"/requests?limit={ROWS}"), type=Requests).requests,
            )
        except msgspec.MsgspecError as error:
            raise BatonError(f"{self._http.base_url} is no gateway of this version: {error}") from error

    def _get(self, path: str) -> bytes:
        try:
            reply = self._http.get(path)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unavailable(f"{self._http.base_url} does not answer: {error}") from error
        if reply.status_code in (401, 403):
            raise BatonError("the gateway wants an admin's key: BATON_ADMIN_API_KEY or BATON_API_KEY")
        if reply.status_code != 200:
            raise BatonError(f"{self._http.base_url}{path} answered {reply.status_code}")
        return reply.content


def run(url: str, key: str, *, once: bool, interval: float, console: Console | None = None) -> int:
    """Until q or Ctrl-C; `once`: one frame. Raises `BatonError` if the first frame cannot be had."""
    console = console or Console()
    gateway = Gateway(url, key)
    try:
        frame = gateway.frame()
        if once:
            console.print(draw(frame))
            return 0
        with contextlib.suppress(KeyboardInterrupt), _raw_keys() as keys:
            _watch(gateway, frame, interval, console, keys)
        return 0
    finally:
        gateway.close()


def _watch(gateway: Gateway, frame: Frame, interval: float, console: Console, keys: int | None) -> None:
    with Live(draw(frame), console=console, screen=True, auto_refresh=False) as live:
        while not _quits(keys, interval):
            try:
                frame = gateway.frame()
                live.update(draw(frame), refresh=True)
            except BatonError as error:
                live.update(Group(Text(error.message, "bold red"), draw(frame)), refresh=True)


def _quits(keys: int | None, seconds: float) -> bool:
    """Waits; True as soon as somebody presses q."""
    if keys is None:
        time.sleep(seconds)
        return False
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if not select.select([keys], [], [], left)[0]:
            return False
        pressed = os.read(keys, 64)
        if b"q" in pressed or not pressed:
            return True
    return False


@contextlib.contextmanager
def _raw_keys() -> Iterator[int | None]:
    """Standard input key by key, if it is a terminal."""
    if not sys.stdin.isatty():
        yield None
        return
    import termios
    import tty

    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    try:
        tty.setcbreak(number)
        yield number
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)


# --- what is drawn


def draw(frame: Frame) -> RenderableType:
    return Group(_heading(frame.stats), _figures(frame.stats), _workers(frame.stats.workers), _requests(frame.requests))


def _heading(stats: Stats) -> RenderableType:
    flow = stats.flow
    line = Text.assemble(
        ("Baton ", "bold"),
        f"{stats.requests_per_second:.1f} req/s, {stats.output_tokens_per_second:.0f} tokens/s, "
        f"{stats.in_flight} in flight, {stats.queued} waiting for a place.  ",
        ("split ", STYLES["prefill"]),
        f"{flow.split}  ",
        ("whole ", STYLES["decode"]),
        f"{flow.whole}  retries {flow.retries}  resumed {flow.resumes}  ",
        (f"errors {flow.errors}", "bold red" if flow.errors else ""),
        (f"   last {stats.seconds:.0f} s   {KEYS}", "dim"),
    )
    return Panel(line, border_style="dim", padding=(0, 1))


def _figures(stats: Stats) -> RenderableType:
    numbers = {"p50": 8, "p95": 8, "p99": 8}
    table = _table([("", 19), *numbers.items(), ("last minute", 0)], numbers)
    rows: tuple[tuple[str, Percentiles, list[float | None]], ...] = (
        ("time to first token", stats.ttft, [point.ttft for point in stats.series]),
        ("between tokens", stats.itl, [point.itl for point in stats.series]),
        ("whole request", stats.total, [point.total for point in stats.series]),
    )
    for title, figures, values in rows:
        cells = [duration(x) if figures.count else "-" for x in (figures.p50, figures.p95, figures.p99)]
        table.add_row(title, *cells, Text(spark(values), "blue"))
    table.add_row("requests", "", "", "", Text(spark(_counts(stats.series)), "blue"))
    return table


def _counts(series: list[Point]) -> list[float | None]:
    return [float(point.requests) for point in series]


def _table(columns: Sequence[tuple[str, int]], right: Collection[str]) -> Table:
    """A table whose columns keep at least the width given for them; only those with 0 give way on a narrow screen."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for name, width in columns:
        justify: Literal["left", "right"] = "right" if name in right else "left"
        table.add_column(name, justify=justify, min_width=width or None, no_wrap=True, overflow="ellipsis")
    return table


def _workers(workers: list[WorkerView]) -> RenderableType:
    numbers = {"open": 4, "run": 3, "queue": 5, "moves": 5, "KV": 5, "tok/s": 5, "served": 6, "errors": 6}
    table = _table([("worker", 12), ("state", 8), *numbers.items(), ("", 0)], numbers)
    for worker in workers:
        engine = worker.engine
        used = f"{100 * engine.used_tokens / engine.max_tokens:.0f} %" if engine and engine.max_tokens else "-"
        says = (
            (str(engine.running), str(engine.waiting), str(engine.handoffs), used, f"{engine.throughput:.0f}")
            if engine
            else ("-",) * 5
        )
        table.add_row(
            Text(worker.name, STYLES[worker.role]),
            Text(worker.state, STATES.get(worker.state, "")),
            str(worker.in_flight),
            *says,
            str(worker.served),
            Text(str(worker.errors), "red" if worker.errors else ""),
            Text(worker.reason or worker.url, "red" if worker.reason else "dim"),
        )
    return table


def _requests(requests: list[RequestView]) -> RenderableType:
    columns = [("request", 8), ("route", 16), ("status", 6), ("way", 0), ("by", 0)]
    numbers = {"first": 7, "total": 7, "out": 4}
    table = _table([*columns, *numbers.items()], numbers)
    for request in requests:
        again = f", {request.attempts} attempts" if request.attempts > 1 else ""
        table.add_row(
            Text(request.id[:8]),
            Text(request.route.removeprefix("/v1/")),
            _status(request),
            Text(request.way.partition("_")[0] + (", resumed" if request.resumes else again)),
            Text(" → ".join(request.workers)),
            "-" if request.ttft is None else duration(request.ttft),
            duration(request.total),
            str(request.output_tokens or ""),
        )
    return table


def _status(request: RequestView) -> Text:
    if not request.status:
        return Text("running", "blue")
    bad = request.status >= 500 or (request.status < 400 and bool(request.error))
    return Text(str(request.status), "bold red" if bad else "yellow" if request.status >= 400 else "green")


def duration(ms: float) -> str:
    return f"{ms / 1e3:.2f} s" if ms >= 1000 else f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms"


def spark(values: list[float | None]) -> str:
    """A line of bars, the highest full; a gap where there is nothing."""
    top = max((value for value in values if value), default=0.0)
    if not top:
        return ""
    return "".join(" " if not value else BARS[min(7, int(8 * value / top))] for value in values)
