"""Prompt logprobs: only the prefill worker has them, only some requests ask for them, and only those are parsed.

`/generate`: `meta_info.input_token_logprobs` and its siblings of P come before those of D (which are empty there), in
every item of a batch and in every event of a stream that carries them. Completions with `echo` and `logprobs`: the rows
of the prompt, which D leaves null (or leaves out), are P's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from baton.base.errors import BatonError
from baton.router.splice import Merge

INPUT_FIELDS = ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs")
COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")

Json = dict[str, Any]
_encode = msgspec.json.Encoder().encode


class CannotMerge(BatonError):
    """A worker's reply does not look as its documentation says: 502."""

    status, code = 502, "worker_reply_not_understood"


class Merger:
    """Made from P's complete reply; then given D's, whole or event by event. Raises `CannotMerge`."""

    def __init__(self, kind: Merge, receipt: bytes, *, stream: bool) -> None:
        self._kind = kind
        parts = _payloads(receipt) if stream else [receipt]
        objects = [item for part in parts for item in _objects(part)]
        self._metas: dict[int, Json] = {}
        self._columns: dict[int, Json] = {}
        if kind == "generate":
            self._metas = {item.get("index", at): item.get("meta_info") or {} for at, item in enumerate(objects)}
        else:
            for item in objects:
                for choice in item.get("choices") or []:
                    if choice.get("logprobs"):
                        _extend(self._columns.setdefault(choice.get("index", 0), {}), choice["logprobs"])

    def whole(self, body: bytes) -> bytes:
        """D's reply with P's part in it."""
        reply = _decode(body)
        for at, item in enumerate(reply if isinstance(reply, list) else [reply]):
            self._fill(item, at)
        return _encode(reply)

    def events(self, data: bytes) -> bytes:
        """Some whole events of D's stream; what is not a JSON object passes as it is."""
        return b"\n".join(self._line(line) for line in data.split(b"\n"))

    def _line(self, line: bytes) -> bytes:
        if not line.startswith(b"data: {"):
            return line
        item = _decode(line[6:])
        self._fill(item, 0)
        return b"data: " + _encode(item)

    def _fill(self, item: Json, at: int) -> None:
        if self._kind == "generate":
            meta = item.get("meta_info")
            mine = self._metas.get(item.get("index", at))
            if isinstance(meta, dict) and mine is not None:
                for name in INPUT_FIELDS:
                    if isinstance(meta.get(name), list) and mine.get(name):
                        meta[name] = mine[name] + meta[name]
            return
        for choice in item.get("choices") or []:
            if choice.get("logprobs"):
                mine = self._columns.pop(choice.get("index", 0), None)  # the prompt comes once, first
                if mine is not None:
                    _prepend(mine, choice["logprobs"])


def _payloads(stream: bytes) -> Iterable[bytes]:
    """The JSON payloads of a whole event stream."""
    for line in stream.splitlines():
        if line.startswith(b"data: {"):
            yield line[6:]


def _objects(data: bytes) -> list[Json]:
    reply = _decode(data)
    return reply if isinstance(reply, list) else [reply]


def _decode(data: bytes) -> Any:
    try:
        reply = msgspec.json.decode(data, type=dict[str, Any] | list[dict[str, Any]])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CannotMerge(f"a worker's reply is not the JSON it should be ({error}); no prompt logprobs") from error
    return reply


def _extend(columns: Json, more: Json) -> None:
    for name in COLUMNS:
        if isinstance(more.get(name), list):
            columns.setdefault(name, []).extend(more[name])


def _prepend(prefill: Json, decode: Json) -> None:
    """Put P's prompt rows into D's columns, in place."""
    logprobs, tokens = decode.get("token_logprobs") or [], decode.get("tokens") or []
    theirs = prefill.get("tokens") or []
    rows = 0
    while rows < min(len(logprobs), len(theirs)) and logprobs[rows] is None and tokens[rows] == theirs[rows]:
        rows += 1
    if rows:  # D shows the prompt's tokens, without logprobs
        for name in ("token_logprobs", "top_logprobs"):
            if isinstance(decode.get(name), list) and len(prefill.get(name) or []) >= rows:
                decode[name][:rows] = prefill[name][:rows]
        return
    for name in COLUMNS:  # D shows its own tokens only; P's last row is the first of these
        if isinstance(decode.get(name), list):
            decode[name] = (prefill.get(name) or [])[:-1] + decode[name]
