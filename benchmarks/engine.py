"""Speed of one engine, without HTTP: prefill, decode alone, and a batch of concurrent requests.

    python benchmarks/engine.py [MODEL] [--threads 2] [--weight-dtype auto bfloat16 int8] [--vllm VENV] [--rounds 3]

Every figure is the median of `--rounds`; with `--vllm` (a virtual environment that has vLLM for CPU) the same load runs
there in turns, float32, and the ratios ours / theirs follow. Contenders live in processes of their own; one measures at
a time, the others are stopped meanwhile (an idle engine may spin). The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PREFILL = 1024
ALONE_PROMPT, ALONE_TOKENS = 16, 64
BATCH, BATCH_PROMPT, BATCH_TOKENS = 16, 256, (64, 128)
CASES = ("prefill", "alone", "batch")
UNITS = {"prefill": "prompt tok/s", "alone": "ms/token", "batch": "output tok/s"}

Run = Callable[[list[list[int]], list[int]], None]
"""Prompts and output lengths; returns when all are answered."""


# --- the load ----------------------------------------------------------------------------------------------------


def measure(case: str, seed: int, run: Run) -> float:
    """One figure of `case` in its unit. Prompts are new every time, so no prefix is ever hit."""
    draw = random.Random(f"{case} {seed}")

    def prompt(length: int) -> list[int]:
        return [draw.randrange(3, 30000) for _ in range(length)]

    def timed(prompts: list[list[int]], counts: list[int]) -> float:
        started = time.perf_counter()
        run(prompts, counts)
        return time.perf_counter() - started

    if case == "prefill":
        return PREFILL / timed([prompt(PREFILL)], [1])
    if case == "alone":
        first = timed([prompt(ALONE_PROMPT)], [1])
        return (timed([prompt(ALONE_PROMPT)], [1 + ALONE_TOKENS]) - first) / ALONE_TOKENS * 1e3
    counts = [draw.randint(*BATCH_TOKENS) for _ in range(BATCH)]
    return sum(counts) / timed([prompt(BATCH_PROMPT) for _ in counts], counts)


def serve(run: Run) -> None:
    """A contender's process: measures what it is told on stdin, answers on stdout."""
    for case in CASES:
        measure(case, -1, run)
    print("ready", flush=True)
    for line in sys.stdin:
        case, seed = line.split()
        print(measure(case, int(seed), run), flush=True)


def serve_baton(model: str, weight_dtype: str, threads: int, chunk: int, load_format: str) -> None:
    from baton.base.clock import MonotonicClock
    from baton.base.config import EngineConfig
    from baton.base.messages import Generate, Sampling
    from baton.engine.blocks import PagePool
    from baton.engine.engine import Engine
    from baton.engine.load import build_runner
    from baton.engine.roles import Committer, Unified
    from baton.engine.scheduler import Scheduler

    config = EngineConfig(
        model=model, weight_dtype=weight_dtype, threads=threads, chunked_prefill_size=chunk, load_format=load_format
    )
    built = build_runner(config)
    clock = MonotonicClock()
    scheduler = Scheduler(
        PagePool(built.num_pages),
        page_size=config.page_size,
        max_running=config.max_running_requests,
        max_waiting=config.max_queued_requests,
        chunk=config.chunked_prefill_size,
        max_model_len=built.max_model_len,
        prefix_caching=False,
    )
    committer = Committer(scheduler, built.runner, built.eos_token_ids, clock)
    engine = Engine(scheduler, built.runner, Unified(scheduler, committer), clock)

    def run(prompts: list[list[int]], counts: list[int]) -> None:
        for index, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
            sampling = Sampling(max_tokens=count, temperature=0.0, ignore_eos=True)
            engine.handle(Generate(str(index), tuple(prompt), sampling))
        while engine.busy:
            engine.step()

    serve(run)


def serve_vllm(model: str, load_format: str) -> None:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    llm = LLM(
        model=model,
        load_format=load_format,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=4096,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def run(prompts: list[list[int]], counts: list[int]) -> None:
        settings = [SamplingParams(max_tokens=n, ignore_eos=True, temperature=0, detokenize=False) for n in counts]
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)

    serve(run)


