"""The door: `baton COMMAND`. A command imports its room when it runs; `--help` imports neither torch nor a server."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from baton import __version__
from baton.base.config import DisaggConfig, EngineConfig, GatewayConfig, WorkerConfig
from baton.base.errors import BatonError, ConfigError
from baton.options import Command, Option, build, config_options, default_of
from baton.sglang_flags import NEGATIVES, ROUTER_SWITCHES, foreign, join_lists, join_urls, tell_gpu_only, translate

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "auto_envvar_prefix": "BATON"}
WORKER_OPTIONS = ("served_model_name", "chat_template", "tool_call_parser", "reasoning_parser", "sampling_defaults")
"""Of `baton worker`'s front, what `baton serve` takes too."""
DEFAULT_BACKEND = "native(P:d1t1p1|D:d1t1p1)"


class Door(click.Group):
    """Knows a command whose options are another room's, and imports that room only when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["serve", "worker", "gateway", "top", "pull", "bench", "version"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _bench() if cmd_name == "bench" else super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, BENCH_HELP if name == "bench" else self.commands[name].get_short_help_str(80))
                for name in self.list_commands(ctx)]  # fmt: skip
        with formatter.section("Commands"):
            formatter.write_dl(rows)


class ServerCommand(Command):
    """Takes SGLang's spellings."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, translate(join_lists(args)))


