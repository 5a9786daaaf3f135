"""What vLLM's prefill and decode instances are told of each other. Bytes in, bytes out; nothing is sent here.

    client's body ── prefill_body ──▶ P ── answer ──▶ params ── decode_body ──▶ D
                     one token, no stream            as they came             the client's body

Whatever a client wrote in `kv_transfer_params` is gone before (`baton.router.splice`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from baton.router import splice
from baton.router.splice import Body

ASK = (
    b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,'
    b'"remote_host":null,"remote_port":null}'
)
"""NIXL's prefill leg: keep the blocks for somebody who will be named by what you answer."""
INDIVISIBLE = ("background", "echo", "previous_response_id", "prompt_embeds", "prompt_logprobs", "use_beam_search")
"""Fields with which a request goes whole: they speak of a state that only one worker has, of what only the worker
that prefills can tell, or of more sequences than one."""
_NOTHING = (b"null", b"false")
_NULL = msgspec.Raw(b"null")
_ONE, _FALSE = msgspec.Raw(b"1"), msgspec.Raw(b"false")


class _Answer(msgspec.Struct):
    kv_transfer_params: msgspec.Raw = _NULL


class _Nixl(msgspec.Struct):
    """What must be there: without one of them the decode worker hangs, or ends."""

    do_remote_prefill: bool
    remote_engine_id: str
    remote_request_id: str
    remote_host: str
    remote_port: int
    remote_block_ids: list[Any]


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Ending(msgspec.Struct):
    choices: list[_Choice] = []
    status: str = ""
    stop_reason: str | None = None


_answer = msgspec.json.Decoder(_Answer)
_nixl = msgspec.json.Decoder(_Nixl)
_ending = msgspec.json.Decoder(_Ending)


def divisible(body: Body, members: Mapping[str, msgspec.Raw]) -> bool:
    """Can a pair serve it? Of several prompts only the first one's KV cache would be handed over, as everybody's; the
    first of several samples that has pulled it lets go of it for all, and a push finds none of them."""
    return (body.samples or 1) == 1 and all(bytes(members.get(name, _NULL)) in _NOTHING for name in INDIVISIBLE)


def prefill_body(path: str, members: Mapping[str, msgspec.Raw], params: bytes) -> bytes:
    """The client's request for one token, in one piece: in a stream no parameters would come back."""
    limit = "max_output_tokens" if path.startswith("/v1/responses") else "max_tokens"
    changed = {**members, "stream": _FALSE, limit: _ONE, "min_tokens": _ONE}
    changed |= {name: _ONE for name in ("max_completion_tokens", "n") if name in members}
    if "store" in members:
        changed["store"] = _FALSE
    changed.pop("stream_options", None)
    changed["kv_transfer_params"] = msgspec.Raw(params)
    return msgspec.json.encode(changed)


def decode_body(body: Body, params: bytes | None) -> bytes:
    """The client's request as it was, with what prefill said; None: without."""
    raw = splice.single(body)
    return raw if params is None else splice.append(raw, b'"kv_transfer_params":' + params)


def nixl_params(answer: bytes) -> bytes | None:
    """What NIXL's prefill worker wants the decode worker to hear, verbatim; None if it is not usable."""
    try:
        params = bytes(_answer.decode(answer).kv_transfer_params)
        found = _nixl.decode(params)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    named = found.remote_engine_id and found.remote_request_id and found.remote_host and 0 < found.remote_port < 1 << 16
    blocks = any(group != [] for group in found.remote_block_ids)
    return params if found.do_remote_prefill and named and blocks else None


def stopped(answer: bytes) -> bool:
    """The answer ended by itself, not for its length. Mooncake's prefill worker keeps nothing then."""
    try:
        end = _ending.decode(answer)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return True
    chosen = end.choices and end.choices[0].finish_reason == "stop"
    return bool(chosen) or end.status == "completed" or end.stop_reason in ("end_turn", "stop_sequence")
