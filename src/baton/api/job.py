"""What one HTTP request asks of an engine, in any dialect: prompts, plans and rooms, one sequence per sample."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec

from baton.api.chat import ChatTemplate
from baton.api.reasoning import ReasoningFormat
from baton.api.sampling import MAX_ROOM, NO_DEFAULTS, Defaults, Plan, derived
from baton.api.text import TextCodec
from baton.api.tool_calls import ToolFormat
from baton.base.clock import Clock, MonotonicClock
from baton.base.errors import BadRequest, NotFound
from baton.base.messages import Generate, Sampling, Ticket

MAX_SEQUENCES = 1024
"""Sequences of one HTTP request: prompts times samples."""
UNNAMED = ("default", "unknown")
"""In `model`: whatever is served. The first is SGLang's, the second what its router writes when a client said none."""


@dataclass(frozen=True, slots=True)
class ModelContext:
    """What the formats need to know of the model and the worker behind them."""

    names: tuple[str, ...]
    """Accepted in `model`; the first one is what answers say."""
    tokenizer: TextCodec
    chat: ChatTemplate
    vocab_size: int
    longest: int
    """Tokens of prompt and output together that the engine can hold."""
    eos_token_ids: tuple[int, ...] = ()
    defaults: Defaults = NO_DEFAULTS
    tools: ToolFormat | None = None
    """How the model writes calls of tools; None: they stay text."""
    reasoning: ReasoningFormat | None = None
    """How it marks its thoughts; None: they stay text."""
    bootstrap_host: str = "127.0.0.1"
    bootstrap_port: int = 8998
    fingerprint: str = "baton"
    clock: Clock = field(default_factory=MonotonicClock)

    @property
    def name(self) -> str:
        return self.names[0]

    def check_model(self, model: str | None) -> None:
        if model and model not in self.names and model not in UNNAMED:
            raise NotFound(f'the model "{model}" is not served here; served: {self.name}', param="model")


@dataclass(frozen=True, slots=True)
class Prompt:
    tokens: tuple[int, ...]
    text: str | None = None
    """As the client sent it (completions with echo)."""


class Resumed(msgspec.Struct):
    """What was shown of one sequence."""

    tokens: list[int]
    finished: bool = False


class Resume(msgspec.Struct, kw_only=True):
    """A stream that broke off on another worker, one output per sequence; what its events said of themselves, if it is
    known; and what its journal's headers said (`x-baton-seed`)."""

    outputs: list[Resumed]
    id: Annotated[str, msgspec.Meta(min_length=1, max_length=256)] | None = None
    created: int | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, le=MAX_ROOM - 1)] | None = None


class PDFields(msgspec.Struct, kw_only=True):
    """The fields a router adds; each a value for all, or a list."""

    bootstrap_host: str | list[str | None] | None = None
    bootstrap_port: int | list[int | None] | None = None
    bootstrap_room: int | list[int | None] | None = None
    routed_dp_rank: int | None = None
    data_parallel_rank: int | None = None
    disagg_prefill_dp_rank: int | list[int | None] | None = None
    prefill_data_parallel_rank: int | list[int | None] | None = None
    baton_resume: Resume | None = None


