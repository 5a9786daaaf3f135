"""Is a request ever lost? Faults of every kind, one kind after the other, and what the clients see of them.

    python benchmarks/chaos.py [--requests 1000] [--peers VENV] [--only baton]

Two prefill and two decode workers with a tiny model, a proxy that does harm before each, a router before the proxies,
16 clients: chats, completions and /generate, whole and streamed, greedy and seeded, with stop strings, logprobs, n = 2.
Every answer is compared with that of the undisturbed run. Harm is done to 15 % of the requests that reach a worker;
processes are killed or stopped after a quarter of a kind's requests. `--peers` is a virtual environment with
sglang-router (before the same pairs) and vllm-router (before the two decode workers, which serve undivided: it does not
speak the protocol of our pairs). Prints a table per router and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx
from tests import tiny_model
from tests.chaos.load import End, Load, Outcome, tally
from tests.chaos.proxy import Harm, sometimes
from tests.chaos.stage import BACKEND, Behind, Gateway, Stage, flags, staged, until
from tests.chaos.torment import Blow, Tormentor
from tests.e2e.stacks import START_PATIENCE, Stack, client, free_port, serve

CHANCE = 0.15
PATIENCE = 30.0
"""Seconds; a client that has no answer by then counts as lost."""
HEALTH = ("--health-check-interval-secs", "1", "--health-check-timeout-secs", "1")
"""The peers look after their workers as often as we do."""
Fault = Harm | Blow


@dataclass(frozen=True)
class Row:
    router: str
    fault: str
    requests: int
    repeated: int
    """Attempts before anything of an answer was seen."""
    continued: int
    """Streams that went on on another worker."""
    exact: int
    lost: int
    error_events: int
    refused: int
    wrong: int
    """Answered with 200 and a proper end, but a gap, a repeat, or other words."""
    worst_s: float
    pages_left: float


class Peer(Gateway):
    """A router of others, out of a virtual environment."""

    venv = Path()

    async def ready(self, workers: int) -> None:
        await until(self._answers, "the router", START_PATIENCE)

    def held(self) -> list[str]:
        return []

    def metric(self, name: str) -> float:
        return 0.0

    def _answers(self) -> bool:
        try:
            with client(self.url, 5) as http:
                body = {"model": "default", "prompt": "hello", "max_tokens": 2}
                return http.post("/v1/completions", json=body).status_code == 200
        except httpx.TransportError:
            return False


class SglangRouter(Peer):
    def command(self, workers: Behind) -> list[str]:
        line = [str(self.venv / "bin" / "python"), "-m", "sglang_router.launch_router", "--pd-disaggregation"]
        for role, url, room in workers:
            line += [f"--{role}", url, *([str(room)] if role == "prefill" else [])]
        line += ["--prometheus-port", str(free_port()), "--log-level", "warn"]
        return [*line, "--host", "127.0.0.1", "--port", str(self.port), "--policy", "round_robin", *HEALTH]


class VllmRouter(Peer):
    def command(self, workers: Behind) -> list[str]:
        urls = [url for role, url, _ in workers if role == "decode"]
        line = [str(self.venv / "bin" / "vllm-router"), "--worker-urls", *urls]
        line += ["--prometheus-port", str(free_port()), "--log-level", "warning"]
        return [*line, "--host", "127.0.0.1", "--port", str(self.port), "--policy", "round_robin", *HEALTH]


async def torment(kind: type[Gateway], stack: Stack, load: Load, directory: Path, requests: int) -> list[Row]:
    faults: list[Fault] = [*Harm, *Blow]
    rows = []
    async with staged(stack, directory, 1, [kind]) as stage:
        if kind is not Gateway:
            await _leave_out_what_it_cannot(stage, load)
        for index, fault in enumerate(faults):
            count = requests // len(faults) + (index < requests % len(faults))
            before = _attempts(stage)
            begun = time.monotonic()
            outcomes = await _one(stage, load, fault, count)
            left = await _pages(stage)
            repeated, continued = (now - then for now, then in zip(_attempts(stage), before, strict=True))
            rows.append(_row(kind, fault, outcomes, left, repeated, continued))
            print(f"{rows[-1]}, {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
    return rows


async def _leave_out_what_it_cannot(stage: Stage, load: Load) -> None:
    """What a peer answers differently when nobody disturbs it is no measure of what it does when it is disturbed."""
    outcomes = await load.ask(stage.url, len(load.questions))
    load.questions = [outcome.question for outcome in outcomes if outcome.end is End.EXACT]
    other = [f"{one.question.endpoint}, stream {one.question.stream}: {one.words}" for one in outcomes if one.words]
    print(f"{len(other)} questions left out:", *other, sep="\n  ", file=sys.stderr)


async def _one(stage: Stage, load: Load, fault: Fault, count: int) -> list[Outcome]:
    if isinstance(fault, Harm):
        for index, proxy in enumerate(stage.proxies.values()):
            proxy.choose = sometimes([fault], CHANCE, index)
        outcomes = await load.ask(stage.url, count)
        for proxy in stage.proxies.values():
            proxy.choose = sometimes([], 0.0, 0)
        return outcomes
    striking = asyncio.create_task(Tormentor(stage, load).run([fault], count))
    outcomes = await load.ask(stage.url, count)
    await striking
    return outcomes


async def _pages(stage: Stage) -> float:
    """KV pages that are held although nobody asks for anything any more; all workers live again after this."""
    try:
        await stage.settled()
    except AssertionError:
        return sum(float(what.split()[-1]) for what in stage.held() if "kv_pages" in what)
    return 0


def _attempts(stage: Stage) -> tuple[int, int]:
    """(repeated, continued) so far, as far as the router says it."""
    gateway = stage.gateways[0]
    names = ("baton_gateway_retries_total", "baton_gateway_resumes_total")
    repeated, continued = (int(gateway.metric(name)) for name in names)
    return repeated, continued


def _row(
    kind: type[Gateway], fault: Fault, outcomes: list[Outcome], pages: float, repeated: int, continued: int
) -> Row:
    ends = tally(outcomes)
    return Row(
        NAMES[kind],
        fault.value,
        len(outcomes),
        repeated,
        continued,
        ends[End.EXACT],
        ends[End.LOST],
        ends[End.EVENT],
        ends[End.REFUSED],
        ends[End.WRONG],
        round(max((outcome.seconds for outcome in outcomes), default=0.0), 1),
        pages,
    )


NAMES: dict[type[Gateway], str] = {Gateway: "baton", SglangRouter: "sglang-router", VllmRouter: "vllm-router"}


def _table(rows: list[Row]) -> Iterator[str]:
    names = ("fault", *(name.replace("_", " ") for name in COUNTED), "worst, s", "pages left")
    yield f"| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"
    total = [sum(getattr(row, name) for row in rows) for name in COUNTED]
    for row in rows:
        counts = " | ".join(str(getattr(row, name)) for name in COUNTED)
        yield f"| {row.fault} | {counts} | {row.worst_s:.1f} | {row.pages_left:g} |"
    left = sum(row.pages_left for row in rows)
    yield f"| **all** | {' | '.join(map(str, total))} | {max(row.worst_s for row in rows):.1f} | {left:g} |"


COUNTED = ("requests", "repeated", "continued", "exact", "lost", "error_events", "refused", "wrong")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--peers", type=Path, help="virtual environment with sglang-router and vllm-router")
    parser.add_argument("--only", choices=list(NAMES.values()))
    options = parser.parse_args()
    kinds = [Gateway, *([SglangRouter, VllmRouter] if options.peers else [])]
    Peer.venv = options.peers or Path()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "model").mkdir()
        model = tiny_model.write(directory / "model")
        for kind in kinds:
            if options.only in (None, NAMES[kind]):
                with serve(model, BACKEND, directory, *flags()) as stack:  # fresh: restarts in a row come slower
                    load = Load(patience=PATIENCE)
                    asyncio.run(load.learn(stack.url))
                    found = asyncio.run(torment(kind, stack, load, directory, options.requests))
                rows += found
                print(f"\n{NAMES[kind]}\n", *_table(found), sep="\n", flush=True)
    print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
