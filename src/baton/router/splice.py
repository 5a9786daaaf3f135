"""Bodies as bytes: read what routing needs in one cheap pass, write the P/D fields between the last value and the `}`.

The rest of the body is never decoded and never re-encoded, so every field the gateway does not know reaches the worker
as the client wrote it. Only a client that sends P/D fields itself costs more: these are taken out first (all
occurrences, in any spelling of the key), because a body with two `bootstrap_room` means different things to
different parsers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from baton.base.errors import BadRequest

Kind = Literal["generate", "completions", "other"]
"""What the fields mean: `/generate`, `/v1/completions`, or any body whose only multiplicity is `n`."""
Merge = Literal["", "generate", "completions"]

MAX_SAMPLES = 1024
_UNSET = msgspec.UNSET
_Raw = msgspec.Raw | msgspec.UnsetType

OURS = (
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "kv_transfer_params",
    "ec_transfer_params",
    "baton_resume",
)
"""Fields that only a gateway may write: what a client says there is taken out. With `kv_transfer_params` a client could
stop a vLLM server, or read from another one's memory."""


class _Fields(msgspec.Struct):
    stream: Any = False
    model: Any = None
    priority: Any = 0
    n: Any = 1
    max_tokens: Any = None
    max_completion_tokens: Any = None
    echo: Any = None
    logprobs: Any = None
    return_logprob: Any = None
    messages: _Raw = _UNSET
    prompt: _Raw = _UNSET
    text: _Raw = _UNSET
    input_ids: _Raw = _UNSET
    input_embeds: _Raw = _UNSET
    sampling_params: _Raw = _UNSET
    bootstrap_host: _Raw = _UNSET
    bootstrap_port: _Raw = _UNSET
    bootstrap_room: _Raw = _UNSET
    kv_transfer_params: _Raw = _UNSET
    ec_transfer_params: _Raw = _UNSET
    baton_resume: _Raw = _UNSET
    vllm_xargs: _Raw = _UNSET
    routed_dp_rank: _Raw = _UNSET
    disagg_prefill_dp_rank: _Raw = _UNSET


class _Sampling(msgspec.Struct):
    n: Any = 1
    max_new_tokens: Any = None


class _Model(msgspec.Struct):
    model: str = ""


_MODEL = msgspec.json.Decoder(_Model)
_FIELDS = msgspec.json.Decoder(_Fields)
_SAMPLING = msgspec.json.Decoder(_Sampling | list[_Sampling])
_ITEMS = msgspec.json.Decoder(list[msgspec.Raw])
_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_OPENING = re.compile(rb"[\s\[]*\"?")
_ALMOST_JSON = re.compile(rb"[\s\0\xef\xbb\xbf\xfe\xff]*[\[{]")
"""How an object begins in any encoding that a lenient parser finds out."""


class Body(msgspec.Struct, frozen=True):
    """A request body and what was read from it."""

    raw: bytes
    stream: bool
    samples: int | None
    """None: one sequence (scalar fields). Else the number of sequences, batch x n, in sample-major order."""
    prompt_tokens: int
    """Estimate: a token is about four bytes."""
    max_tokens: int
    """Tokens that may be generated, over all sequences; an estimate where the client said nothing."""
    merge: Merge
    """The client asked for prompt logprobs, which only the prefill worker has."""
    claimed: bool
    """The client wrote fields that are ours to write."""
    ranks: bool
    """The client chose data-parallel ranks."""
    model: str = ""
    prompt: bytes = b""
    """JSON, as the client wrote it."""
    priority: int = 0


def read(raw: bytes, kind: Kind) -> Body:
    """Raises `BadRequest` if `raw` is not a JSON object, or asks for more than `MAX_SAMPLES` sequences."""
    try:
        fields = _FIELDS.decode(raw)
        claimed = _claimed(fields) or _smuggles(fields.vllm_xargs)
        ranks = fields.routed_dp_rank is not _UNSET or fields.disagg_prefill_dp_rank is not _UNSET
        if claimed or ranks:
            _OBJECT.decode(raw)  # `pair` will: now is the time to find a key that is not UTF-8
    except msgspec.ValidationError as error:
        raise BadRequest(f"the request body must be a JSON object: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the request body is not valid JSON: {error}") from error
    except RecursionError:
        raise BadRequest("the request body is not valid JSON: it is nested too deeply") from None
    n, max_tokens = fields.n, fields.max_completion_tokens or fields.max_tokens
    prompts: int | None = None
    merge: Merge = ""
    if kind == "generate":
        n, max_tokens = _sampling(fields.sampling_params)
        prompts = _batch(fields)
        if not (fields.return_logprob is None or fields.return_logprob is False):
            merge = "generate"
    elif kind == "completions":
        prompts = _count(fields.prompt, 1)
        if fields.echo is True and not (fields.logprobs is None or fields.logprobs is False):
            merge = "completions"
    n = n if type(n) is int and n > 1 else 1  # anything else is the worker's to refuse
    samples = None if prompts is None and n == 1 else (prompts or 1) * n
    if samples is not None and samples > MAX_SAMPLES:
        raise BadRequest(f"{samples} sequences in one request; at most {MAX_SAMPLES} are allowed", param="n")
    if type(max_tokens) is not int or not 0 < max_tokens < 1 << 24:
        max_tokens = 128
    return Body(
        raw=raw,
        stream=fields.stream is True,
        samples=samples,
        prompt_tokens=len(raw) // 4 + 1,
        max_tokens=max_tokens * (samples or 1),
        merge=merge,
        claimed=claimed,
        ranks=ranks,
        model=fields.model if isinstance(fields.model, str) else "",
        prompt=_prompt(fields),
        priority=fields.priority if type(fields.priority) is int else 0,
    )


