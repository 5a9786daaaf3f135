"""Speed of the transports and of the hand-off, against the machine's memcpy and against NIXL and Mooncake over TCP.

    python benchmarks/transports.py [--pages 7680] [--page-bytes 16384] [--rounds 9] [--peers VENV]

Scattered pages go from one process to another. Contenders are processes of their own, one works at a time, in turns,
the others sleep; every target compares the bytes of the first round with what was to be sent. `--peers` is a virtual
environment with `nixl-cu12 nixl` and/or `mooncake-transfer-engine-non-cuda` (and NumPy); what is missing is skipped,
and said. `handoff-*` is the time from the end of prefill (2,048 tokens, SmolLM2's layout in float32, chunks of 512)
to the start of D's first decode step, through both roles. The last line is one JSON document: milliseconds.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

OURS = ("memcpy", "memcpy-pages", "shm", "tcp", "handoff-shm", "handoff-tcp")
PEERS = ("nixl", "mooncake")
PROMPT, CHUNK = 2048, 512
Measure = Callable[[], float]
"""One round; seconds. Keeps what it moves alive: a library knows addresses only."""


@dataclass(frozen=True)
class Job:
    """The same for all contenders: which pages go where. Pools are twice as large as what is moved."""

    pages: int
    page_bytes: int

    @property
    def size(self) -> int:
        return 2 * self.pages * self.page_bytes

    def pieces(self) -> np.ndarray:
        """[pages, 3]: offset here, offset there, bytes."""
        draw = np.random.default_rng(1)
        places = [draw.permutation(2 * self.pages)[: self.pages] for _ in range(2)]
        return np.stack([*(p * self.page_bytes for p in places), np.full(self.pages, self.page_bytes)], 1).astype(
            np.int64
        )

    def content(self) -> np.ndarray:
        return np.random.default_rng(2).integers(0, 256, self.size, dtype=np.uint8)

    def arrived(self, target: np.ndarray) -> bool:
        source = self.content().reshape(-1, self.page_bytes)
        here, there = (self.pieces()[:, side] // self.page_bytes for side in (0, 1))
        return bool((target.reshape(-1, self.page_bytes)[there] == source[here]).all())


class Line:
    """Lines of JSON to and from another process."""

    def __init__(self, reads: IO[str], writes: IO[str]) -> None:
        self._reads, self._writes = reads, writes

    def say(self, what: Any) -> None:
        print(json.dumps(what), file=self._writes, flush=True)

    def hear(self) -> Any:
        line = self._reads.readline()
        if not line:
            raise EOFError("the other process is gone")
        return json.loads(line)


def start(python: str, part: str, job: Job, **environment: str) -> tuple[subprocess.Popen[str], Line]:
    command = [python, __file__, "--part", part, "--pages", str(job.pages), "--page-bytes", str(job.page_bytes)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if "BENCH_DEBUG" not in os.environ else None,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    return process, Line(process.stdout, process.stdin)


# --- memcpy ------------------------------------------------------------------------------------------------------


def memcpy(job: Job, pagewise: bool) -> Measure:
    import ctypes

    from baton.transports import kernels
    from baton.transports.region import Region

    source, target = Region.create(job.size), Region.create(job.size)
    np.frombuffer(source.memory, np.uint8)[:] = job.content()
    pieces, count = job.pieces(), job.pages * job.page_bytes

    def run() -> float:
        begun = time.perf_counter()
        if pagewise:
            kernels._copy(target.address, source.address, pieces)
        else:
            ctypes.memmove(target.address, source.address, count)
        return time.perf_counter() - begun

    return run


# --- our transports ----------------------------------------------------------------------------------------------


def ours_target(name: str, job: Job, line: Line) -> None:
    from baton.transports.base import create
    from baton.transports.region import Region

    region = Region.create(job.size)
    transport = create(name, region, lambda: None)
    grant = transport.grant("127.0.0.1")
    grant.admit(7, [(int(there), int(size)) for _, there, size in job.pieces()])
    line.say(base64.b64encode(grant.description).decode())
    line.hear()
    line.say(job.arrived(np.frombuffer(region.memory, np.uint8)))
    line.hear()


def ours(name: str, job: Job) -> Measure:
    from baton.transports.base import WriteState, create
    from baton.transports.region import Region

    _, target = start(sys.executable, f"{name}-target", job)
    region = Region.create(job.size)
    np.frombuffer(region.memory, np.uint8)[:] = job.content()
    peer = create(name, region, lambda: None).connect(base64.b64decode(target.hear()))
    pieces = job.pieces()

    def run() -> float:
        begun = time.perf_counter()
        write = peer.write(pieces, 7)
        while write.state is WriteState.RUNNING:
            peer.poll(1.0)
        spent = time.perf_counter() - begun
        assert write.state is WriteState.DONE, write.error
        return spent

    run()
    target.say("look")
    assert target.hear(), f"{name}: wrong bytes arrived"
    return run


# --- NIXL --------------------------------------------------------------------------------------------------------


def nixl_agent(name: str) -> Any:
    from nixl._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))


def nixl_target(job: Job, line: Line) -> None:
    agent, memory = nixl_agent(f"target-{os.getpid()}"), np.zeros(job.size, np.uint8)
    registered = agent.register_memory([(memory.ctypes.data, job.size, 0, "")], "DRAM")
    line.say([base64.b64encode(agent.get_agent_metadata()).decode(), memory.ctypes.data])
    try:
        while True:
            if line.hear() == "look":
                line.say(job.arrived(memory))
                continue
            while not any(agent.get_new_notifs().values()):
                pass
            line.say(True)
    except EOFError:
        agent.deregister_memory(registered)


def nixl(job: Job) -> Measure:
    _, target = start(sys.executable, "nixl-target", job)
    agent, memory = nixl_agent(f"source-{os.getpid()}"), job.content()
    kept = agent.register_memory([(memory.ctypes.data, job.size, 0, "")], "DRAM")
    metadata, there = target.hear()
    name = agent.add_remote_agent(base64.b64decode(metadata))
    pieces, device = job.pieces(), np.zeros(job.pages, np.int64)
    here_list = np.stack([pieces[:, 0] + memory.ctypes.data, pieces[:, 2], device], 1)
    there_list = np.stack([pieces[:, 1] + there, pieces[:, 2], device], 1)
    local = agent.prep_xfer_dlist("NIXL_INIT_AGENT", here_list, "DRAM")
    remote = agent.prep_xfer_dlist(name, there_list, "DRAM")
    order = np.arange(job.pages, dtype=np.int32)

    def run() -> float:
        target.say("go")
        begun = time.perf_counter()
        handle = agent.make_prepped_xfer("WRITE", local, order, remote, order, b"done")
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        spent = time.perf_counter() - begun
        assert state == "DONE", (state, kept, memory.size)
        target.hear()
        agent.release_xfer_handle(handle)
        return spent

    run()
    target.say("look")
    assert target.hear(), "nixl: wrong bytes arrived"
    return run


# --- Mooncake ----------------------------------------------------------------------------------------------------


def mooncake_engine() -> Any:
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    return engine


def mooncake_target(job: Job, line: Line) -> None:
    engine, memory = mooncake_engine(), np.zeros(job.size, np.uint8)
    assert engine.register_memory(memory.ctypes.data, job.size) == 0
    line.say([engine.get_rpc_port(), memory.ctypes.data])
    line.hear()
    line.say(job.arrived(memory))
    line.hear()


def mooncake(job: Job) -> Measure:
    _, target = start(sys.executable, "mooncake-target", job)
    engine, memory = mooncake_engine(), job.content()
    assert engine.register_memory(memory.ctypes.data, job.size) == 0
    port, there = target.hear()
    pieces, group = job.pieces(), 960  # one call with thousands of pieces wedges its peer
    calls = [
        (
            (part[:, 0] + memory.ctypes.data).tolist(),
            (part[:, 1] + there).tolist(),
            part[:, 2].tolist(),
        )
        for part in (pieces[start : start + group] for start in range(0, job.pages, group))
    ]

    def run() -> float:
        begun = time.perf_counter()
        for local, remote, sizes in calls:
            assert engine.batch_transfer_sync_write(f"127.0.0.1:{port}", local, remote, sizes) == 0, memory.size
        return time.perf_counter() - begun

    run()
    target.say("look")
    assert target.hear(), "mooncake: wrong bytes arrived"
    return run


# --- the hand-off ------------------------------------------------------------------------------------------------


class FakeModel:
    """Fills the pages of what it computes, takes a while, draws token 5; stamps when decoding begins."""

    def __init__(self, region: Any, layout: Any, chunk_seconds: float) -> None:
        self._pages = np.frombuffer(region.memory, np.uint8).reshape(-1, layout.page_bytes)
        self._size = layout.page_size
        self._seconds = chunk_seconds
        self.decoded: dict[str, float] = {}

    def run(self, batch: Any) -> list[Any]:
        from baton.engine.sockets import Sampled

        begun = time.monotonic()
        for piece in batch:
            if piece.count == 1:
                self.decoded.setdefault(piece.sequence.id, begun)
            else:
                for page in piece.sequence.pages[
                    piece.start // self._size : -(-(piece.start + piece.count) // self._size)
                ]:
                    self._pages[page] = page % 251
                time.sleep(self._seconds)
        return [Sampled(5 if piece.sample else None) for piece in batch]

    def forget(self, sequence: Any) -> None:
        pass


class Half:
    """One engine with its role, in the thread that calls `turn`."""

    def __init__(self, mode: str, transport: str) -> None:
        from baton.base.clock import MonotonicClock
        from baton.base.config import DisaggConfig
        from baton.base.layout import KVLayout
        from baton.disagg.build import build_role
        from baton.engine.blocks import PagePool
        from baton.engine.engine import Engine
        from baton.engine.roles import Committer
        from baton.engine.scheduler import Scheduler
        from baton.transports.region import Region
        from baton.worker.channel import Waker

        layout, pages, clock = KVLayout("smollm2", 30, 3, 64, 16, "float32"), 320, MonotonicClock()
        region = Region.create(pages * layout.page_bytes)
        self.model = FakeModel(region, layout, 0.05)
        scheduler = Scheduler(
            PagePool(pages), page_size=16, max_running=8, max_waiting=8, chunk=CHUNK, max_model_len=4096
        )
        self.waker = Waker()
        config = DisaggConfig(mode=mode, transport=transport, bootstrap_port=0)
        committer = Committer(scheduler, self.model, (0,), clock)
        self.role = build_role(config, scheduler, committer, region, layout, mode, clock, self.waker.wake)
        self.engine = Engine(scheduler, self.model, self.role, clock)

    def answer(self, request: Any) -> list[Any]:
        """Submit, and run the loop until the last message of the request."""
        import select

        heard = self.engine.handle(request)
        while True:
            heard += self.engine.step()
            if heard and getattr(heard[-1], "finish", True) is not None:
                return heard
            if not self.engine.busy:
                select.select([self.waker], [], [], 1.0)
                self.waker.clear()


def handoff_request(number: int, port: int) -> Any:
    from baton.base.messages import Generate, Sampling, Ticket

    tokens = tuple(np.random.default_rng(number).integers(1, 40000, PROMPT).tolist())
    return Generate(f"r{number}", tokens, Sampling(max_tokens=3), Ticket(number, "127.0.0.1", port))


def handoff_target(transport: str, line: Line) -> None:
    half = Half("decode", transport)
    line.say("ready")
    while True:
        request = handoff_request(*line.hear())
        heard = half.answer(request)
        assert [type(message).__name__ for message in heard] == ["Tokens"] * 3, heard
        line.say(half.model.decoded[request.id])


def handoff(transport: str, job: Job) -> Measure:
    _, target = start(sys.executable, f"handoff-{transport}-target", job)
    target.hear()
    half, number = Half("prefill", transport), iter(range(1, 1 << 30))

    def run() -> float:
        asked = [next(number), half.role.bootstrap_port]
        target.say(asked)
        receipt = half.answer(handoff_request(*asked))[-1]
        began: float = target.hear()
        return began - receipt.timeline.prefilled

    run()
    return run


# --- in turns ----------------------------------------------------------------------------------------------------


def contender(part: str, job: Job) -> Measure:
    match part:
        case "memcpy" | "memcpy-pages":
            return memcpy(job, part == "memcpy-pages")
        case "shm" | "tcp":
            return ours(part, job)
        case "nixl":
            return nixl(job)
        case "mooncake":
            return mooncake(job)
    return handoff(part.removeprefix("handoff-"), job)


def play(part: str, job: Job) -> None:
    """A contender's process, or that of its target."""
    line = Line(sys.stdin, os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)  # libraries that print do not disturb
    if part == "nixl-target":
        nixl_target(job, line)
    elif part == "mooncake-target":
        mooncake_target(job, line)
    elif part.startswith("handoff-") and part.endswith("-target"):
        handoff_target(part.split("-")[1], line)
    elif part.endswith("-target"):
        ours_target(part.removesuffix("-target"), job, line)
    else:
        run = contender(part, job)
        line.say("ready")
        while line.hear() == "go":
            line.say(run())


