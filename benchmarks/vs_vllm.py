"""One Baton worker against one vLLM instance, two threads each, on the same machine, in turns, in one run.

    python benchmarks/vs_vllm.py --vllm PEERS/vllm            about fifteen minutes
    python benchmarks/vs_vllm.py --vllm PEERS/vllm --quick    a check that it works

Three loads: the prefill of 1,024 tokens; decode alone, one request; 16 requests at once of 256 tokens in and 64 to 128
out. Ours in fp32, and with bfloat16 and int8 weights; vLLM's CPU build in fp32. Every prompt is new to its server.
Prints ratios to vLLM (above 1 is better) and, last, one JSON line.
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

from peers import START_SECONDS, Peers, two_cores
from rich.console import Console
from rich.table import Table
from servers import Fleet, NotReady, Server, idle_cores, note

from baton.lab.bench import measure, run_async
from baton.lab.config import BenchConfig
from baton.lab.metrics import Summary
from baton.lab.report import Conditions, rounded
from baton.models import resolve

VLLM = "vLLM float32"
WEIGHTS = ("auto", "bfloat16", "int8")


@dataclass(frozen=True)
class Load:
    """What is sent, and the one figure that is read from it."""

    name: str
    unit: str
    config: BenchConfig
    figure: Callable[[Summary], float]
    higher_is_better: bool


def prefill_rate(summary: Summary) -> float:
    """Prompt tokens per second until the first token, request by request."""
    assert summary.ttft is not None
    return summary.prompt_tokens / summary.completed / summary.ttft.mean * 1000


def time_per_token(summary: Summary) -> float:
    assert summary.tpot is not None
    return summary.tpot.mean


def loads(quick: bool) -> list[Load]:
    one_by_one = BenchConfig(concurrency=1, warmup=1, timeout=300)
    prefill = dataclasses.replace(one_by_one, requests=1 if quick else 3, input_len="1024", output_len="1")
    alone = dataclasses.replace(one_by_one, requests=1, input_len="32", output_len="16" if quick else "128")
    many = BenchConfig(
        requests=4 if quick else 16,
        concurrency=16,
        input_len="256",
        output_len="8-16" if quick else "64-128",
        timeout=300,
    )
    return [
        Load("prefill of 1,024", "tok/s", prefill, prefill_rate, True),
        Load("decode alone", "ms/token", alone, time_per_token, False),
        Load("16 at once", "out tok/s", many, lambda summary: summary.output_tok_per_s, True),
    ]


@dataclass
class Arm:
    name: str
    server: Server
    figures: dict[str, list[float]] = field(default_factory=dict)
    failed: int = 0

    def turn(self, load: Load, seed: int) -> None:
        config = dataclasses.replace(load.config, url=self.server.url, seed=seed, label=self.name)
        outcome = run_async(measure(config))
        if outcome.interrupted:
            raise KeyboardInterrupt
        self.failed += outcome.summary.failed
        if outcome.exit_code:
            note(f"  {load.name}, seed {seed}, {self.name}: FAILED {outcome.summary.errors}")
            return
        figure = load.figure(outcome.summary)
        self.figures.setdefault(load.name, []).append(figure)
        note(f"  {load.name}, seed {seed}, {self.name}: {figure:.1f} {load.unit}")


def ratios(arm: Arm, peer: Arm | None, load: Load) -> list[float]:
    """One for each round, of neighbours in time; above 1: better than the peer."""
    if peer is None or arm is peer:
        return []
    pairs = zip(arm.figures.get(load.name, []), peer.figures.get(load.name, []), strict=False)
    return [mine / other if load.higher_is_better else other / mine for mine, other in pairs]


def table(arms: Sequence[Arm], all_loads: Sequence[Load]) -> Table:
    peer = next((arm for arm in arms if arm.name == VLLM), None)
    grid = Table(
        title="One instance, two threads: median of the rounds (and their range), ratio to vLLM", title_justify="left"
    )
    grid.add_column("")
    for load in all_loads:
        grid.add_column(f"{load.name}, {load.unit}", justify="right")
        grid.add_column("ratio", justify="right")
    for arm in arms:
        cells: list[str] = []
        for load in all_loads:
            figures, better = arm.figures.get(load.name, []), ratios(arm, peer, load)
            cells.append(
                f"{statistics.median(figures):.1f} [{min(figures):.1f}-{max(figures):.1f}]" if figures else "-"
            )
            cells.append(f"{statistics.median(better):.2f}" if better else "")
        grid.add_row(arm.name, *cells)
    return grid


def document(arms: Sequence[Arm], all_loads: Sequence[Load], conditions: Conditions, extra: dict[str, Any]) -> str:
    peer = next((arm for arm in arms if arm.name == VLLM), None)
    rows = [
        {
            "name": arm.name,
            "failed": arm.failed,
            "median": {name: statistics.median(figures) for name, figures in arm.figures.items()},
            "runs": arm.figures,
            "ratio_to_vllm": {
                load.name: statistics.median(better) for load in all_loads if (better := ratios(arm, peer, load))
            },
        }
        for arm in arms
    ]
    result = {"bench": "vs_vllm", **extra, "arms": rows, "conditions": dataclasses.asdict(conditions)}
    return json.dumps(rounded(result), separators=(",", ":"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="short name, Hub id or directory")
    parser.add_argument("--vllm", type=Path, help="virtual environment of vLLM; without it only ours are measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", default=",".join(WEIGHTS), help="of these, with commas; empty: only vLLM")
    parser.add_argument("--quick", action="store_true", help="one small round: a check, not a measurement")
    parser.add_argument(
        "--eager", action="store_true", help="vLLM without torch.compile: starts sooner, decodes slower"
    )
    parser.add_argument("--no-openmp", action="store_true", help="vLLM without Intel's OpenMP")
    parser.add_argument("--logs", type=Path, help="where logs of the servers go")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    logs = args.logs or Path(tempfile.mkdtemp(prefix="baton-bench-"))
    all_loads, conditions = loads(args.quick), Conditions.here()
    model = str(resolve(args.model).resolve())
    arms: list[Arm] = []
    extra: dict[str, Any] = {"model": args.model, "threads": len(set(two_cores()))}
    note(f"logs: {logs}")
    code = 0
    try:
        with Fleet(logs) as fleet:
            arms += start(fleet, args, model)
            extra["idle_cores"] = idle_cores([arm.server for arm in arms])
            for load in all_loads:
                for number in range(1 if args.quick else args.rounds):
                    for arm in arms if number % 2 == 0 else list(reversed(arms)):
                        arm.turn(load, seed=number)
    except (KeyboardInterrupt, NotReady) as error:
        note(f"stopped early: {error if str(error) else 'interrupted'}")
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    Console(width=150).print(table(arms, all_loads))
    sys.stdout.write(document(arms, all_loads, conditions, extra) + "\n")
    return code or int(any(arm.failed for arm in arms))


def start(fleet: Fleet, args: argparse.Namespace, model: str) -> list[Arm]:
    """Ours one after the other (a start uses both cores), then the peer."""
    cores = sorted(set(two_cores()))
    arms = []
    for weights in filter(None, args.weights.split(",")):
        name = f"Baton {'float32' if weights == 'auto' else weights + ' weights'}"
        options = ["--weight-dtype", weights, "--dtype", "float32", "--max-model-len", "4096"]
        server = fleet.baton_worker(name, model, *options, cores=cores)
        fleet.wait([server], 180)
        arms.append(Arm(name, server))
    if args.vllm:
        peers = Peers(args.vllm.resolve(), args.vllm, model, openmp=not args.no_openmp)
        server = peers.instance(fleet, VLLM, cores, eager=args.eager)
        fleet.wait([server], START_SECONDS)
        arms.append(Arm(VLLM, server))
    return arms


if __name__ == "__main__":
    sys.exit(main())
