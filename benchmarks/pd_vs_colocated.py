"""Prefill and decode apart against two colocated replicas: same machine, same load, one core per worker, one run.

    python benchmarks/pd_vs_colocated.py                                ours, both ways, about ten minutes
    python benchmarks/pd_vs_colocated.py --quick                        the same in a minute: does it work?
    python benchmarks/pd_vs_colocated.py --vllm PEERS/vllm --router PEERS/routers      with the real peers

Both ways run at once and are measured in turns, with the same seeds for each; the one that is not measured rests. The
peers (vLLM, see peers.py) are 2 colocated instances and 1 prefill + 1 decode over NIXL, each behind vllm-router. They
use some CPU even at rest, so each is started when its turn comes and stopped after it; the last seed of ours is
measured after them, so that a machine that changed its mood meanwhile shows.
Prints the table of the published experiment (P/D against replicas: TTFT, TPOT, ITL) and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers import Peers, two_cores
from rich.console import Console
from rich.table import Table
from servers import Fleet, NotReady, greedy_text, idle_cores, note

from baton.lab.bench import measure, run_async
from baton.lab.config import BenchConfig
from baton.lab.metrics import Stats, Summary
from baton.lab.report import Conditions, rounded
from baton.lab.workload import plan

PD = "native(P:d1t1p1|D:d1t1p1)"
COLOCATED = "native:d2t1p1"


@dataclass(frozen=True)
class LoadShape:
    input_len: int
    output_len: int
    requests: int = 24
    concurrency: int = 6
    rate: str = "inf"

    @property
    def name(self) -> str:
        arrivals = "" if self.rate == "inf" else f" at {self.rate}/s"
        return f"{self.input_len}/{self.output_len}{arrivals}"

    def config(self, url: str, seed: int, label: str) -> BenchConfig:
        return BenchConfig(
            url=url,
            input_len=str(self.input_len),
            output_len=str(self.output_len),
            requests=self.requests,
            concurrency=self.concurrency,
            rate=self.rate,
            seed=seed,
            warmup=2,
            label=label,
        )


@dataclass
class Arm:
    """One way of serving, and what was measured of it: per load, one summary for each seed."""

    name: str
    url: str
    results: dict[str, list[Summary]] = field(default_factory=dict)
    failed: int = 0


@dataclass(frozen=True)
class Column:
    title: str
    value: Callable[[Summary], float]
    digits: int = 0


def _of(name: str, statistic: str) -> Callable[[Summary], float]:
    def value(summary: Summary) -> float:
        stats: Stats | None = getattr(summary, name)
        return float("nan") if stats is None else float(getattr(stats, statistic))

    return value


COLUMNS = (
    Column("out tok/s", lambda summary: summary.output_tok_per_s, 1),
    Column("TTFT mean", _of("ttft", "mean")),
    Column("TTFT p99", _of("ttft", "p99")),
    Column("TTST mean", _of("ttst", "mean")),
    Column("TPOT mean", _of("tpot", "mean"), 1),
    Column("TPOT p99", _of("tpot", "p99"), 1),
    Column("ITL p50", _of("itl", "p50"), 1),
    Column("ITL p99", _of("itl", "p99"), 1),
    Column("ITL max", _of("itl", "max")),
)


def turn(arm: Arm, load: LoadShape, seed: int) -> None:
    outcome = run_async(measure(load.config(arm.url, seed, arm.name)))
    if outcome.interrupted:
        raise KeyboardInterrupt
    summary = outcome.summary
    arm.failed += summary.failed
    if summary.completed:
        arm.results.setdefault(load.name, []).append(summary)
    ttft, itl = _of("ttft", "mean")(summary), _of("itl", "p99")(summary)
    errors = f", FAILED {summary.errors}" if summary.failed else ""
    figures = f"{summary.output_tok_per_s:.1f} tok/s, TTFT {ttft:.0f}, ITL p99 {itl:.0f}{errors}"
    note(f"  {load.name} seed {seed} {arm.name}: {figures}")


def rounds(arms: Sequence[Arm], loads: Sequence[LoadShape], seeds: Sequence[int]) -> None:
    """All arms in turns, so that a change of the machine's mood meets all of them."""
    for load in loads:
        for number, seed in enumerate(seeds):
            for arm in arms if number % 2 == 0 else list(reversed(arms)):
                turn(arm, load, seed)


def parity(arms: Sequence[Arm]) -> bool:
    """Do all arms say the same words to the same prompt, greedily? A fast wrong answer is worth nothing."""
    job = plan(BenchConfig(requests=1, input_len="200", output_len="1", seed=4242))[0]
    texts = {arm.name: greedy_text(arm.url, job.prompt, 24) for arm in arms}
    if len(set(texts.values())) > 1:
        note(f"  different words: {texts}")
    return len(set(texts.values())) == 1


def table(arms: Sequence[Arm], load: LoadShape) -> Table:
    grid = Table(
        title=f"{load.name} tokens in/out, {load.requests} requests, {load.concurrency} at once; ms",
        title_justify="left",
    )
    grid.add_column("")
    for column in COLUMNS:
        grid.add_column(column.title, justify="right")
    for arm in arms:
        runs = arm.results.get(load.name)
        if runs:
            grid.add_row(arm.name, *(cell([column.value(run) for run in runs], column.digits) for column in COLUMNS))
    return grid


def cell(values: Sequence[float], digits: int) -> str:
    """Mean, and the range over the seeds below it."""
    text = f"{statistics.fmean(values):,.{digits}f}"
    return text if len(values) < 2 else f"{text}\n[{min(values):,.{digits}f}-{max(values):,.{digits}f}]"


