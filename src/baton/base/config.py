"""One frozen dataclass per room; every default stands here once.

The command line, the docs' tables and the tests read these. "auto" values are resolved in one place each
(`baton.engine.load.resolve`), never by mutating a config.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from baton.base.errors import ConfigError


def option(
    default: Any,
    help: str,
    *,
    flags: tuple[str, ...] = (),
    choices: tuple[str, ...] | None = None,
    secret: bool = False,
) -> Any:
    """A field with what the command line needs: help, other spellings (SGLang's), allowed values. A secret is not shown
    when the configuration is printed."""
    metadata = {"help": help, "flags": flags, "choices": choices}
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)


def check_choices(config: Any) -> None:
    """Raises `ConfigError` naming the field and what it may be."""
    for field in dataclasses.fields(config):
        choices = field.metadata.get("choices")
        value = getattr(config, field.name)
        if choices is not None and value not in choices:
            raise ConfigError(f"{field.name} is {value!r}; allowed: {', '.join(choices)}")


def check_positive(config: Any, *names: str) -> None:
    """Raises `ConfigError` naming the field."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be greater than 0")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine: a model, its KV pool and its loop."""

    model: str = option("smollm2-135m", "local directory, Hub id or short name", flags=("--model-path",))
    revision: str = option("", "branch, tag or commit of a model from the Hub; empty: its main branch")
    tokenizer_path: str = option(
        "", "directory or Hub id whose tokenizer and chat template are used; empty: the model's own"
    )
    load_format: str = option(
        "auto", "auto: safetensors; dummy: random weights from config.json", choices=("auto", "dummy")
    )
    device: str = option("auto", "cpu, cuda or cuda:N; auto takes a GPU where there is one")
    dtype: str = option(
        "auto",
        "dtype of activations and KV; auto: float32 on CPU, the model's own on GPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    weight_dtype: str = option(
        "auto",
        "dtype of the linear layers' weights: auto (as dtype), bfloat16 or int8",
        choices=("auto", "bfloat16", "int8"),
        flags=("--quantization",),
    )
    page_size: int = option(16, "tokens per KV page")
    kv_pages: int = option(0, "pages in the KV pool; 0: as many as mem-fraction-static or kv-cache-gb admit")
    max_total_tokens: int = option(
        0, "tokens the KV pool holds at most, in whole pages; 0: see kv-pages; on a GPU never more than fit"
    )
    kv_cache_gb: float = option(0.0, "size of the KV pool in GiB; 0: from mem-fraction-static (GPU), 1 GiB (CPU)")
    mem_fraction_static: float = option(0.85, "GPU: share of the memory for weights and KV pool together")
    max_model_len: int = option(
        0, "longest prompt + output, tokens; 0: the model's own, or what the pool holds", flags=("--context-length",)
    )
    max_running_requests: int = option(64, "sequences decoded at the same time")
    max_queued_requests: int = option(256, "sequences that may wait; one more is refused with 503")
    chunked_prefill_size: int = option(512, "prompt tokens computed per step at most")
    prefix_caching: bool = option(True, "reuse the KV pages of equal prefixes")
    threads: int = option(0, "CPU threads for the model; 0: the cores this process may use")
    cuda_graphs: bool = option(True, "GPU: replay decode steps as CUDA graphs")
    tp_size: int = option(1, "tensor-parallel ranks", flags=("--tensor-parallel-size", "--tp"))
    dp_size: int = option(1, "data-parallel engines", flags=("--data-parallel-size", "--dp"))
    base_gpu_id: int = option(0, "first GPU to use")

    def __post_init__(self) -> None:
        check_choices(self)
        if self.page_size < 1:
            raise ConfigError(f"page_size is {self.page_size}; it must be at least 1")
        if self.chunked_prefill_size < 1:
            raise ConfigError(f"chunked_prefill_size is {self.chunked_prefill_size}; it must be at least 1")
        if self.max_total_tokens and self.kv_pages:
            raise ConfigError("max_total_tokens and kv_pages both say how large the KV pool is; give one of them")
        if self.max_total_tokens and self.max_total_tokens < self.page_size:
            raise ConfigError(
                f"max_total_tokens is {self.max_total_tokens}; it must be 0 or at least the page size, {self.page_size}"
            )
        for name in ("tp_size", "dp_size"):
            if getattr(self, name) != 1:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; this version runs one rank per engine, "
                    "start several workers instead"
                )


@dataclass(frozen=True, slots=True)
class DisaggConfig:
    """The role of an engine and how it meets its peers."""

    mode: str = option(
        "null",
        "null: prefill and decode in one; prefill; decode",
        choices=("null", "prefill", "decode"),
        flags=("--disaggregation-mode",),
    )
    transport: str = option(
        "auto",
        "how pages travel: auto picks shm on one host, else tcp",
        choices=("auto", "shm", "tcp"),
        flags=("--disaggregation-transfer-backend",),
    )
    bootstrap_host: str = option(
        "127.0.0.1", "address the prefill worker's rendezvous listens on; not given: the one of --host"
    )
    bootstrap_port: int = option(
        8998, "port of the prefill worker's rendezvous; 0: any free one", flags=("--disaggregation-bootstrap-port",)
    )
    meet_timeout: float = option(30.0, "seconds prefill and decode wait for each other in a room")
    move_timeout: float = option(30.0, "seconds without progress before a moving hand-off is given up")
    drain_timeout: float = option(10.0, "seconds a lost hand-off's pages stay quarantined if the peer says nothing")
    max_handoffs: int = option(256, "sequences between prefill and decode at once; more wait or are refused")
    verify: bool = option(True, "check the digest of every page that arrives")

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """The front of a worker: HTTP and text."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(30000, "port to listen on")
    served_model_name: str = option("", "model name in the API; empty: the model as given")
    api_key: str = option("", "bearer token that requests must carry; empty: none", secret=True)
    chat_template: str = option("", "Jinja file that replaces the model's chat template")
    tool_call_parser: str = option(
        "none",
        "how the model writes calls of tools; none: they stay text",
        choices=("none", "hermes", "qwen", "qwen25", "llama3", "llama3_json", "mistral", "pythonic"),
    )
    reasoning_parser: str = option(
        "none",
        "how the model marks its thoughts; none: they stay text",
        choices=("none", "deepseek-r1", "qwen3", "qwen3-thinking"),
    )
    sampling_defaults: str = option(
        "model",
        "what a request gets that says nothing: model (its generation_config.json) or openai (temperature 1, top_p 1)",
        choices=("model", "openai"),
    )
    request_timeout: float = option(
        600.0, "seconds until an unfinished request is cut; the header x-request-timeout may allow less, not more"
    )
    max_body_mb: float = option(8.0, "larger request bodies get 413")
    register: tuple[str, ...] = option((), "gateway that shall send requests here, http://HOST:PORT; may be repeated")
    advertise_url: str = option("", "URL at which gateways reach this worker; empty: from --host and --port")
    register_key: str = option("", "bearer token for the gateways' /workers; also @FILE", secret=True)
    register_ttl: float = option(15.0, "seconds after which a gateway forgets this worker if it hears nothing of it")
    log_level: str = option("info", "debug, info, warning or error", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, "request_timeout", "register_ttl")


