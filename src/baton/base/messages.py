"""Everything that crosses a process inside a worker, frozen, with one versioned codec.

    front ──▶ engine    Generate · Abort · Flush · Probe
    front ◀── engine    Ready · Tokens · Failed · Flushed · Load

The engine sees token ids only: text, templates and stop strings stay in the front. Times are seconds of
CLOCK_MONOTONIC, comparable between the processes of one host. Messages between prefill and decode workers are
in `baton.disagg.wire`, with the same codec.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Literal

import msgspec

from baton.base.errors import BatonError

VERSION = 1


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all messages: compact (arrays, not maps), tagged with the class name."""


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """A constraint on the output. `json_schema` and `json_object` hold JSON text, `regex` a pattern, `ebnf` a Lark
    grammar, `structural_tag` llguidance's own grammar JSON."""

    kind: Literal["json_schema", "json_object", "regex", "ebnf", "choice", "structural_tag"]
    source: str


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """What the user asked for, validated (`baton.api.sampling`), never rewritten on the way.

    `seed` is always set when it reaches an engine: the front draws one if the user gave none, so that P, D and
    any later attempt agree. The draw for a token depends on (seed, position) alone.
    """

    max_tokens: int
    seed: int = 0
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1  # -1 or 0: all
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none. 0: the chosen token's. k: and the k most likely."""
    prompt_logprobs: int | None = None
    """As `logprobs`, for prompt positions; such a request does not use the prefix cache."""
    prompt_logprobs_start: int = 0
    grammar: Grammar | None = None

    def end(self, token: int, count: int, eos_token_ids: Container[int]) -> Finish | None:
        """Is `token`, the output's token number `count` (from 1), its last one, and why?"""
        if count >= self.min_tokens:
            if token in self.stop_token_ids:
                return Finish("stop", token)
            if token in eos_token_ids and not self.ignore_eos:
                return Finish("stop", token)
        return Finish("length") if count >= self.max_tokens else None


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """The rendezvous of one attempt: who prefills, and the room both sides meet in (0 <= room < 2**63)."""

    room: int
    host: str
    port: int
    prefill_dp_rank: int | None = None


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    logprob: float | None
    token: int
    top: tuple[tuple[float, int], ...] = ()
    """(logprob, token), most likely first."""


