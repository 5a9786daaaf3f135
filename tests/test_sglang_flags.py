"""SGLang's command lines: every option means the same, is said to have no effect, or is refused with a remedy."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from baton.base.config import DisaggConfig, EngineConfig, WorkerConfig
from baton.base.errors import ConfigError
from baton.cli import cli
from baton.controller.rundir import RunDirectory
from baton.controller.spec import ProcessSpec
from baton.sglang_flags import NO_EFFECT, REFUSED, join_lists, join_urls, translate

from .tiny_model import write

NOWHERE = ("worker", "--model-path", "./nowhere")
GONE = "error: model directory ./nowhere does not exist"


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments), prog_name="baton", terminal_width=100)


class Planned:
    """What a command would have started."""

    def __init__(self) -> None:
        self.specs: list[ProcessSpec] = []

    def __call__(self, specs: Callable[[RunDirectory], Sequence[ProcessSpec]], *_: object, **__: object) -> int:
        run = RunDirectory.create()
        self.specs = list(specs(run))
        run.remove()
        return 0

    def configs(self) -> tuple[WorkerConfig, EngineConfig, DisaggConfig]:
        front = self.specs[0].kwargs
        return front["worker"], front["engine"], front["disagg"]  # type: ignore[return-value]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Planned:
    planned = Planned()
    monkeypatch.setattr("baton.controller.run.run_stack", planned)
    return planned


def test_a_command_from_sglangs_pages_starts_a_worker(planned: Planned, tmp_path: Path) -> None:
    write(tmp_path)
    line = f"""
    --model-path {tmp_path} --tokenizer-path {tmp_path} --disaggregation-mode prefill --port 0 --host 127.0.0.1
    --disaggregation-bootstrap-port 0 --disaggregation-ib-device mlx5_0 --disaggregation-transfer-backend nixl
    --trust-remote-code --tp-size 1 --dp-size 1 --pp-size 1 --nnodes 1 --node-rank 0 --dist-init-addr 10.0.0.1:5000
    --mem-fraction-static 0.8 --max-total-tokens 1000 --context-length 256 --max-running-requests 8
    --chunked-prefill-size -1 --cuda-graph-bs 1 2 4 --attention-backend fa3 --page-size 16 --log-level warn
    --served-model-name m --api-key k --watchdog-timeout 1000000 --enable-metrics --sampling-defaults openai
    """
    result = invoke("worker", *shlex.split(line))
    assert result.exit_code == 0, result.output
    front, engine, disagg = planned.configs()
    assert (front.served_model_name, front.api_key, front.log_level) == ("m", "k", "warning")
    assert front.sampling_defaults == "openai"
    assert (engine.max_total_tokens, engine.max_model_len, engine.max_running_requests) == (1000, 256, 8)
    assert engine.tokenizer_path == engine.model == str(tmp_path.resolve())
    assert (disagg.mode, disagg.transport) == ("prefill", "auto")
    said = result.stderr.splitlines()
    assert all(line.startswith("note: ") for line in said)
    assert "note: --cuda-graph-bs has no effect: the engine chooses its kernels" in said
    assert "note: --mem-fraction-static has no effect: the engine will be on the CPU" in said
    assert not any("--pp-size" in line or "--nnodes" in line for line in said)


def test_options_without_effect_say_so_in_one_line_each() -> None:
    result = invoke(
        *NOWHERE, "--trust-remote-code", "--disaggregation-ib-device", "mlx5_0", "--enable-metrics",
        "--disaggregation-transfer-backend", "mooncake",
    )  # fmt: skip
    assert result.stderr.splitlines() == [
        "note: --disaggregation-transfer-backend mooncake is taken as auto",
        "note: --trust-remote-code has no effect: models run without code of their own",
        "note: --disaggregation-ib-device has no effect: prefill and decode agree on it when they meet",
        "note: --enable-metrics has no effect: it is always so here",
        GONE,
    ]


@pytest.mark.parametrize(
    "name", [name for row in NO_EFFECT for name in f"{row.switches} {row.values} {row.lists}".split()]
)
def test_every_option_without_effect_is_taken(name: str) -> None:
    row = next(row for row in NO_EFFECT if name in f"{row.switches} {row.values} {row.lists}".split())
    values = [] if name in row.switches.split() else ["1"]
    result = invoke(*NOWHERE, name, *values)
    assert result.stderr.splitlines() == [f"note: {name} has no effect: {row.reason}", GONE]


@pytest.mark.parametrize("name", [name for row in REFUSED for name in f"{row.switches} {row.values}".split()])
def test_every_promise_that_is_not_kept_is_refused_with_a_remedy(name: str) -> None:
    row = next(row for row in REFUSED if name in f"{row.switches} {row.values}".split())
    values = [] if name in row.switches.split() else ["2"]
    result = invoke(*NOWHERE, name, *values)
    assert result.exit_code == 2
    assert " ".join([name, *values]) + f" is not supported: {row.remedy}" in " ".join(result.stderr.split())
    if row.nothing:
        assert invoke(*NOWHERE, name, row.nothing).stderr.splitlines() == [GONE]


def test_several_ranks_are_refused() -> None:
    assert "tp_size is 2; this version runs one rank per engine" in invoke(*NOWHERE, "--tp-size", "2").stderr


def test_options_that_only_a_gpu_cares_about(planned: Planned, tmp_path: Path) -> None:
    write(tmp_path)
    arguments = ("worker", "--model-path", str(tmp_path), "--port", "0", "--device", "cpu")
    assert "--mem-fraction-static" not in invoke(*arguments).stderr
    assert invoke(*arguments, "--base-gpu-id", "1").stderr.splitlines() == [
        "note: --base-gpu-id has no effect: the engine will be on the CPU"
    ]


def test_values_by_other_names() -> None:
    assert translate(["--dtype", "half", "--dtype=bf16", "--load-format", "auto"]) == [
        "--dtype", "float16", "--dtype=bfloat16", "--load-format", "auto",
    ]  # fmt: skip
    assert translate(["--served-model-name", "half"]) == ["--served-model-name", "half"]


def test_lists_become_one_value() -> None:
    assert join_lists(["--cuda-graph-bs", "1", "2", "--port", "9", "x", "--cuda-graph-bs", "-h"]) == [
        "--cuda-graph-bs", "1 2", "--port", "9", "x", "--cuda-graph-bs", "-h",
    ]  # fmt: skip


def test_the_routers_way_to_name_workers() -> None:
    line = "--prefill http://a:1 8998 --prefill http://b:1 none --prefill http://c:1 --decode http://d:1 --port 9"
    assert join_urls(line.split()) == [
        "--prefill", "http://a:1 8998", "--prefill", "http://b:1 none", "--prefill", "http://c:1",
        "--decode", "http://d:1", "--port", "9",
    ]  # fmt: skip
    assert join_urls(["--worker-urls", "http://a", "http://b", "-h"]) == [
        "--worker-urls", "http://a", "--worker-urls", "http://b", "-h",
    ]  # fmt: skip


@pytest.mark.parametrize(("tokens", "words"), [(15, "at least the page size, 16"), (64, "give one of them")])
def test_the_pools_size_is_said_once_and_holds_a_page(tokens: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(EngineConfig(kv_pages=4 if tokens == 64 else 0), max_total_tokens=tokens)