@dataclass(slots=True)
class Job:
    """The request, ready for the engine: sequence k is sample k % n of prompt k // n.

    `plans` has one entry per prompt, and all have the same `n`.
    """

    prompts: list[Prompt]
    plans: list[Plan]
    tickets: list[Ticket | None]
    stream: bool
    rids: list[str]
    """One per prompt."""
    default_tokens: int | None = None
    """Output tokens if the client named no number; None: as many as fit."""
    priority: int = 0
    cache_salt: str = ""
    resume: Resume | None = None
    cumulative_logprobs: bool = False
    """Every event repeats the logprobs of the ones before."""
    seed: int = field(init=False)
    """What seeds are derived from where the client gave none."""

    def __post_init__(self) -> None:
        """Both workers of a pair must come to the same seed: from what is resumed, else from the room, which both
        have; who is alone draws it."""
        room = next((ticket.room for ticket in self.tickets if ticket is not None), None)
        if self.resume is not None and self.resume.seed is not None:
            self.seed = self.resume.seed
        else:
            self.seed = secrets.randbits(63) if room is None else derived(room, 1)

    @property
    def n(self) -> int:
        return self.plans[0].n

    @property
    def continuable(self) -> bool:
        """Another worker could go on with its stream, knowing only the tokens it has shown."""
        scored = any(plan.scored_only or plan.sampling.prompt_logprobs is not None for plan in self.plans)
        return not scored and not self.cumulative_logprobs

    def sampling(self, k: int, context: ModelContext) -> Sampling:
        """Of sequence k."""
        which, index = divmod(k, self.n)
        return self.plans[which].sample(
            index,
            len(self.prompts[which].tokens),
            derived(self.seed, k),
            longest=context.longest,
            default=self.default_tokens,
        )

    def generates(self, ids: Sequence[str], context: ModelContext) -> list[Generate]:
        """The engine's messages, one per sequence."""
        return [self._generate(k, id, context) for k, id in enumerate(ids)]

    def _generate(self, k: int, id: str, context: ModelContext) -> Generate:
        before = () if self.resume is None else tuple(self.resume.outputs[k].tokens)
        return Generate(
            id,
            self.prompts[k // self.n].tokens + before,
            self.sampling(k, context),
            self.tickets[k],
            self.priority,
            self.cache_salt,
            resumed=len(before),
        )


def count_sequences(prompts: int, n: int) -> int:
    """Raises `BadRequest` if one request asks for too many."""
    if prompts * n > MAX_SEQUENCES:
        raise BadRequest(f"{prompts} prompts with n={n} are more than {MAX_SEQUENCES} sequences", param="n")
    return prompts * n


def tickets(fields: PDFields, prompts: int, n: int, context: ModelContext) -> list[Ticket | None]:
    """One ticket (or None) per sequence, prompt by prompt, sample by sample.

    * a single room r: sequence k meets in r + k;
    * as many rooms as sequences: one each;
    * as many rooms as prompts, n > 1: sample 0 keeps the prompt's room, the others' are derived from it;
    * no room: no ticket, the worker does it alone (a prefill worker refuses).
    """
    total = prompts * n
    if (fields.routed_dp_rank or fields.data_parallel_rank or 0) != 0:
        raise BadRequest("routed_dp_rank: this worker has one rank, 0", param="routed_dp_rank")
    if fields.bootstrap_room is None:
        return [None] * total
    rooms = _rooms(fields.bootstrap_room, prompts, n)
    hosts = _spread("bootstrap_host", fields.bootstrap_host, prompts, n)
    ports = _spread("bootstrap_port", fields.bootstrap_port, prompts, n)
    rank_field = fields.disagg_prefill_dp_rank
    if rank_field is None:
        rank_field = fields.prefill_data_parallel_rank
    ranks = _spread("disagg_prefill_dp_rank", rank_field, prompts, n)
    for port in ports:
        if port is not None and not 0 <= port < 65536:
            raise BadRequest(f"bootstrap_port is {port}; it must be a port number or null", param="bootstrap_port")
    return [
        None
        if room is None
        else Ticket(room, host or context.bootstrap_host, context.bootstrap_port if port is None else port, rank)
        for room, host, port, rank in zip(rooms, hosts, ports, ranks, strict=True)
    ]


def _rooms(value: int | list[int | None], prompts: int, n: int) -> list[int | None]:
    given = value if isinstance(value, list) else [value]
    for room in given:
        if room is not None and not 0 <= room < MAX_ROOM:
            raise BadRequest(
                f"bootstrap_room is {room}; it must be at least 0 and less than 2**63", param="bootstrap_room"
            )
    if not isinstance(value, list):
        return [(value + k) % MAX_ROOM for k in range(prompts * n)]
    if len(value) == prompts * n:
        return value
    if len(value) == prompts:
        return [None if room is None else derived(room, i) for room in value for i in range(n)]
    raise _wrong_length("bootstrap_room", len(value), prompts, n)


def _spread(name: str, value: Any, prompts: int, n: int) -> list[Any]:
    if not isinstance(value, list):
        return [value] * (prompts * n)
    if len(value) == prompts * n:
        return value
    if len(value) == prompts:
        return [item for item in value for _ in range(n)]
    raise _wrong_length(name, len(value), prompts, n)


def _wrong_length(name: str, length: int, prompts: int, n: int) -> BadRequest:
    samples = f", or one per sample ({prompts * n})" if n > 1 else ""
    return BadRequest(f"{name} has {length} entries; it takes one per prompt ({prompts}){samples}", param=name)


def prompt_of(value: str | Sequence[int], context: ModelContext, param: str, *, special: bool = True) -> Prompt:
    """Encode and check one prompt. Raises `BadRequest`: empty, too long, ids outside the vocabulary."""
    if isinstance(value, str):
        least = context.tokenizer.least_tokens(value)
        if least > context.longest:
            raise _too_long(f"at least {least}", context.longest, param)
        tokens: Sequence[int] = context.tokenizer.encode(value, special=special)
        text: str | None = value
    else:
        tokens, text = value, None
        if tokens and not (min(tokens) >= 0 and max(tokens) < context.vocab_size):
            raise BadRequest(f"token ids must be at least 0 and less than {context.vocab_size}", param=param)
    if not tokens:
        raise BadRequest("the prompt is empty", param=param)
    if len(tokens) >= context.longest:
        raise _too_long(str(len(tokens)), context.longest, param)
    return Prompt(tuple(tokens), text)


def _too_long(length: str, longest: int, param: str) -> BadRequest:
    return BadRequest(
        f"the prompt has {length} tokens; this model's context holds {longest}, output included", param=param
    )


FinishKind = Literal["stop", "length", "abort"]