def document(arms: Sequence[Arm], conditions: Conditions, extra: dict[str, Any]) -> str:
    result = {
        "bench": "pd_vs_colocated",
        **extra,
        "arms": [
            {
                "name": arm.name,
                "failed": arm.failed,
                "loads": {
                    load: {c.title: statistics.fmean([c.value(run) for run in runs]) for c in COLUMNS}
                    for load, runs in arm.results.items()
                },
                "runs": {load: [dataclasses.asdict(run) for run in runs] for load, runs in arm.results.items()},
            }
            for arm in arms
        ],
        "conditions": dataclasses.asdict(conditions),
    }
    return json.dumps(rounded(result), separators=(",", ":"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="short name, Hub id or directory")
    parser.add_argument("--quick", action="store_true", help="small load, one seed: a check, not a measurement")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions")
    parser.add_argument("--rate", default="inf", help="Poisson arrivals per second instead of a closed loop")
    parser.add_argument("--vllm", type=Path, help="virtual environment of vLLM: measure it too")
    parser.add_argument(
        "--router", type=Path, help="virtual environment of vllm-router (default: ../routers beside --vllm)"
    )
    parser.add_argument(
        "--eager", action="store_true", help="vLLM without torch.compile: starts in 30 s, decodes slower"
    )
    parser.add_argument(
        "--chunk",
        type=int,
        action="append",
        default=[],
        help="one more colocated arm, with prefill chunks of so many tokens (tuned for ITL); may be repeated",
    )
    parser.add_argument("--no-ours", action="store_true", help="measure the peers only")
    parser.add_argument("--logs", type=Path, help="where logs of the servers go")
    parser.add_argument("options", nargs="*", help="after --: more options of baton serve")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    logs = args.logs or Path(tempfile.mkdtemp(prefix="baton-bench-"))
    loads = (
        [LoadShape(64, 8, 6, 3)]
        if args.quick
        else [LoadShape(512, 48, rate=args.rate), LoadShape(128, 96, rate=args.rate)]
    )
    seeds = range(1 if args.quick else args.seeds)
    conditions = Conditions.here()
    note(f"logs: {logs}; cores {two_cores()}")
    arms: list[Arm] = []
    extra: dict[str, Any] = {"model": args.model, "idle_cores": {}, "options": args.options}
    code = 0
    try:
        before, after = (seeds[:-1], seeds[-1:]) if args.vllm and len(seeds) > 1 else (seeds, [])
        if not args.no_ours:
            measure_ours(args, logs, arms, loads, before, extra)
        if args.vllm:
            measure_theirs(args, logs, arms, loads, seeds, extra)
        if after and not args.no_ours:
            measure_ours(args, logs, arms, loads, after, extra)
    except (KeyboardInterrupt, NotReady) as error:
        note(f"stopped early: {error if str(error) else 'interrupted'}")
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    console = Console(width=150)
    for load in loads:
        console.print(table(arms, load))
    if extra.get("parity") is False:
        console.print("[red]The arms gave different answers to the same greedy request.")
        code = code or 1
    sys.stdout.write(document(arms, conditions, extra) + "\n")
    return code or int(any(arm.failed for arm in arms))


ELSEWHERE = ("--worker-port", "33000", "--disaggregation-bootstrap-port", "8950")
"""For a second pair on this machine."""


def measure_ours(
    args: argparse.Namespace,
    logs: Path,
    arms: list[Arm],
    loads: Sequence[LoadShape],
    seeds: Sequence[int],
    extra: dict[str, Any],
) -> None:
    with Fleet(logs) as fleet:
        servers = [
            fleet.baton_serve("Baton 1P+1D", args.model, PD, "--split", "always", *args.options),
            fleet.baton_serve("Baton 1P+1D, split where it pays", args.model, PD, *ELSEWHERE, *args.options),
            fleet.baton_serve("Baton 2 colocated", args.model, COLOCATED, "--worker-port", "31000", *args.options),
        ]
        for number, chunk in enumerate(args.chunk):
            options = ["--chunked-prefill-size", str(chunk), "--worker-port", str(32000 + 100 * number), *args.options]
            servers.append(fleet.baton_serve(f"Baton 2 colocated, chunks of {chunk}", args.model, COLOCATED, *options))
        fleet.wait(servers, 300)
        mine = [at(arms, server.name, server.url) for server in servers]
        extra["idle_cores"] |= idle_cores(servers)
        extra["parity"] = parity(mine) and extra.get("parity", True)
        rounds(mine, loads, seeds)


def measure_theirs(
    args: argparse.Namespace,
    logs: Path,
    arms: list[Arm],
    loads: Sequence[LoadShape],
    seeds: Sequence[int],
    extra: dict[str, Any],
) -> None:
    router = args.router or args.vllm.parent / "routers"
    peers = Peers(args.vllm.resolve(), router.resolve(), model_directory(args.model))
    for name, start in (("vLLM 1P+1D NIXL", peers.pair), ("vLLM 2 colocated", peers.colocated)):
        with Fleet(logs) as fleet:
            workers, door = start(fleet, eager=args.eager)
            extra["idle_cores"] |= idle_cores([*workers, door])
            rounds([at(arms, name, door.url)], loads, seeds)


def at(arms: list[Arm], name: str, url: str) -> Arm:
    """The arm of that name, now at this URL; a new one if there is none."""
    arm = next((arm for arm in arms if arm.name == name), None)
    if arm is None:
        arms.append(arm := Arm(name, url))
    arm.url = url
    return arm


def model_directory(name: str) -> str:
    """The directory of a model, fetched if need be: the peers know no short names."""
    from baton.models import resolve

    return str(resolve(name).resolve())


if __name__ == "__main__":
    sys.exit(main())
