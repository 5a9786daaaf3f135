"""The command line. `python tests/test_cli.py` writes the help texts into docs/cli.md anew."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from baton import __version__
from baton.base.config import DisaggConfig, EngineConfig, GatewayConfig, WorkerConfig
from baton.cli import cli, curl
from baton.controller.resources import free_ports
from baton.controller.rundir import RunDirectory, default_base
from baton.controller.spec import ProcessSpec
from baton.options import Command, build, config_options
from baton.sglang_flags import NEGATIVES, NO_EFFECT, REFUSED

COMMANDS = ("serve", "worker", "gateway", "pull", "bench", "version")
PAGE = Path(__file__).parents[1] / "docs" / "cli.md"


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments), prog_name="baton", terminal_width=100)


# --- help --------------------------------------------------------------------------------------------------------


def documented(page: str) -> str:
    """The page with its help texts as they are now."""

    def block(match: re.Match[str]) -> str:
        return f"```text\n$ {match[1]}\n{invoke(*match[1].split()[1:]).output}```"

    page = re.sub(r"<!-- flags -->\n.*?<!-- end -->", lambda _: flag_tables(), page, flags=re.DOTALL)
    return re.sub(r"```text\n\$ (baton[^\n]*--help)\n.*?```", block, page, flags=re.DOTALL)


def flag_tables() -> str:
    """SGLang's options that are not ours."""
    effectless = [(f"{row.switches} {row.values} {row.lists}", row.reason) for row in NO_EFFECT]
    refused = [(f"{row.switches} {row.values}", row.remedy) for row in REFUSED]
    lines = ["| without effect | because |", "|---|---|", *map(flag_row, effectless), ""]
    lines += ["| refused | instead |", "|---|---|", *map(flag_row, refused)]
    return "\n".join(["<!-- flags -->", *lines, "<!-- end -->"])


def flag_row(row: tuple[str, str]) -> str:
    return f"| {', '.join(f'`{name}`' for name in row[0].split())} | {row[1]} |"


def test_the_page_shows_the_help_as_it_is() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == documented(page), "run: python tests/test_cli.py"
    for command in COMMANDS:
        assert f"$ baton {command} --help" in page


