"""SGLang's command line, as far as ours differs from it: its users' commands work with the program's name changed.

Spellings that mean the same are aliases in the configuration dataclasses. Here are the rest: options that say
nothing about this program (accepted with a notice), values with other names, and its router's way to write URLs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

NEGATIVES = {"prefix_caching": (" /--disable-radix-cache",), "cuda_graphs": (" /--disable-cuda-graph",)}
"""Spellings that switch something off; it has none that switch these on."""

SWITCHES = (
    "--trust-remote-code",
    "--enable-metrics",
    "--enable-cache-report",
    "--enable-torch-compile",
    "--enable-mixed-chunk",
    "--enable-p2p-check",
    "--enable-memory-saver",
    "--disable-overlap-schedule",
    "--disable-custom-all-reduce",
    "--disable-cuda-graph-padding",
    "--disable-outlines-disk-cache",
    "--disaggregation-enable-kv-checksum",
    "--disaggregation-decode-enable-radix-cache",
    "--log-requests",
    "--show-time-cost",
    "--skip-server-warmup",
    "--enable-pd-role-switch",
)
VALUES = (
    "--attention-backend",
    "--cuda-graph-bs",
    "--cuda-graph-max-bs",
    "--decode-attention-backend",
    "--decode-log-interval",
    "--dist-init-addr",
    "--disaggregation-decode-allocation-policy",
    "--disaggregation-decode-extra-slots",
    "--disaggregation-decode-retraction-backup",
    "--disaggregation-decode-polling-interval",
    "--disaggregation-ib-device",
    "--disaggregation-prefill-pp",
    "--grammar-backend",
    "--kv-cache-dtype",
    "--load-balance-method",
    "--log-level-http",
    "--log-requests-level",
    "--max-prefill-tokens",
    "--nccl-port",
    "--nnodes",
    "--node-rank",
    "--num-reserved-decode-tokens",
    "--optimistic-prefill-attempts",
    "--prefill-attention-backend",
    "--random-seed",
    "--sampling-backend",
    "--schedule-conservativeness",
    "--schedule-policy",
    "--stream-interval",
    "--tokenizer-mode",
    "--tokenizer-worker-num",
    "--watchdog-timeout",
)
ROUTER_SWITCHES = ("--pd-disaggregation", "--mini-lb")

OTHER_VALUES = {
    "--disaggregation-transfer-backend": {
        **dict.fromkeys(("mooncake", "nixl", "mori", "ascend", "fake"), "auto"),
        "mooncake_tcp": "tcp",
    },
    "--dtype": {"half": "float16", "float": "float32", "fp16": "float16", "bf16": "bfloat16"},
    "--load-format": dict.fromkeys(("safetensors", "pt"), "auto"),
    "--chunked-prefill-size": {"-1": str(2**20)},
}
"""Values that are called otherwise here, or that the nearest thing here stands in for."""

URL_LISTS = ("--prefill", "--decode", "--worker", "--worker-urls")


def notice(text: str) -> None:
    click.echo(f"note: {text}", err=True)


def ignored(switches: Sequence[str] = SWITCHES, values: Sequence[str] = VALUES) -> Callable[[Any], Any]:
    """A decorator that makes a command accept options without a meaning here, with one line each on stderr."""

    def tell(ctx: click.Context, param: click.Parameter, value: object) -> None:
        if value not in (None, False):
            notice(f"{param.opts[0]} means nothing here and is ignored")

    def decorate(function: Any) -> Any:
        for switch in switches:
            function = click.option(switch, is_flag=True, hidden=True, expose_value=False, callback=tell)(function)
        for name in values:
            function = click.option(name, hidden=True, expose_value=False, callback=tell)(function)
        return function

    return decorate


def translate(arguments: Sequence[str]) -> list[str]:
    """Values by our names; `--option value` and `--option=value` alike."""
    out: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and value in OTHER_VALUES.get(name, {}):
            out.append(f"{name}={_translated(name, value)}")
        elif out and argument in OTHER_VALUES.get(out[-1], {}):
            out.append(_translated(out[-1], argument))
        else:
            out.append(argument)
    return out


def _translated(name: str, value: str) -> str:
    ours = OTHER_VALUES[name][value]
    notice(f"{name} {value} is taken as {ours}")
    return ours


def join_urls(arguments: Sequence[str]) -> list[str]:
    """sglang-router's lists for click: `--prefill URL PORT` becomes one value, `--worker-urls A B` one option each."""
    out: list[str] = []
    option = ""
    for argument in arguments:
        if argument.startswith("-"):
            option = argument if argument in URL_LISTS else ""
            out.append(argument)
        elif option and out[-1] == option:
            out.append(argument)
        elif option == "--prefill" and (argument.isdigit() or argument.lower() == "none"):
            out[-1] += f" {argument}"
        elif option and "://" in argument:
            out += [option, argument]
        else:
            out.append(argument)
    return out