class RouterCommand(Command):
    """Takes sglang-router's lists of URLs."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, join_urls(args))


def reporting(function: Callable[..., int]) -> Callable[..., None]:
    """Errors that are ours become one clear line and status 2; with `--log-level debug` the traceback as well."""

    @functools.wraps(function)
    def command(**values: Any) -> None:
        try:
            code = function(**values)
        except BatonError as error:
            if values.get("log_level") == "debug":
                traceback.print_exc()
            click.echo(f"error: {error.message}", err=True)
            code = 2
        sys.exit(code)

    return command


@click.group(cls=Door, context_settings=SETTINGS)
@click.version_option(__version__, prog_name="baton")
def cli() -> None:
    """Serve language models with prefill and decode apart."""


@cli.command(cls=ServerCommand)
@foreign()
@click.argument("model_name", metavar="[MODEL]", required=False)
@click.option(
    "--backend", default=DEFAULT_BACKEND, show_default=True, cls=Option, section="Stack",
    help="which engines to run: native(P:d1t1p1|D:d1t1p1) is one prefill and one decode engine, "
    "native:d2t1p1 are two undivided ones",
)  # fmt: skip
@click.option(
    "--worker-port", default=default_of(WorkerConfig, "port"), show_default=True, cls=Option, section="Stack",
    help="workers listen on free ports from here upwards",
)  # fmt: skip
@config_options(GatewayConfig, "Gateway", skip=("worker_api_key", "reuse_port", "tls_client_ca", "connector"))
@config_options(WorkerConfig, "Workers", only=WORKER_OPTIONS)
@config_options(EngineConfig, "Engines", extra=NEGATIVES)
@config_options(DisaggConfig, "Prefill and decode apart", skip=("mode", "bootstrap_host", "drain_timeout"))
@reporting
def serve(model_name: str | None, backend: str, worker_port: int, **values: Any) -> int:
    """Start workers and a gateway on this machine, and keep them running.

    MODEL is a directory, a Hub id or a short name. Ctrl-C stops everything.
    """
    from baton.base.alloc import Pair, parse
    from baton.controller import stack
    from baton.controller.display import Display
    from baton.controller.resources import require_free
    from baton.controller.run import run_stack
    from baton.gateway.keys import secret

    begun = time.monotonic()
    allocation = parse(backend)
    machine = stack.Machine.here()
    if values["device"] == "cpu" or not machine.gpus or isinstance(allocation.shape, Pair):
        tell_gpu_only()
    engine, directory, served = _model(model_name, values)
    port = require_free(values["host"], values["port"])
    values["api_key"] = secret(values["api_key"], "api_key", os.environ)
    gateway = dataclasses.replace(build(GatewayConfig, values), port=port, worker_api_key=values["api_key"])
    front = dataclasses.replace(
        build(WorkerConfig, values), host="127.0.0.1", port=worker_port, served_model_name=served
    )
    disagg = build(DisaggConfig, {name: value for name, value in values.items() if name != "drain_timeout"})
    workers = stack.plan_workers(allocation, front, engine, disagg, machine)

    def ready() -> None:
        url = stack.url_of(gateway.host, gateway.port, tls=bool(gateway.tls_cert))
        click.echo(f"{served} is ready at {url} after {time.monotonic() - begun:.1f} s. Try:\n")
        click.echo(curl(url, served, key=bool(gateway.api_key)) + "\n")

    return run_stack(
        lambda rundir: stack.stack_specs(workers, gateway, directory, rundir), Display(ready), preload=stack.PRELOAD
    )


@cli.command(cls=ServerCommand)
@foreign()
@config_options(WorkerConfig, "Front")
@config_options(EngineConfig, "Engine", extra=NEGATIVES)
@config_options(DisaggConfig, "Prefill and decode apart")
@reporting
def worker(**values: Any) -> int:
    """Run one worker: an HTTP front with its engine, undivided or of one role."""
    from baton.controller import stack
    from baton.controller.display import Display
    from baton.controller.resources import require_free
    from baton.controller.run import run_stack

    begun = time.monotonic()
    if values["device"] == "cpu" or values["mode"] != "null" or not stack.Machine.here().gpus:
        tell_gpu_only()
    engine, directory, served = _model(None, values)
    port = require_free(values["host"], values["port"])
    front = dataclasses.replace(build(WorkerConfig, values), port=port, served_model_name=served)
    disagg = build(DisaggConfig, values)
    if disagg.mode == "prefill":
        if click.get_current_context().get_parameter_source("bootstrap_host") is ParameterSource.DEFAULT:
            disagg = dataclasses.replace(disagg, bootstrap_host=front.host)  # who can reach the one needs the other
        room = require_free(disagg.bootstrap_host, disagg.bootstrap_port, "--disaggregation-bootstrap-port")
        disagg = dataclasses.replace(disagg, bootstrap_port=room)
    name = "worker" if disagg.mode == "null" else disagg.mode
    one = stack.Worker(name, front, engine, disagg)

    def ready() -> None:
        click.echo(f"{name} worker for {served} is ready at {one.url} after {time.monotonic() - begun:.1f} s")

    return run_stack(lambda rundir: stack.worker_specs(one, directory, rundir), Display(ready), preload=stack.PRELOAD)


def _prefill_urls(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> list[tuple[str, int | None]]:
    """Each is `URL` or `URL PORT`, where PORT is the worker's bootstrap port or `none`."""
    pairs = [value.partition(" ") for value in values]
    return [(url, int(port) if port.isdigit() else None) for url, _, port in pairs]


@cli.command(cls=RouterCommand)
@click.option(
    "--prefill", multiple=True, metavar="URL [PORT]", callback=_prefill_urls, cls=Option, section="Workers",
    help="a prefill worker, and its bootstrap port (none: the decode worker knows it); may be repeated",
)  # fmt: skip
@click.option(
    "--decode", multiple=True, metavar="URL", cls=Option, section="Workers", help="a decode worker; may be repeated"
)
@click.option(
    "--worker", "--worker-urls", "regular", multiple=True, metavar="URL", cls=Option, section="Workers",
    help="an undivided worker; may be repeated",
)  # fmt: skip
@config_options(GatewayConfig, "Gateway")
@foreign(ROUTER_SWITCHES, ())
@reporting
def gateway(
    prefill: Sequence[tuple[str, int | None]], decode: Sequence[str], regular: Sequence[str], **values: Any
) -> int:
    """Put an OpenAI-compatible gateway before workers: our own, or SGLang's."""
    from baton.controller.child import resolve
    from baton.controller.resources import require_free
    from baton.controller.stack import GATEWAY

    config = build(GatewayConfig, values)
    if bool(prefill) != bool(decode):
        here, missing = ("--prefill", "--decode") if prefill else ("--decode", "--prefill")
        click.echo(f"notice: {here} without {missing}: such a worker is waited for (POST /workers)", err=True)
    if not (prefill or decode or regular):
        click.echo("notice: no workers yet; they register themselves (baton worker --register URL)", err=True)
    for url in [*(url for url, _ in prefill), *decode, *regular]:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f'worker "{url}" is no URL; write http://HOST:PORT')
    if not config.reuse_port:
        require_free(config.host, config.port)
    resolve(GATEWAY)(config, list(prefill), list(decode), list(regular))
    return 0