class Usage(msgspec.Struct, frozen=True, array_like=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    retractions: int = 0


class Finish(msgspec.Struct, frozen=True, array_like=True):
    """`stop` with the matched token id (None when the front matched a string), or `length`."""

    reason: Literal["stop", "length"]
    matched_token: int | None = None


class Timeline(msgspec.Struct, frozen=True, array_like=True):
    """When the stages of a request's life began, stamped once where they happen; 0.0 = did not happen.

    TTFT, Prometheus histograms, traces and `meta_info` are all derived from these.
    """

    received: float = 0.0
    """The engine got it."""
    scheduled: float = 0.0
    """The first forward step with its tokens started (P, unified)."""
    prefilled: float = 0.0
    """The prompt is computed (P, unified)."""
    offered: float = 0.0
    """D: pages reserved and offered. P: the offer arrived."""
    delivered: float = 0.0
    """P: the last byte was written. D: the manifest was verified."""
    first_token: float = 0.0
    finished: float = 0.0


# --- front -> engine -------------------------------------------------------------------------------------------


class Generate(Message, frozen=True, array_like=True, tag=True):
    """One sequence (a request with n=3 is three of these)."""

    id: str
    tokens: tuple[int, ...]
    sampling: Sampling
    ticket: Ticket | None = None
    priority: int = 0
    cache_salt: str = ""
    deadline: float | None = None
    resumed: int = 0
    """How many of `tokens`, the last ones, are output that another worker has generated: it goes on after them. All
    that counts output (`max_tokens`, penalties, usage, the draws' positions) counts them."""


class Abort(Message, frozen=True, array_like=True, tag=True):
    """Forget the sequence, in whatever stage it is. Idempotent; answered by `Failed(code="cancelled")` if it lived."""

    id: str


class Flush(Message, frozen=True, array_like=True, tag=True):
    """Empty the prefix cache. Answered by `Flushed`."""

    id: str


class Probe(Message, frozen=True, array_like=True, tag=True):
    """Answered by `Load`: is the loop alive, and how busy?"""

    id: str


# --- engine -> front -------------------------------------------------------------------------------------------


class Ready(Message, frozen=True, array_like=True, tag=True):
    """The model is loaded and the loop runs: what the front needs to know to serve."""

    model_path: str
    architectures: tuple[str, ...]
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    page_size: int
    num_pages: int
    dtype: str
    weight_dtype: str
    device: str
    mode: str
    instance: str
    """Random for every start: a restarted engine is another instance."""
    pid: int = 0
    bootstrap_port: int = 0
    transports: tuple[str, ...] = ()


class Tokens(Message, frozen=True, array_like=True, tag=True):
    """New tokens of a sequence, in order. The first one carries a `timeline` as far as it is known, the last one
    `finish`, `usage` and all of the `timeline`."""

    id: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """With the first message only, if asked for."""
    cached_tokens: int = 0
    finish: Finish | None = None
    usage: Usage | None = None
    timeline: Timeline | None = None


class Failed(Message, frozen=True, array_like=True, tag=True):
    """The end of a sequence that did not work out."""

    id: str
    status: int
    code: str
    message: str
    retryable: bool = False
    retry_after: float | None = None
    param: str | None = None

    @classmethod
    def of(cls, id: str, error: BatonError) -> Failed:
        return cls(id, error.status, error.code, error.message, error.retryable, error.retry_after, error.param)

    def error(self) -> BatonError:
        """The error as an exception again, for the process that received it."""
        error = BatonError(self.message, param=self.param)
        error.status, error.code = self.status, self.code  # instance attributes over the class's
        error.retryable, error.retry_after = self.retryable, self.retry_after
        return error


class Flushed(Message, frozen=True, array_like=True, tag=True):
    id: str
    ok: bool
    pages: int = 0


class Load(Message, frozen=True, array_like=True, tag=True):
    """The state of one engine; sent on `Probe` and at least once a second while it works."""

    id: str = ""
    running: int = 0
    waiting: int = 0
    """For pages or a place, `handoffs_waiting` included."""
    waiting_tokens: int = 0
    """Of prompts that have no KV here yet."""
    handoffs: int = 0
    """Sequences between prefill and decode: waiting for the peer, or moving."""
    free_pages: int = 0
    cached_pages: int = 0
    """Free, but holding a prefix that may be hit."""
    total_pages: int = 0
    quarantined_pages: int = 0
    """Not reusable yet: a peer may still write to them."""
    prompt_tokens: int = 0
    """Counters since start from here on."""
    cached_tokens: int = 0
    generated_tokens: int = 0
    retractions: int = 0
    steps: int = 0
    busy_seconds: float = 0.0
    handoffs_done: int = 0
    handoffs_failed: int = 0
    handoff_bytes: int = 0
    handoff_seconds: float = 0.0
    handoffs_waiting: int = 0
    """Now, on D: requests that pages for their prompts, computed elsewhere, are not reserved for yet."""


ToEngine = Generate | Abort | Flush | Probe
ToFront = Ready | Tokens | Failed | Flushed | Load


class CodecError(Exception):
    """The peer speaks another version, or not our language at all."""


class Codec:
    """Messages to bytes and back: one version byte, then msgpack. Nothing is ever unpickled."""

    def __init__(self, accepts: Any, version: int = VERSION) -> None:
        self._version = bytes([version])
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(accepts)

    def encode(self, message: Message) -> bytes:
        return self._version + self._encoder.encode(message)

    def decode(self, data: bytes | bytearray | memoryview) -> Any:
        """Raises `CodecError` with what was expected and what came."""
        if bytes(data[:1]) != self._version:
            raise CodecError(f"peer speaks version {bytes(data[:1])!r} of the message format, we {self._version!r}")
        try:
            return self._decoder.decode(memoryview(data)[1:])
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise CodecError(f"not a message we know: {error}") from error