def test_help_is_quick_and_imports_no_room() -> None:
    code = (
        "import sys; from baton.cli import cli; cli(['--help'], standalone_mode=False); "
        "print(*sorted(sys.modules), file=sys.stderr)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    modules = set(done.stderr.split())
    assert not modules & {"torch", "transformers", "numpy", "starlette", "uvicorn", "httpx", "lark", "rich"}
    rooms = {name.split(".")[1] for name in modules if name.startswith("baton.")}
    assert rooms == {"base", "cli", "options", "sglang_flags"}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


@pytest.mark.parametrize("name", COMMANDS)
def test_no_option_is_there_twice(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    spellings = [text for param in command.params for text in (*param.opts, *param.secondary_opts)]
    assert len(spellings) == len(set(spellings))


@pytest.mark.parametrize("arguments", [["version"], ["--version"]])
def test_version(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "baton", *arguments], capture_output=True, text=True, check=True)
    assert __version__ in done.stdout


# --- options from dataclasses ------------------------------------------------------------------------------------


def parsed(config: type, *arguments: str) -> object:
    """What the options of a dataclass make of a command line."""
    found: list[object] = []

    @click.command(cls=Command)
    @config_options(config, "Section", extra=NEGATIVES)
    def command(**values: object) -> None:
        found.append(build(config, values))

    command(list(arguments), standalone_mode=False)
    return found[0]


@pytest.mark.parametrize("config", [EngineConfig, DisaggConfig, WorkerConfig, GatewayConfig])
def test_without_arguments_all_is_as_the_dataclass_says(config: type) -> None:
    assert parsed(config) == config()


def test_values_switches_and_other_spellings() -> None:
    assert parsed(
        EngineConfig, "--model-path", "m", "--page-size", "32", "--no-prefix-caching", "--disable-cuda-graph",
        "--context-length=4096", "--mem-fraction-static", "0.5", "--quantization", "int8",
    ) == EngineConfig(
        "m", page_size=32, prefix_caching=False, cuda_graphs=False, max_model_len=4096, mem_fraction_static=0.5,
        weight_dtype="int8",
    )  # fmt: skip
    assert parsed(EngineConfig, "--disable-radix-cache") == EngineConfig(prefix_caching=False)
    assert parsed(DisaggConfig, "--disaggregation-mode", "decode") == DisaggConfig(mode="decode")


def test_a_wrong_choice_is_answered_with_the_right_ones() -> None:
    result = invoke("worker", "--dtype", "float8")
    assert result.exit_code == 2
    assert "'float8' is not one of 'auto', 'float32', 'bfloat16', 'float16'" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["worker", "--model-pth", "x"], "'--model-path'"),
        (["srve"], "Did you mean 'serve'?"),
        (["serve", "--page-size", "x"], "'x' is not a valid integer"),
        (["serve", "--page-size", "0"], "error: page_size is 0; it must be at least 1\n"),
        (["serve", "--tp", "2"], "error: tp_size is 2; this version runs one rank per engine"),
        (["serve", "--backend", "native(P:d1)"], "error: allocation: no D (decode) group"),
        (["serve", "smollm3"], 'error: unknown model "smollm3"; known: '),
        (["serve", "./nowhere"], "error: model directory ./nowhere does not exist\n"),
        (["gateway", "--processes", "0"], "error: processes is 0; it must be greater than 0"),
        (["gateway", "--worker", "a:1"], 'error: worker "a:1" is no URL'),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(arguments: list[str], words: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_options_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_SERVE_BACKEND", "native(P:d1)")
    assert "no D (decode) group" in invoke("serve").stderr


def test_debug_shows_the_traceback_too() -> None:
    result = invoke("serve", "--backend", "nonsense", "--log-level", "debug")
    assert result.exit_code == 2
    assert result.stderr.index("Traceback") < result.stderr.index("\nerror: allocation")


# --- what a worker's processes are told --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--disaggregation-mode", "prefill", "--host", "127.0.0.2"], "127.0.0.2"),
        (["--disaggregation-mode", "prefill", "--host", "127.0.0.2", "--bootstrap-host", "127.0.0.3"], "127.0.0.3"),
    ],
)
def test_who_can_reach_a_prefill_worker_can_reach_its_rendezvous(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from .tiny_model import write  # here, because this file is a script too

    planned: list[str] = []

    def run_stack(specs: Callable[[RunDirectory], Sequence[ProcessSpec]], *_: object, **__: object) -> int:
        run = RunDirectory.create()
        planned.extend(spec.kwargs["disagg"].bootstrap_host for spec in specs(run))  # type: ignore[attr-defined]
        run.remove()
        return 0

    monkeypatch.setattr("baton.controller.run.run_stack", run_stack)
    write(tmp_path)
    ports = ["--port", "0", "--disaggregation-bootstrap-port", "0"]
    assert invoke("worker", "--model-path", str(tmp_path), *ports, *arguments).exit_code == 0
    assert planned == [expected, expected]


# --- a stack of tiny processes behind the real command -----------------------------------------------------------

FAKE = """
import sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

def serve(host, port):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200); self.end_headers()
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200); self.end_headers(); self.wfile.write(body)
        def log_message(self, *args):
            pass
    HTTPServer((host, port), Handler).serve_forever()

def front(worker, model_dir, channel, disagg, engine):
    assert worker.served_model_name == "tiny" and engine.model == model_dir and engine.page_size == 32
    Path(channel).touch()
    serve(worker.host, worker.port)

def engine(engine, disagg, channel, cores):
    assert Path(channel).exists()
    threading.Event().wait()

def gateway(config, prefill, decode, regular):
    assert len(prefill) == 1 and len(decode) == 1 and not regular, (prefill, decode, regular)
    serve(config.host, config.port)
"""
LAUNCH = """
import sys
from baton.cli import main
from baton.controller import stack
stack.FRONT, stack.ENGINE, stack.GATEWAY = "fake_stack:front", "fake_stack:engine", "fake_stack:gateway"
stack.PRELOAD = ("fake_stack",)
main()
"""


def test_serve_prints_a_command_that_works_and_stops_on_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "fake_stack.py").write_text(FAKE)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text('{"model_type": "llama"}')
    port = next(free_ports("127.0.0.1", 36000))
    arguments = f"serve {tmp_path}/tiny --load-format dummy --port {port} --worker-port 37000 --page-size 32"
    server = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, *arguments.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    try:
        assert server.stdout is not None
        assert server.stdout.readline().startswith(f"tiny is ready at http://127.0.0.1:{port} after ")
        server.stdout.readline()
        program, url, *_, body = shlex.split(server.stdout.readline())
        assert program == "curl"
        request = urllib.request.Request(url, body.encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as response:
            assert json.load(response)["model"] == "tiny"
        taken = invoke("serve", str(tmp_path / "tiny"), "--load-format", "dummy", "--port", str(port))
        assert (
            taken.stderr == f"error: port {port} on 127.0.0.1 is taken by another process; choose another with --port\n"
        )
    finally:
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=20)
    assert server.returncode == 0, errors
    assert "gateway: ready" in errors
    assert not list(default_base().glob(f"{server.pid}-*"))


def test_the_command_to_paste_is_safe_in_a_shell() -> None:
    words = shlex.split(curl("http://h:1", "it's", key=True))
    assert words[:2] == ["curl", "http://h:1/v1/chat/completions"]
    assert "Authorization: Bearer $BATON_API_KEY" in words
    assert json.loads(words[-1])["model"] == "it's"


if __name__ == "__main__":
    PAGE.write_text(documented(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