POLICIES = (
    "round_robin",
    "random",
    "least_loaded",
    "power_of_two",
    "cache_aware",
    "consistent_hash",
    "sticky",
    "bucket",
)


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """The door in front of prefill and decode workers."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on")
    api_key: str = option(
        "", "bearer token that requests must carry; also BATON_API_KEY, @FILE; empty: none", secret=True
    )
    admin_api_key: str = option(
        "", "key for /workers, /flush_cache and the like; also BATON_ADMIN_API_KEY, @FILE", secret=True
    )
    api_keys: str = option("", "TOML file of keys with roles and limits (docs/overload.md)")
    worker_api_key: str = option(
        "", "bearer token sent to workers; empty: the client's own header passes; also @FILE", secret=True
    )
    tls_cert: str = option("", "PEM file of the certificate and its chain; empty: plain HTTP")
    tls_key: str = option("", "PEM file of the certificate's key")
    tls_client_ca: str = option("", "PEM file; clients must have a certificate that these authorities signed")
    policy: str = option("round_robin", "how workers are chosen", choices=POLICIES)
    prefill_policy: str = option("", "policy for prefill workers; empty: as --policy")
    decode_policy: str = option("", "policy for decode workers; empty: as --policy")
    split: str = option(
        "auto",
        "divide requests between prefill and decode workers; auto: where it pays",
        choices=("auto", "always", "never"),
    )
    connector: str = option(
        "",
        "how the vLLM workers given at the start hand over KV cache; empty: nixl",
        choices=("", "nixl", "nixl-push", "mooncake"),
    )
    min_split_tokens: int = option(64, "prompts with fewer uncached tokens are not divided (with --split auto)")
    request_timeout: float = option(
        600.0, "seconds until an unfinished request is cut; the header x-request-timeout may allow less, not more"
    )
    stall_timeout: float = option(30.0, "seconds without a byte in the middle of a stream until its worker is given up")
    stage_timeout: float = option(
        30.0, "seconds for the first token of a pair, more for long prompts, until it is given up"
    )
    worker_wait: float = option(10.0, "seconds to wait for a usable worker, if there was one lately")
    retries: int = option(3, "further attempts after a failure the client has not seen anything of")
    connect_timeout: float = option(2.0, "seconds to reach a worker")
    health_interval: float = option(2.0, "seconds between health checks of a worker")
    health_timeout: float = option(5.0, "seconds a health check may take")
    health_failures: int = option(2, "failed checks in a row that take a worker out")
    breaker_failures: int = option(3, "failed requests in a row that take a worker out for a while")
    drain_timeout: float = option(30.0, "seconds that requests in progress may take when the gateway is told to stop")
    max_concurrent_requests: int = option(4096, "requests at once, waiting ones included; one more gets 429")
    max_inflight_prompt_tokens: int = option(131_072, "prompt tokens in flight per usable prefill worker; 0: unbounded")
    max_inflight_prefills: int = option(256, "requests in flight per usable prefill worker; 0: unbounded")
    max_inflight_sequences: int = option(256, "sequences in flight per usable decode worker; 0: unbounded")
    queue_size: int = option(1024, "requests that may wait; one more gets 429")
    queue_timeout: float = option(30.0, "seconds a request may wait; who would wait longer gets 429 at once")
    ttft_objective: float = option(0.0, "seconds; who would wait longer gets 429 at once; 0: none")
    priority_ageing: float = option(5.0, "seconds without a turn after which a lower priority has one")
    max_body_mb: float = option(8.0, "larger request bodies get 413")
    processes: int = option(1, "processes that serve this port; limits and loads are per process")
    reuse_port: bool = option(False, "share the port with another gateway, to take over from it without a gap")
    log_level: str = option("info", "debug, info, warning or error", choices=("debug", "info", "warning", "error"))
    log_format: str = option("text", "of the log's lines", choices=("text", "json"))
    request_log: str = option(
        "errors",
        "a line per finished request; errors: for those that failed, were repeated or went on elsewhere",
        choices=("none", "errors", "all"),
    )
    otlp_endpoint: str = option("", "URL of an OpenTelemetry collector (OTLP over HTTP) that gets a trace per request")

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, "request_timeout", "processes")
        if bool(self.tls_cert) != bool(self.tls_key) or (self.tls_client_ca and not self.tls_cert):
            raise ConfigError("TLS wants both tls_cert and tls_key")
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"otlp_endpoint is {self.otlp_endpoint!r}; write http://HOST:PORT")