@cli.command(cls=Command)
@click.argument("model_name", metavar="[MODEL]", default=default_of(EngineConfig, "model"))
@reporting
def pull(model_name: str) -> int:
    """Get a model into the cache, and print where it is."""
    click.echo(_fetch(model_name, "auto"))
    return 0


@cli.command(cls=Command)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="of the gateway")
@click.option(
    "--interval", default=1.0, show_default=True, type=click.FloatRange(min=0.1), help="seconds between looks"
)
@click.option("--once", is_flag=True, help="print one picture, and end")
@reporting
def top(url: str, interval: float, once: bool) -> int:
    """Watch a gateway: workers, latencies, requests. An API key is taken from BATON_ADMIN_API_KEY or BATON_API_KEY."""
    from baton.gateway.keys import secret
    from baton.gateway.top import run

    key = secret("", "admin_api_key", os.environ) or secret("", "api_key", os.environ)
    return run(url, key, once=once, interval=interval)


@cli.command(cls=Command)
@reporting
def version() -> int:
    """Print the version."""
    click.echo(__version__)
    return 0


BENCH_HELP = "Put load on a server, and say honestly what came back."


@functools.cache
def _bench() -> click.Command:
    from baton.lab.config import BenchConfig

    @click.command("bench", cls=Command, help=BENCH_HELP, context_settings=SETTINGS)
    @config_options(BenchConfig, "Load and report")
    @reporting
    def bench(**values: Any) -> int:
        from baton.lab.bench import run

        return run(build(BenchConfig, values))

    return bench


def curl(url: str, model: str, *, key: bool = False) -> str:
    """A chat request to paste into a shell. A key is not shown: what we print may end in somebody's log."""
    message = {"role": "user", "content": "Why is the sky blue?"}
    body = json.dumps({"model": model, "messages": [message]})
    header = ' -H "Authorization: Bearer $BATON_API_KEY"' if key else ""
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{header} -d {shlex.quote(body)}"


def _model(name: str | None, values: dict[str, Any]) -> tuple[EngineConfig, Path, str]:
    """The engine's configuration with the model's directory in it, that directory, and the name to serve it by."""
    engine = build(EngineConfig, values)
    given = name or engine.model
    directory = _fetch(given, engine.load_format, engine.revision)
    tokenizer = str(_fetch_tokenizer(engine.tokenizer_path)) if engine.tokenizer_path else ""
    served = values["served_model_name"] or (directory.name if Path(given).is_dir() else given)
    return dataclasses.replace(engine, model=str(directory), tokenizer_path=tokenizer), directory, served


def _fetch(name: str, load_format: str, revision: str = "") -> Path:
    from baton.models import RichProgress, resolve

    with RichProgress() as progress:
        return resolve(name, load_format=load_format, revision=revision, progress=progress).resolve()


def _fetch_tokenizer(name: str) -> Path:
    from baton.models import RichProgress, resolve_tokenizer

    with RichProgress() as progress:
        return resolve_tokenizer(name, progress=progress)


def main() -> None:
    """Entry point of `baton`."""
    cli(prog_name="baton")
