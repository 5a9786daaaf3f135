"""From an allocation and configurations to the processes of a stack. Entry points are named, never imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.base.alloc import Allocation, Dims, Pair
from baton.base.config import DisaggConfig, EngineConfig, GatewayConfig, WorkerConfig
from baton.base.errors import ConfigError
from baton.controller.resources import assign_cores, available_cores, free_ports, require_free, visible_gpus
from baton.controller.rundir import RunDirectory
from baton.controller.spec import HttpCheck, PathCheck, ProcessSpec

FRONT = "baton.worker.front:run"
ENGINE = "baton.worker.engine_process:run"
GATEWAY = "baton.gateway.process:run"
PRELOAD = ("baton.worker.engine_process",)
"""What engines are forked from."""

FIRST_WORKER_PORT = 30000
FIRST_BOOTSTRAP_PORT = 8998
DRAIN = 10.0
"""Seconds a front has to finish its requests."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker of a stack: a front and its engine."""

    name: str
    front: WorkerConfig
    engine: EngineConfig
    disagg: DisaggConfig
    cores: tuple[int, ...] = ()

    @property
    def url(self) -> str:
        return url_of(self.front.host, self.front.port)


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to share out."""

    cores: tuple[int, ...]
    gpus: int = 0

    @classmethod
    def here(cls) -> Machine:
        return cls(tuple(available_cores()), visible_gpus())


def plan_workers(
    allocation: Allocation, front: WorkerConfig, engine: EngineConfig, disagg: DisaggConfig, machine: Machine
) -> list[Worker]:
    """The workers an allocation asks for, with their shares of cores and GPUs and ports that are free now.

    `front.port` and `disagg.bootstrap_port` are where the search for ports begins (0: the usual place). Raises
    `ConfigError` for what this version cannot launch.
    """
    roles = _roles(allocation)
    cores = assign_cores(len(roles), machine.cores)
    engines = _on_gpus(engine, len(roles), machine.gpus) if engine.device != "cpu" else [engine] * len(roles)
    ports = free_ports(front.host, front.port or FIRST_WORKER_PORT)
    rooms = free_ports(disagg.bootstrap_host, disagg.bootstrap_port or FIRST_BOOTSTRAP_PORT)
    workers = []
    for index, (name, mode) in enumerate(roles):
        own = dataclasses.replace(
            disagg, mode=mode, bootstrap_port=next(rooms) if mode == "prefill" else disagg.bootstrap_port
        )
        port = dataclasses.replace(front, port=next(ports))
        workers.append(Worker(name, port, engines[index], own, cores[index]))
    return workers


def worker_specs(worker: Worker, model_dir: Path, rundir: RunDirectory, *, rank: int = 0) -> list[ProcessSpec]:
    """The two processes of a worker: the front listens, then the engine connects to it. A front that dies takes its
    engine along; an engine that dies comes back to the same front."""
    front, engine = f"{worker.name}.front", f"{worker.name}.engine"
    channel = rundir.socket(worker.name)
    common = {"disagg": worker.disagg, "engine": worker.engine, "channel": str(channel)}
    return [
        ProcessSpec(
            front,
            FRONT,
            rundir.log(front),
            PathCheck(channel),
            {"worker": worker.front, "model_dir": str(model_dir), **common},
            stop_rank=rank,
            stop_timeout=DRAIN,
        ),
        ProcessSpec(
            engine,
            ENGINE,
            rundir.log(engine),
            HttpCheck(f"{worker.url}/ready", worker.front.api_key),
            {"cores": worker.cores, **common},
            heavy=True,
            after=(front,),
            cores=worker.cores,
            stop_rank=rank + 1,
            stop_timeout=5.0,
        ),
    ]


def stack_specs(
    workers: Sequence[Worker], gateway: GatewayConfig, model_dir: Path, rundir: RunDirectory
) -> list[ProcessSpec]:
    """Workers and the gateway before them. It stops first, so that nobody talks to workers that drain."""
    require_free(gateway.host, gateway.port)
    specs = [spec for worker in workers for spec in worker_specs(worker, model_dir, rundir, rank=1)]
    prefill = [(w.url, w.disagg.bootstrap_port) for w in workers if w.disagg.mode == "prefill"]
    door = ProcessSpec(
        "gateway",
        GATEWAY,
        rundir.log("gateway"),
        HttpCheck(f"{url_of(gateway.host, gateway.port, tls=bool(gateway.tls_cert))}/readiness", gateway.api_key),
        {
            "config": gateway,
            "prefill": prefill,
            "decode": [w.url for w in workers if w.disagg.mode == "decode"],
            "regular": [w.url for w in workers if w.disagg.mode == "null"],
        },
        stop_timeout=gateway.drain_timeout + 2.0,
    )
    return [*specs, door]


def url_of(host: str, port: int, *, tls: bool = False) -> str:
    """Where a server that listens on `host` can be reached from this machine."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    scheme = "https" if tls else "http"
    return f"{scheme}://[{reachable}]:{port}" if ":" in reachable else f"{scheme}://{reachable}:{port}"


def _roles(allocation: Allocation) -> list[tuple[str, str]]:
    """Name and mode of every worker."""
    if allocation.backend != "native":
        raise ConfigError(
            f"{allocation}: this version launches native engines only; start {allocation.backend} workers yourself "
            "and put `baton gateway --prefill URL --decode URL` before them"
        )
    shape = allocation.shape
    if isinstance(shape, Pair):
        return _named("prefill", shape.prefill) + _named("decode", shape.decode)
    return _named("worker", shape, mode="null")


def _named(name: str, dims: Dims, mode: str = "") -> list[tuple[str, str]]:
    if dims.world_size != dims.d or dims.e != 1:
        raise ConfigError(f"{name} {dims}: this version runs one rank per engine (t1p1); use d for more engines")
    return [(f"{name}-{index}", mode or name) for index in range(dims.d)]


def _on_gpus(engine: EngineConfig, workers: int, gpus: int) -> list[EngineConfig]:
    """Engines take the GPUs in turns; those that share one share the memory it may use."""
    if gpus == 0:
        return [engine] * workers
    sharing = -(-workers // gpus)
    return [
        dataclasses.replace(
            engine, base_gpu_id=engine.base_gpu_id + i % gpus, mem_fraction_static=engine.mem_fraction_static / sharing
        )
        for i in range(workers)
    ]
