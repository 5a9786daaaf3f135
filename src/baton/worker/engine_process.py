"""The engine's process: builds one engine, joins it to its front, runs the loop until the front is gone.

Importing this module imports torch and Transformers: a fork server preloads it once, and every engine is forked from
there in no time.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
from dataclasses import dataclass

from baton.base.clock import Clock, MonotonicClock
from baton.base.config import DisaggConfig, EngineConfig
from baton.base.errors import ConfigError
from baton.base.messages import Ready
from baton.disagg.build import Station, build_role
from baton.engine.blocks import PagePool
from baton.engine.engine import Engine
from baton.engine.load import Built, build_runner
from baton.engine.roles import Committer
from baton.engine.scheduler import Scheduler
from baton.engine.smith import Smith
from baton.transports.region import Region
from baton.worker.channel import ChannelClosed, EngineEnd, Waker

log = logging.getLogger("baton.engine")

LOAD_INTERVAL = 1.0
"""Seconds between two unasked `Load` messages while the engine works."""
IDLE_WAIT = 5.0
"""Longest sleep of an idle engine; it wakes to audit its pages and to look at deadlines."""


@dataclass(slots=True)
class Assembly:
    """An engine with what it stands on, in the order of its making; `close` goes the other way."""

    engine: Engine
    region: Region | None
    ready: Ready

    def close(self) -> None:
        self.engine.close()
        if self.region is not None:
            self.region.close()


def assemble(engine: EngineConfig, disagg: DisaggConfig, waker: Waker, clock: Clock) -> Assembly:
    """Load the model, make the pool, choose the role. Raises `ConfigError` for what the operator can mend."""
    engine = placed(engine, disagg)
    regions: list[Region] = []

    def memory(size: int) -> memoryview:
        regions.append(Region.create(size))
        return regions[-1].memory

    built = build_runner(engine, memory)
    region = regions[0] if regions else None
    scheduler = Scheduler(
        PagePool(built.num_pages),
        page_size=engine.page_size,
        max_running=engine.max_running_requests,
        max_waiting=engine.max_queued_requests,
        chunk=engine.chunked_prefill_size,
        max_model_len=built.max_model_len,
        prefix_caching=engine.prefix_caching,
        namespace=built.layout.fingerprint,
    )
    committer = Committer(scheduler, built.runner, built.eos_token_ids, clock)
    instance = secrets.token_hex(8)
    role = build_role(disagg, scheduler, committer, region, built.layout, instance, clock, waker.wake)
    ready = _ready(engine, disagg, built, instance, role)
    smith = Smith(built.grammars, waker.wake)
    return Assembly(Engine(scheduler, built.runner, role, clock, smith), region, ready)


def placed(engine: EngineConfig, disagg: DisaggConfig) -> EngineConfig:
    """Where an engine that hands over must be: pages travel from and to host memory only, so far.

    Raises `ConfigError` if a GPU was asked for by name.
    """
    if disagg.mode == "null" or engine.device == "cpu":
        return engine
    if engine.device == "auto":
        return dataclasses.replace(engine, device="cpu")
    raise ConfigError(
        f"device is {engine.device!r}, but prefill and decode apart works in host memory only so far; "
        'choose --device cpu, or undivided engines on GPUs: --backend "native:d1t1p1"'
    )


def _ready(engine: EngineConfig, disagg: DisaggConfig, built: Built, instance: str, role: Station) -> Ready:
    return Ready(
        model_path=engine.model,
        architectures=built.architectures,
        vocab_size=built.vocab_size,
        max_model_len=built.max_model_len,
        eos_token_ids=tuple(built.eos_token_ids),
        page_size=engine.page_size,
        num_pages=built.num_pages,
        dtype=built.layout.dtype,
        weight_dtype=built.weight_dtype,
        device=built.device,
        mode=disagg.mode,
        instance=instance,
        pid=os.getpid(),
        bootstrap_port=role.bootstrap_port,
        transports=role.transports,
    )


def serve(engine: Engine, end: EngineEnd, clock: Clock) -> None:
    """The loop: hear, decide, compute, tell. Returns when the front is gone."""
    reported = 0.0
    try:
        while True:
            for message in end.receive(_patience(engine, clock)):
                end.send(engine.handle(message))
            end.send(engine.expire())
            end.send(engine.poll())
            end.send(engine.compute())
            now = clock.now()
            if now - reported >= LOAD_INTERVAL:
                reported = now
                end.send([engine.load()])
            if not engine.busy:
                engine.audit()
    except ChannelClosed:
        log.info("the front is gone; the engine ends")


def _patience(engine: Engine, clock: Clock) -> float:
    if engine.busy:
        return 0.0
    deadline = engine.next_deadline()
    return IDLE_WAIT if deadline is None else min(IDLE_WAIT, max(0.0, deadline - clock.now()))


def run(engine: EngineConfig, disagg: DisaggConfig, channel: str, cores: tuple[int, ...] = ()) -> None:
    """Entry point of the process. Returns when the front closes the channel or dies."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    clock, waker = MonotonicClock(), Waker()
    end = EngineEnd.connect(channel, waker)
    assembly = assemble(engine, disagg, waker, clock)
    try:
        end.send([assembly.ready])
        serve(assembly.engine, end, clock)
    finally:
        assembly.close()
        end.close()
        waker.close()