def compare(job: Job, rounds: int, peers: str | None, only: list[str] | None) -> dict[str, Any]:
    pythons = dict.fromkeys(OURS, sys.executable)
    if peers:
        pythons |= dict.fromkeys(PEERS, str(Path(peers) / "bin" / "python"))
    pythons = {name: python for name, python in pythons.items() if not only or name in only}
    players, skipped = {}, {} if peers else dict.fromkeys(PEERS, "no --peers given")
    for name, python in pythons.items():
        environment = {"UCX_TLS": "tcp"} if name == "nixl" else {}
        process, line = start(python, name, job, **environment)
        try:
            line.hear()
            players[name] = (process, line)
        except EOFError:
            skipped[name] = "did not start (BENCH_DEBUG=1 shows why)"
    spent: dict[str, list[float]] = {name: [] for name in players}
    for _ in range(rounds):
        for name, (_, line) in players.items():
            line.say("go")
            spent[name].append(line.hear() * 1000)
    for process, line in players.values():
        line.say("stop")
        process.wait(10)
    return {"ms": spent, "skipped": skipped}


def report(job: Job, rounds: int, result: dict[str, Any]) -> None:
    spent, moved = result["ms"], job.pages * job.page_bytes
    middle = {name: statistics.median(times) for name, times in spent.items()}
    load = os.getloadavg()[0]
    print(f"{job.pages} scattered pages of {job.page_bytes} bytes, {rounds} rounds in turns, load {load:.1f}")
    for name, times in spent.items():
        rate = "" if name.startswith("handoff") else f"{moved / middle[name] / 1e6:8.2f} GB/s"
        print(f"  {name:14} median {middle[name]:8.2f} ms  best {min(times):8.2f} ms {rate}")
    for name, why in result["skipped"].items():
        print(f"  {name:14} skipped: {why}")
    ratios = {
        f"{ours_}/{other}": round(statistics.median(a / b for a, b in zip(spent[other], spent[ours_])), 3)
        for ours_, other in (("shm", "memcpy"), ("shm", "memcpy-pages"), ("tcp", "nixl"), ("tcp", "mooncake"))
        if ours_ in spent and other in spent
    }
    print("  speed ratios (median of rounds):", ratios)
    print(
        json.dumps(
            {
                "benchmark": "transports",
                "pages": job.pages,
                "page_bytes": job.page_bytes,
                "rounds": rounds,
                "median_ms": {name: round(value, 3) for name, value in middle.items()},
                "best_ms": {name: round(min(times), 3) for name, times in spent.items()},
                "speed_ratios": ratios,
                "skipped": result["skipped"],
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=7680)
    parser.add_argument("--page-bytes", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peers", help="virtual environment with NIXL and Mooncake")
    parser.add_argument("--only", nargs="+", choices=OURS + PEERS, help="these contenders alone")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    job = Job(options.pages, options.page_bytes)
    if options.part:
        with contextlib.suppress(EOFError):  # the other side has ended
            play(options.part, job)
    else:
        report(job, options.rounds, compare(job, options.rounds, options.peers, options.only))


if __name__ == "__main__":
    main()