# --- the contest -------------------------------------------------------------------------------------------------


@dataclass
class Contender:
    name: str
    process: subprocess.Popen[str]
    figures: dict[str, list[float]]

    @classmethod
    def start(cls, name: str, python: Path, arguments: list[str], environment: dict[str, str]) -> Contender:
        process = subprocess.Popen(
            [str(python), __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        contender = cls(name, process, {case: [] for case in CASES})
        while contender._line() != "ready":
            pass
        contender._signal(signal.SIGSTOP)
        return contender

    def ask(self, case: str, seed: int) -> None:
        stdin: IO[str] | None = self.process.stdin
        assert stdin is not None
        self._signal(signal.SIGCONT)
        stdin.write(f"{case} {seed}\n")
        stdin.flush()
        self.figures[case].append(float(self._line()))
        self._signal(signal.SIGSTOP)

    def median(self, case: str) -> float:
        return statistics.median(self.figures[case])

    def close(self) -> None:
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        self.process.stdin.close()
        self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} died; run it alone to see why: {self.process.args}")
        return line.strip()


def start_all(arguments: argparse.Namespace) -> list[Contender]:
    from baton.controller.heavy import ENGINE_ENVIRONMENT

    model, threads = arguments.model, str(arguments.threads)
    contenders = []
    for weight_dtype in arguments.weight_dtype:
        ours = ["--serve", model, weight_dtype, threads, str(arguments.chunk), arguments.load_format]
        contenders.append(Contender.start(f"baton {weight_dtype}", Path(sys.executable), ours, ENGINE_ENVIRONMENT))
    if arguments.vllm:
        environment = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_OMP_THREADS_BIND": arguments.vllm_bind,
        }
        theirs = ["--serve-vllm", model, arguments.load_format]
        contenders.append(Contender.start("vllm", Path(arguments.vllm) / "bin" / "python", theirs, environment))
    return contenders


def report(contenders: list[Contender], arguments: argparse.Namespace) -> None:
    names = [contender.name for contender in contenders]
    peer = contenders[-1] if names[-1] == "vllm" else None
    print(f"{'':24}" + "".join(f"{case + ', ' + UNITS[case]:>24}" for case in CASES))
    result: dict[str, object] = {
        "model": arguments.model,
        "threads": arguments.threads,
        "vllm_bind": arguments.vllm_bind,
        "rounds": arguments.rounds,
    }
    for contender in contenders:
        figures = {case: round(contender.median(case), 2) for case in CASES}
        print(f"{contender.name:24}" + "".join(f"{figures[case]:24.1f}" for case in CASES))
        result[contender.name] = figures
        if peer is not None and contender is not peer:
            ratios = {case: round(contender.median(case) / peer.median(case), 3) for case in CASES}
            print(f"{'  / vllm':24}" + "".join(f"{ratios[case]:24.2f}" for case in CASES))
            result[f"{contender.name} / vllm"] = ratios
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="directory or short name")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--weight-dtype", nargs="+", default=["auto", "bfloat16", "int8"])
    parser.add_argument("--load-format", default="auto", choices=("auto", "dummy"))
    parser.add_argument("--chunk", type=int, default=512, help="prompt tokens computed per step at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm", default="", help="virtual environment with vLLM")
    parser.add_argument(
        "--vllm-bind",
        default="auto",
        help="cores of vLLM's compute threads, as 0-1; auto, its default, leaves one core to its scheduler",
    )
    arguments = parser.parse_args()
    from baton.models.resolve import resolve

    arguments.model = str(resolve(arguments.model, load_format=arguments.load_format))
    contenders = start_all(arguments)
    try:
        for round_number in range(arguments.rounds):
            for case in CASES:
                for contender in contenders:
                    contender.ask(case, round_number)
        report(contenders, arguments)
    finally:
        for contender in contenders:
            contender.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve_baton(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
    elif sys.argv[1:2] == ["--serve-vllm"]:
        serve_vllm(sys.argv[2], sys.argv[3])
    else:
        main()
