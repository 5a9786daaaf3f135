"""What the worker says of itself."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from baton.api.sampling import NO_DEFAULTS
from baton.base.config import DisaggConfig, EngineConfig, WorkerConfig
from baton.base.errors import ConfigError
from baton.engine.roles import Unified
from baton.engine.sockets import HandoffLoad
from baton.worker.front import Front, new_event_loop

from .rig import MODEL, Rig, in_flight, wait_for


def get(rig: Rig, path: str) -> httpx.Response:
    return httpx.get(f"{rig.url}{path}", timeout=10)


def ask(rig: Rig, **body: object) -> None:
    body = {"prompt": "hello there how are you", "max_tokens": 8, **body}
    assert httpx.post(f"{rig.url}/v1/completions", json=body, timeout=10).status_code == 200


def test_models(rig: Rig) -> None:
    card = get(rig, "/v1/models").json()["data"][0]
    assert card["id"] == MODEL
    assert card["max_model_len"] == 1024
    assert get(rig, f"/v1/models/{MODEL}").json() == card
    missing = get(rig, "/v1/models/gpt-17")
    assert missing.status_code == 404
    assert missing.json()["error"]["param"] == "model"


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_model_info(rig: Rig, path: str) -> None:
    info = get(rig, path).json()
    assert info["model_path"] == MODEL
    assert info["disaggregation_mode"] == "null"
    assert info["architectures"] == ["TinyForCausalLM"]


def test_tokenizer_and_sampling_defaults_can_be_others(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')  # a directory with weights only
    engine = EngineConfig(tokenizer_path=str(model_dir))
    state = Front(WorkerConfig(), str(tmp_path), "unused", DisaggConfig(), engine).state
    assert state.tokenizer.encode("hello")
    assert state.chat.render([{"role": "user", "content": "hello"}]).startswith("<|im_start|>user")
    assert state.defaults.temperature == 0.5
    worker = WorkerConfig(sampling_defaults="openai")
    assert Front(worker, str(tmp_path), "unused", DisaggConfig(), engine).state.defaults == NO_DEFAULTS


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info(rig: Rig, path: str) -> None:
    info = get(rig, path).json()
    wanted = {"tp_size", "dp_size", "load_balance_method", "served_model_name", "disaggregation_mode", "transports"}
    assert wanted | {"disaggregation_bootstrap_port", "internal_states", "version"} <= set(info)
    assert info["max_total_num_tokens"] == 512 * 8
    assert info["status"] == "ready"
    assert "api_key" not in info


def test_loads(rig: Rig) -> None:
    ask(rig)
    load = get(rig, "/v1/loads").json()["loads"][0]
    assert load["max_total_num_tokens"] == 512 * 8
    assert load["num_running_reqs"] == 0
    assert load["pages"]["total"] == 512
    assert load["disaggregation"]["mode"] == "null"
    assert get(rig, "/get_load").json()[0]["num_tokens"] == 0


def test_requests_that_wait_for_pages_on_d_are_waiting(rig: Rig) -> None:
    assert rig.engine is not None
    role = rig.engine.engine.role
    assert isinstance(role, Unified)
    role.handoffs = HandoffLoad(open=1, waiting=3, waiting_tokens=120)
    load = get(rig, "/v1/loads").json()["loads"][0]
    assert (load["num_waiting_reqs"], load["num_waiting_uncached_tokens"], load["num_running_reqs"]) == (3, 120, 0)
    assert load["disaggregation"]["decode_prealloc_queue_reqs"] == 3
    assert get(rig, "/get_load").json()[0]["num_waiting_reqs"] == 3
    text = get(rig, "/metrics").text
    for name, value in (("num_requests_waiting", 3), ("num_tokens_waiting", 120), ("num_handoffs_open", 1)):
        assert re.search(rf"^baton_{name}\{{.*\}} {value}\.0$", text, re.MULTILINE)
    role.handoffs = HandoffLoad()


def test_health_is_cheap(rig: Rig) -> None:
    assert rig.engine is not None
    steps = rig.engine.runner.steps
    for path in ("/health", "/health_generate", "/ready"):
        assert get(rig, path).status_code == 200
    assert rig.engine.runner.steps == steps


def test_flush_cache(rig: Rig) -> None:
    ask(rig)
    assert get(rig, "/flush_cache").json()["success"] is True
    assert get(rig, "/v1/loads").json()["loads"][0]["pages"]["cached"] == 0
    with in_flight(rig):
        busy = httpx.post(f"{rig.url}/flush_cache", timeout=10)
        assert busy.status_code == 400
        assert "running" in busy.json()["error"]["message"]
    rig.settle()
    assert httpx.post(f"{rig.url}/flush_cache", timeout=10).status_code == 200


def test_tokenize_and_back(rig: Rig) -> None:
    answer = httpx.post(f"{rig.url}/tokenize", json={"prompt": "hello 🙂", "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    back = httpx.post(f"{rig.url}/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back["prompt"] == "hello 🙂"
    assert httpx.post(f"{rig.url}/v1/detokenize", json={"tokens": [99999]}).status_code == 400
    assert httpx.post(f"{rig.url}/v1/tokenize", json={}).status_code == 400


def test_metrics(rig: Rig) -> None:
    ask(rig)
    ask(rig, stream=True)
    with in_flight(rig):
        running = samples(rig)
    assert running["baton_num_requests_running"] == 1
    assert running["baton_num_http_requests"] == 1
    rig.settle()
    told = samples(rig)
    assert told["baton_engine_up"] == 1
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        assert told[f"baton_{name}_count"] > 0
        assert told[f"baton_{name}_sum"] > 0
    for stage in ("queue", "prefill", "decode"):
        assert told[f"baton_stage_seconds_count/{stage}"] > 0
    for name in (
        "prompt_tokens",
        "generation_tokens",
        "engine_steps",
        "engine_generated_tokens",
        "engine_prompt_tokens",
    ):
        assert told[f"baton_{name}_total"] > 0
    assert told["baton_kv_pages/free"] + told["baton_kv_pages/cached"] == 512
    assert told["baton_requests_total/completions/length"] >= 2


def samples(rig: Rig) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(get(rig, "/metrics").text):
        for sample in family.samples:
            assert sample.labels["model_name"] == MODEL
            assert sample.labels["role"] == "unified"
            extra = [sample.labels[key] for key in ("route", "outcome", "state", "stage") if key in sample.labels]
            if "le" not in sample.labels:
                found["/".join([sample.name, *extra])] = sample.value
    return found


def test_no_torch_in_the_process() -> None:
    code = "import baton.worker.front, sys; print(sorted({'torch', 'transformers', 'numba'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_process_ends_on_sigterm(model_dir: Path, tmp_path: Path) -> None:
    channel = tmp_path / "engine.sock"
    code = (
        "from baton.worker.front import run\n"
        "from baton.base.config import *\n"
        f"run(WorkerConfig(port=0), {str(model_dir)!r}, {str(channel)!r}, DisaggConfig())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_for(channel.exists, 20)
        assert os.stat(channel).st_mode & 0o777 == 0o600
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
        assert time.monotonic() - started < 3
        assert not channel.exists()
    finally:
        process.kill()
        process.wait()


def test_a_channel_that_cannot_be_opened_is_the_operators_fault(model_dir: Path, tmp_path: Path) -> None:
    front = Front(WorkerConfig(port=0), str(model_dir), str(tmp_path / "no" / "c"), DisaggConfig())
    with pytest.raises(ConfigError, match="channel"), asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(front.serve())


def test_a_taken_port_is_the_operators_fault(rig: Rig, model_dir: Path, tmp_path: Path) -> None:
    code = (
        "from baton.worker.front import run\n"
        "from baton.base.config import *\n"
        "from baton.base.errors import ConfigError\n"
        "try:\n"
        f"    run(WorkerConfig(port={rig.front.port}), {str(model_dir)!r}, {str(tmp_path / 'c')!r}, DisaggConfig())\n"
        "except ConfigError as error:\n"
        "    print(error.message)\n"
    )
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert f"cannot listen on 127.0.0.1:{rig.front.port}" in said