def opaque(raw: bytes) -> Body:
    """A body that is nobody's business on the way, perhaps not JSON: one worker gets it as it is, without `OURS`.
    Raises `BadRequest` if these could be in there and cannot be found: a worker may read more than JSON, for instance
    `NaN` and UTF-16."""
    claimed = False
    if b"_transfer_params" in raw or b"\\u" in raw or b"\0" in raw[:8]:  # (a key may be written with escapes)
        try:
            members = _OBJECT.decode(raw)
            claimed = not members.keys().isdisjoint(OURS) or _smuggles(members.get("vllm_xargs", _UNSET))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            if _ALMOST_JSON.match(raw):
                raise BadRequest("the request body is not valid JSON in UTF-8") from None
    return Body(raw, False, None, len(raw) // 4 + 1, 0, "", claimed=claimed, ranks=False, model=_model(raw))


def _model(raw: bytes) -> str:
    """The model that a body is for; "" if it does not say."""
    try:
        return _MODEL.decode(raw).model
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""


def pair(body: Body, host: str, port: int | None, rooms: Sequence[int]) -> tuple[bytes, bytes]:
    """The bodies for the prefill and the decode worker. One room: scalar fields; more: lists, one item per sequence
    (`rooms` has `body.samples` items, or one if that is None)."""
    fields = _rendezvous(host, port, rooms, listed=body.samples is not None)
    if not (body.claimed or body.ranks):
        both = append(body.raw, fields)
        return both, both
    found = members(body)
    decode = append(msgspec.json.encode(found), fields)
    if "disagg_prefill_dp_rank" in found:  # decode's name for the rank that the prefill worker calls its own
        found["routed_dp_rank"] = found.pop("disagg_prefill_dp_rank")
        return append(msgspec.json.encode(found), fields), decode
    return decode, decode


def single(body: Body) -> bytes:
    """The body for a worker that does everything: without the P/D fields, which would make it wait for a peer."""
    return msgspec.json.encode(members(body)) if body.claimed else body.raw


def members(body: Body) -> dict[str, msgspec.Raw]:
    """The client's fields, each as it was written, without `OURS` if these are the client's; of a JSON object."""
    found = _OBJECT.decode(body.raw)
    if not body.claimed:
        return found
    for name in OURS:
        found.pop(name, None)
    if _smuggles(found.get("vllm_xargs", _UNSET)):
        del found["vllm_xargs"]  # whoever tries that gets nothing of what is in there
    return found


def append(raw: bytes, fields: bytes) -> bytes:
    """`{"a": 1}` and `"b":2` to `{"a": 1,"b":2}`; `raw` is a valid JSON object."""
    end = raw.rindex(b"}")
    before = raw[:end].rstrip(b" \t\r\n")
    return b"".join((before, b"" if before.endswith(b"{") else b",", fields, b"}"))


def _rendezvous(host: str, port: int | None, rooms: Sequence[int], *, listed: bool) -> bytes:
    name, number = msgspec.json.encode(host), b"null" if port is None else b"%d" % port
    if not listed:
        return b'"bootstrap_host":%b,"bootstrap_port":%b,"bootstrap_room":%d' % (name, number, rooms[0])
    count = len(rooms)
    return b'"bootstrap_host":[%b],"bootstrap_port":[%b],"bootstrap_room":[%b]' % (
        b",".join([name] * count),
        b",".join([number] * count),
        b",".join([b"%d" % room for room in rooms]),
    )


def _smuggles(xargs: _Raw) -> bool:
    """vLLM merges these extra arguments with `kv_transfer_params`, so they are another way to write it."""
    if xargs is _UNSET:
        return False
    raw = bytes(xargs)
    if b"kv_transfer_params" not in raw and b"\\u" not in raw:
        return False
    try:
        return "kv_transfer_params" in _OBJECT.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return True


def _claimed(fields: _Fields) -> bool:
    """Written out, since every request is asked."""
    return not (
        fields.bootstrap_host is _UNSET
        and fields.bootstrap_port is _UNSET
        and fields.bootstrap_room is _UNSET
        and fields.kv_transfer_params is _UNSET
        and fields.ec_transfer_params is _UNSET
        and fields.baton_resume is _UNSET
    )


def _prompt(fields: _Fields) -> bytes:
    raw = fields.messages
    if raw is _UNSET:
        raw = fields.prompt
    if raw is _UNSET:
        raw = fields.text
    if raw is _UNSET:
        raw = fields.input_ids
    return b"" if raw is _UNSET else bytes(raw)


def _sampling(raw: _Raw) -> tuple[Any, Any]:
    """(n, max_new_tokens) of `/generate`; in a list of parameters the first one counts, as in the worker."""
    if raw is _UNSET:
        return 1, None
    try:
        sampling = _SAMPLING.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return 1, None  # the worker says what is wrong
    if isinstance(sampling, list):
        if not sampling:
            return 1, None
        sampling = sampling[0]
    return sampling.n, sampling.max_new_tokens


def _batch(fields: _Fields) -> int | None:
    if fields.text is not _UNSET and bytes(fields.text) != b"null":
        return _count(fields.text, 1)
    if fields.input_ids is not _UNSET and bytes(fields.input_ids) != b"null":
        return _count(fields.input_ids, 1)
    return _count(fields.input_embeds, 2)


def _count(raw: _Raw, depth: int) -> int | None:
    """How many prompts: None if it is one prompt. A prompt is a string or a list of numbers, nested `depth` deep."""
    if raw is _UNSET:
        return None
    view = memoryview(raw)
    match = _OPENING.match(view)
    opening = bytes(match[0]) if match else b""
    brackets = opening.count(b"[")
    batch = brackets > depth or (brackets == 1 and opening.endswith(b'"'))
    return len(_ITEMS.decode(raw)) if batch else None
