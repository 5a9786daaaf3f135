"""What a measurement is: every option of `baton bench`, each with its default."""

from __future__ import annotations

import math
from dataclasses import dataclass

from baton.base.config import check_choices, option
from baton.base.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """Load on one server, and what is measured of it."""

    url: str = option("http://127.0.0.1:8000", "base URL of the server", flags=("--base-url",))
    model: str = option("", "model name to ask for; empty: the first of /v1/models")
    api_key: str = option("", "bearer token to send; empty: none", secret=True)
    endpoint: str = option(
        "completions",
        "completions: /v1/completions; chat: /v1/chat/completions; generate: SGLang's /generate",
        choices=("completions", "chat", "generate"),
    )
    prompt_format: str = option(
        "ids",
        "completions and generate: token ids (exact lengths) or text (one common word per token, about); chat is text",
        choices=("ids", "text"),
    )
    stream: bool = option(True, "stream the answers; without it only end-to-end times exist")
    dataset: str = option(
        "synthetic",
        "synthetic; a trace that comes along: azure-conversation, azure-code, mooncake-conversation; "
        "or the path of a trace (.csv, .jsonl)",
    )
    input_len: str = option("512", "synthetic prompts, tokens: 512, 256-1024 (uniform) or 512~64 (normal)")
    output_len: str = option("64", "synthetic answers, tokens: as input-len")
    shared_prefix: float = option(0.0, "synthetic: share (0 to 1) of every prompt that its group has in common")
    prefix_groups: int = option(1, "synthetic: how many different shared prefixes there are")
    length_scale: float = option(1.0, "multiply all lengths (traces made for big machines: 0.0625)")
    max_input_len: int = option(0, "cut longer prompts, tokens; 0: as they are")
    max_output_len: int = option(0, "cut longer answers, tokens; 0: as they are")
    vocab: int = option(30_000, "prompt token ids are drawn below this; not above the model's vocabulary")
    rate: str = option(
        "inf", "requests per second; inf: at once; trace: at the trace's own times", flags=("--request-rate",)
    )
    arrivals: str = option(
        "poisson", "gaps between requests at a rate: poisson (exponential) or fixed", choices=("poisson", "fixed")
    )
    trace_speed: float = option(1.0, "rate=trace: how many times faster than recorded")
    concurrency: int = option(
        0,
        "requests in flight at most; 0: no limit. A request that had to wait for it counts as sent late",
        flags=("--max-concurrency",),
    )
    requests: int = option(100, "requests to send", flags=("--num-prompts",))
    duration: float = option(0.0, "stop sending after so many seconds; 0: after all requests")
    warmup: int = option(2, "requests sent before, one by one, and not counted")
    ignore_eos: bool = option(True, "answers have exactly the asked length (another length is an error)")
    temperature: float = option(0.0, "sampling temperature")
    seed: int = option(0, "of arrivals, lengths and prompts")
    extra_body: str = option("", "JSON object merged into every request")
    timeout: float = option(600.0, "seconds a request may take")
    connect_timeout: float = option(10.0, "seconds to connect")
    slo_ttft: float = option(0.0, "goodput: time to first token at most, ms; 0: not judged")
    slo_tpot: float = option(0.0, "goodput: time per output token at most, ms; 0: not judged")
    slo_itl: float = option(0.0, "goodput: longest gap between chunks at most, ms; 0: not judged")
    save: str = option("", "write one JSON line per request into this file")
    label: str = option("", "name of this run in the report")
    quiet: bool = option(False, "print the JSON line only")

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("requests", "prefix_groups"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("concurrency", "warmup", "max_input_len", "max_output_len", "duration", "temperature"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name in ("slo_ttft", "slo_tpot", "slo_itl"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more milliseconds")
        for name in ("length_scale", "trace_speed", "timeout", "connect_timeout"):
            _check(name, getattr(self, name), getattr(self, name) > 0, "more than 0")
        _check("shared_prefix", self.shared_prefix, 0 <= self.shared_prefix <= 1, "between 0 and 1")
        _check("vocab", self.vocab, self.vocab >= 2, "at least 2")
        parse_rate(self.rate)
        if self.rate == "trace" and self.dataset == "synthetic":
            raise ConfigError("rate is trace, but the dataset is synthetic and has no times; give a trace or a number")


def _check(name: str, value: object, good: bool, allowed: str) -> None:
    if not good:
        raise ConfigError(f"{name} is {value}; it must be {allowed}")


def parse_rate(text: str) -> float | None:
    """Requests per second (`math.inf` for "inf"), or None for "trace". Raises `ConfigError`."""
    if text == "trace":
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not rate > 0:
        raise ConfigError(f'rate is "{text}"; it must be a number above 0 (requests per second), inf or trace')
    return rate
