import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from baton.base.alloc import parse
from baton.base.config import DisaggConfig, EngineConfig, GatewayConfig, WorkerConfig
from baton.base.errors import ConfigError
from baton.controller.resources import free_ports
from baton.controller.rundir import RunDirectory
from baton.controller.spec import HttpCheck, ProcessSpec
from baton.controller.stack import Machine, Worker, plan_workers, stack_specs, url_of, worker_specs

FRONT, ENGINE, DISAGG = WorkerConfig(port=33000), EngineConfig(), DisaggConfig(bootstrap_port=34000)


def plan(
    backend: str, *, cores: tuple[int, ...] = (0, 1), gpus: int = 0, engine: EngineConfig = ENGINE
) -> list[Worker]:
    return plan_workers(parse(backend), FRONT, engine, DISAGG, Machine(cores, gpus))


def test_one_prefill_and_one_decode_worker_on_two_cores() -> None:
    prefill, decode = plan("native(P:d1|D:d1)")
    assert (prefill.name, prefill.disagg.mode, prefill.cores) == ("prefill-0", "prefill", (0,))
    assert (decode.name, decode.disagg.mode, decode.cores) == ("decode-0", "decode", (1,))
    assert prefill.front.port != decode.front.port
    assert prefill.engine == decode.engine == ENGINE


def test_several_engines_have_ports_and_rendezvous_of_their_own() -> None:
    workers = plan("native(P:d2|D:d3)", cores=tuple(range(16)))
    assert [worker.name for worker in workers] == ["prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2"]
    assert len({worker.front.port for worker in workers}) == 5
    assert len({worker.disagg.bootstrap_port for worker in workers[:2]}) == 2
    assert {len(worker.cores) for worker in workers} == {3}


def test_undivided_engines() -> None:
    workers = plan("native:d2t1p1")
    assert [(worker.name, worker.disagg.mode) for worker in workers] == [("worker-0", "null"), ("worker-1", "null")]


def test_gpus_are_taken_in_turns_and_their_memory_is_shared() -> None:
    workers = plan("native(P:d1|D:d2)", gpus=2)
    assert [worker.engine.base_gpu_id for worker in workers] == [0, 1, 0]
    assert {worker.engine.mem_fraction_static for worker in workers} == {0.425}
    on_cpu = plan("native(P:d1|D:d2)", gpus=2, engine=replace(ENGINE, device="cpu"))
    assert {worker.engine.mem_fraction_static for worker in on_cpu} == {0.85}


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("sglang:d1", "launches native engines only; start sglang workers yourself"),
        ("native:t2", "worker d1t2p1: this version runs one rank per engine"),
        ("native(P:d1p2|D:d1)", "prefill d1t1p2"),
        ("native(P:d1|D:d1e2)", "decode d1t1p1e2"),
    ],
)
def test_what_cannot_be_launched_says_what_can(backend: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan(backend)
    assert words in error.value.message


@pytest.fixture
def specs(tmp_path: Path) -> dict[str, ProcessSpec]:
    run = RunDirectory.create(tmp_path / "b")
    gateway = GatewayConfig(port=next(free_ports("127.0.0.1", 35000)), api_key="k")
    found = stack_specs(plan("native(P:d1|D:d1)"), gateway, Path("/model"), run)
    run.remove()
    return {spec.name: spec for spec in found}


def test_the_processes_of_a_stack(specs: dict[str, ProcessSpec]) -> None:
    assert list(specs) == ["prefill-0.front", "prefill-0.engine", "decode-0.front", "decode-0.engine", "gateway"]
    assert [name for name, spec in specs.items() if spec.heavy] == ["prefill-0.engine", "decode-0.engine"]
    assert pickle.loads(pickle.dumps(list(specs.values()))) == list(specs.values())
    for kind in ("prefill-0", "decode-0"):
        front, engine = specs[f"{kind}.front"], specs[f"{kind}.engine"]
        assert engine.after == (front.name,)
        assert front.kwargs["channel"] == engine.kwargs["channel"]
        assert set(front.kwargs) == {"worker", "model_dir", "channel", "disagg", "engine"}
        assert set(engine.kwargs) == {"engine", "disagg", "channel", "cores"}


def test_the_gateway_knows_its_workers_and_stops_before_them(specs: dict[str, ProcessSpec]) -> None:
    gateway, prefill, decode = specs["gateway"], specs["prefill-0.front"], specs["decode-0.engine"]
    assert gateway.stop_rank < prefill.stop_rank < decode.stop_rank
    assert gateway.kwargs["regular"] == []
    ((url, port),) = gateway.kwargs["prefill"]  # type: ignore[misc]
    assert isinstance(specs["prefill-0.engine"].ready, HttpCheck)
    assert specs["prefill-0.engine"].ready.url == f"{url}/ready"
    assert port == prefill.kwargs["disagg"].bootstrap_port  # type: ignore[attr-defined]
    assert isinstance(gateway.ready, HttpCheck)
    assert gateway.ready.token == "k"


def test_one_worker_alone(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "b")
    worker = Worker("decode", replace(FRONT, host="0.0.0.0"), ENGINE, replace(DISAGG, mode="decode"))
    front, engine = worker_specs(worker, Path("/model"), run)
    run.remove()
    assert engine.ready == HttpCheck("http://127.0.0.1:33000/ready")
    assert (front.name, engine.name) == ("decode.front", "decode.engine")


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:1"),
        ("::", "http://[::1]:1"),
        ("10.0.0.7", "http://10.0.0.7:1"),
        ("h", "http://h:1"),
    ],
)
def test_urls(host: str, url: str) -> None:
    assert url_of(host, 1) == url
