"""SGLang's command line, as far as ours differs from it: its users' commands work with the program's name changed.

Spellings that mean the same are aliases in the configuration dataclasses. Here are the rest: options that have no
effect here (accepted with a notice), options whose promise is not kept here (refused with what to do instead), values
with other names, and its ways to write lists. Nothing is ignored in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import click
from click.core import ParameterSource

NEGATIVES = {"prefix_caching": (" /--disable-radix-cache",), "cuda_graphs": (" /--disable-cuda-graph",)}
"""Spellings that switch something off; it has none that switch these on."""


class NoEffect(NamedTuple):
    """Options that change nothing for who asks this server, and why."""

    reason: str
    switches: str = ""
    values: str = ""
    lists: str = ""
    """Options followed by any number of values."""


NO_EFFECT = (
    NoEffect(
        "it is always so here",
        "--enable-metrics --enable-cache-report --enable-mixed-chunk --enable-priority-scheduling --sleep-on-idle "
        "--disable-custom-all-reduce --disable-outlines-disk-cache --skip-server-warmup",
    ),
    NoEffect("models run without code of their own", "--trust-remote-code", "--model-impl"),
    NoEffect("tokenizers are fast ones, and token ids are taken too",
             "--skip-tokenizer-init --enable-tokenizer-batch-encode", "--tokenizer-mode"),
    NoEffect("models served here read text",
             "--enable-multimodal --keep-mm-feature-on-device --disable-fast-image-processor"),
    NoEffect("one front serves one engine", "", "--tokenizer-worker-num --detokenizer-worker-num"),
    NoEffect(
        "the engine chooses its kernels",
        "--enable-torch-compile --disable-cuda-graph-padding --enable-fp32-lm-head "
        "--enable-flashinfer-allreduce-fusion --disable-flashinfer-autotune --enable-profile-cuda-graph "
        "--disable-piecewise-cuda-graph --triton-attention-reduce-in-fp32",
        "--attention-backend --prefill-attention-backend --decode-attention-backend --sampling-backend "
        "--grammar-backend --fp8-gemm-backend --moe-runner-backend --cuda-graph-max-bs "
        "--torch-compile-max-bs --triton-attention-num-kv-splits",
        "--cuda-graph-bs",
    ),
    NoEffect("keys and values have the dtype of --dtype", "", "--kv-cache-dtype --quantization-param-path"),
    NoEffect(
        "the scheduler decides: by priority, then by arrival",
        "--disable-overlap-schedule --disable-chunked-prefix-cache --enable-two-batch-overlap "
        "--enable-single-batch-overlap --enable-prefill-delayer --abort-on-priority-when-disabled",
        "--schedule-policy --schedule-conservativeness --max-prefill-tokens --prefill-max-requests "
        "--radix-eviction-policy --num-reserved-decode-tokens --priority-scheduling-preemption-threshold "
        "--stream-interval --num-continuous-decode-steps --tbo-token-distribution-threshold",
    ),
    NoEffect(
        "KV pages are in one pool, and in no second cache",
        "--enable-hierarchical-cache --enable-memory-saver --enable-lmcache --disable-hybrid-swa-memory "
        "--disaggregation-decode-enable-offload-kvcache",
        "--hicache-ratio --hicache-size --hicache-write-policy --hicache-io-backend --hicache-mem-layout "
        "--hicache-storage-backend --hicache-storage-prefetch-policy --hicache-storage-backend-extra-config "
        "--swa-full-tokens-ratio --cpu-offload-gb",
    ),
    NoEffect(
        "there is one rank and no collective",
        "--enable-p2p-check --enable-dp-attention --enable-dp-lm-head --enable-nccl-nvls --enable-symm-mem "
        "--enable-mscclpp --prefill-round-robin-balance",
        "--dist-init-addr --nccl-init-addr --nccl-port --dist-timeout --load-balance-method --gpu-id-step "
        "--moe-dense-tp-size",
    ),
    NoEffect(
        "experts are computed where the engine is",
        "--enable-deepep-moe --enable-eplb --enable-ep-moe --disable-shared-experts-fusion "
        "--enable-expert-distribution-metrics",
        "--moe-a2a-backend --deepep-mode --deepep-config --ep-num-redundant-experts --ep-dispatch-algorithm "
        "--init-expert-location --eplb-algorithm --eplb-rebalance-num-iterations --elastic-ep-backend "
        "--expert-distribution-recorder-mode --expert-distribution-recorder-buffer-size",
    ),
    NoEffect(
        "every token is computed by the model itself; the answers are the same",
        "--enable-multi-layer-eagle",
        "--speculative-algorithm --speculative-draft-model-path --speculative-draft-model "
        "--speculative-draft-model-revision --speculative-num-steps --speculative-eagle-topk "
        "--speculative-num-draft-tokens --speculative-attention-mode --speculative-token-map "
        "--speculative-accept-threshold-single --speculative-accept-threshold-acc",
    ),
    NoEffect("digests and the prefix cache are on, unless --no-verify and --disable-radix-cache say otherwise",
             "--disaggregation-enable-kv-checksum --disaggregation-decode-enable-radix-cache"),
    NoEffect("a worker keeps the role it started with", "--enable-pd-role-switch"),
    NoEffect(
        "prefill and decode agree on it when they meet",
        "",
        "--disaggregation-ib-device --mooncake-ib-device --disaggregation-prefill-pp --disaggregation-decode-tp "
        "--disaggregation-decode-dp --disaggregation-decode-allocation-policy --disaggregation-decode-extra-slots "
        "--disaggregation-decode-retraction-backup --disaggregation-decode-polling-interval "
        "--disaggregation-decode-host-receive-threshold --optimistic-prefill-attempts",
    ),
    NoEffect("an engine that hangs fails its requests after 60 s", "", "--watchdog-timeout --soft-watchdog-timeout"),
    NoEffect("a request without a seed gets one of its own", "", "--random-seed"),
    NoEffect("blanks between JSON's tokens are bounded", "--constrained-json-disable-any-whitespace",
             "--constrained-json-whitespace-pattern"),
    NoEffect(
        "logs and metrics have one form",
        "--log-requests --show-time-cost --enable-metrics-for-all-schedulers --enable-mfu-metrics "
        "--enable-request-time-stats-logging --collect-tokens-histogram --enable-trace --export-metrics-to-file",
        "--log-level-http --log-requests-level --log-requests-format --decode-log-interval --crash-dump-folder "
        "--gc-warning-threshold-secs --otlp-traces-endpoint --export-metrics-to-file-dir --kv-events-config "
        "--weight-version --warmups",
        "--log-requests-target --uvicorn-access-log-exclude-prefixes --bucket-time-to-first-token "
        "--bucket-inter-token-latency --bucket-e2e-request-latency --prompt-tokens-buckets "
        "--generation-tokens-buckets",
    ),
)  # fmt: skip
ROUTER_SWITCHES = (NoEffect("the workers' roles say it", "--pd-disaggregation --mini-lb"),)


class Refused(NamedTuple):
    """Options whose promise this program does not keep; a value that promises nothing is let pass in silence."""

    remedy: str
    switches: str = ""
    values: str = ""
    nothing: str = ""
    """The value that asks for what is so anyway."""


ONE_RANK = "one rank per engine so far; start several workers and put `baton gateway` before them"
REFUSED = (
    Refused(ONE_RANK, "", "--pp-size --pipeline-parallel-size --ep-size --expert-parallel-size --ep --nnodes "
            "--attn-cp-size --moe-dp-size --dcp-size", "1"),
    Refused(ONE_RANK, "", "--node-rank", "0"),
    Refused("adapters are not served; merge them into the weights and serve the result", "--enable-lora",
            "--lora-paths --max-lora-rank --lora-target-modules --max-loras-per-batch --lora-backend"),
    Refused("only text is generated here; take a server for embeddings", "--is-embedding"),
    Refused("there is one key for all routes; give it with --api-key", "", "--admin-api-key"),
    Refused("the front speaks plain HTTP; put a proxy before it that speaks TLS", "",
            "--ssl-keyfile --ssl-certfile --ssl-ca-certs --ssl-keyfile-password"),
    Refused("the front speaks HTTP only", "--grpc-mode"),
    Refused("paths begin at /; let the proxy strip its own", "", "--fastapi-root-path"),
    Refused("write the options on the command line, or into BATON_WORKER_<OPTION>", "", "--config"),
    Refused("edit a copy of the model's config.json", "", "--json-model-override-args", "{}"),
    Refused("put it into the model's generation_config.json", "", "--preferred-sampling-params"),
    Refused("give the template's file with --chat-template", "", "--hf-chat-template-name"),
    Refused("/v1/completions takes the text as it is; send it complete", "", "--completion-template"),
    Refused("set HF_HOME, the Hub library's own setting", "", "--download-dir"),
    Refused("/generate streams are cumulative; take the OpenAI routes for pieces", "--incremental-streaming-output"),
    Refused("higher numbers go first here; negate them", "--schedule-low-priority-values-first"),
    Refused("an answer depends on its seed, but sums are rounded as the batch is cut; leave it out",
            "--enable-deterministic-inference"),
    Refused("tools are called by the client; leave it out", "", "--tool-server"),
    Refused("there is nothing but text to encode; serve this model elsewhere",
            "--encoder-only --language-only --language-model-only", "--encoder-urls"),
    Refused("prefill and decode are apart, not multiplexed; leave it out", "--enable-pdmux"),
)  # fmt: skip

OTHER_VALUES = {
    "--disaggregation-transfer-backend": {
        **dict.fromkeys(("mooncake", "nixl", "mori", "ascend", "fake"), "auto"),
        "mooncake_tcp": "tcp",
    },
    "--dtype": {"half": "float16", "float": "float32", "fp16": "float16", "bf16": "bfloat16"},
    "--load-format": dict.fromkeys(("safetensors", "pt"), "auto"),
    "--chunked-prefill-size": {"-1": str(2**20)},
    "--log-level": {"warn": "warning", "critical": "error"},
}
"""Values that are called otherwise here, or that the nearest thing here stands in for."""

GPU_ONLY = {"mem_fraction_static": "--mem-fraction-static", "base_gpu_id": "--base-gpu-id"}
"""Our own options that mean nothing to an engine on the CPU."""

LISTS = frozenset(name for row in NO_EFFECT for name in row.lists.split())
URL_LISTS = ("--prefill", "--decode", "--worker", "--worker-urls")


def notice(text: str) -> None:
    click.echo(f"note: {text}", err=True)


def foreign(no_effect: Sequence[NoEffect] = NO_EFFECT, refused: Sequence[Refused] = REFUSED) -> Callable[[Any], Any]:
    """A decorator that makes a command know options that are not ours: one line on stderr, or an error, for each. It
    stands above the decorators that give the command its own options."""

    def decorate(function: Any) -> Any:
        ours = {name for param in getattr(function, "__click_params__", ()) for name in param.opts}
        for name, is_switch, callback in (*_told(no_effect), *_refused(refused)):
            if name in ours:
                continue  # the command has an option of that name, which means the same
            option = click.option(name, is_flag=is_switch, hidden=True, expose_value=False, callback=callback)
            function = option(function)
        return function

    return decorate


Callback = Callable[[click.Context, click.Parameter, Any], None]


def _told(rows: Sequence[NoEffect]) -> Iterator[tuple[str, bool, Callback]]:
    for row in rows:

        def tell(ctx: click.Context, param: click.Parameter, value: Any, reason: str = row.reason) -> None:
            if value not in (None, False):
                notice(f"{param.opts[0]} has no effect: {reason}")

        yield from ((name, True, tell) for name in row.switches.split())
        yield from ((name, False, tell) for name in f"{row.values} {row.lists}".split())


def _refused(rows: Sequence[Refused]) -> Iterator[tuple[str, bool, Callback]]:
    for row in rows:

        def refuse(ctx: click.Context, param: click.Parameter, value: Any, row: Refused = row) -> None:
            if value not in (None, False, row.nothing):
                shown = param.opts[0] if value is True else f"{param.opts[0]} {value}"
                raise click.UsageError(f"{shown} is not supported: {row.remedy}", ctx)

        yield from ((name, True, refuse) for name in row.switches.split())
        yield from ((name, False, refuse) for name in row.values.split())


def tell_gpu_only(names: Mapping[str, str] = GPU_ONLY) -> None:
    """To be called in a command whose engines will be on the CPU."""
    context = click.get_current_context()
    for field, option in names.items():
        if context.get_parameter_source(field) not in (ParameterSource.DEFAULT, None):
            notice(f"{option} has no effect: the engine will be on the CPU")


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


def join_lists(arguments: Sequence[str]) -> list[str]:
    """`--cuda-graph-bs 1 2 4` for click: one value."""
    out: list[str] = []
    inside = False
    for argument in arguments:
        if argument.startswith("-"):
            inside = False
        if inside and out[-1] not in LISTS:
            out[-1] += f" {argument}"
        else:
            inside = inside or argument in LISTS
            out.append(argument)
    return out


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
