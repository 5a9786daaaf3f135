"""What a stream has said so far, in tokens: enough to go on with it on another worker.

A worker that is asked to (`x-baton-journal: 1`) ends every piece of its stream with an SSE field `id:`, which says what
tokens the piece stands for: `id: 0:15,332;1:7!` (sequence 0: two tokens; sequence 1: one, and its end). Only pieces
that are whole, with this line, are passed on, and without the line; so what the client has and what is written here
are always the same. Nothing is parsed before a worker dies.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from baton.router.splice import Body, append

ASK = b"x-baton-journal: 1\r\n"
SEED = b"x-baton-seed"
LINE = re.compile(rb"\nid: ([0-9:;,!]*)\r?(?=\n)")
MAX_BYTES = 4 << 20
"""Of notes; a longer stream cannot be continued."""
MAX_PIECE = 1 << 20
"""Bytes that may wait for their note."""


class Journal:
    """One stream's notes. `kept` while everything that was passed on stands in them."""

    __slots__ = ("_first", "_notes", "_seed", "_size", "kept")

    def __init__(self, seed: bytes | None) -> None:
        self._first = b""
        self._notes: list[bytes] = []
        self._seed = seed
        self._size = 0
        self.kept = True

    def pieces(self, data: bytes) -> tuple[bytes, bytes]:
        """What can be passed on (whole pieces, their notes taken out), and the rest. A stream without notes passes
        too, event by event, but is not `kept`."""
        at = data.rfind(b"\nid: ")
        if at < 0:
            return self._unnoted(data)
        end = data.find(b"\n\n", at + 1)
        if end < 0:  # the last note may be cut: up to the one before it
            at = data.rfind(b"\nid: ", 0, at)
            end = data.find(b"\n\n", at + 1) if at >= 0 else -1
            if end < 0:
                return b"", data
        whole, rest = data[: end + 2], data[end + 2 :]
        notes = LINE.findall(whole)
        self._notes += notes
        self._size += sum(map(len, notes))
        if self._size > MAX_BYTES:
            self.kept = False
        shown = LINE.sub(b"", whole)
        if not self._first:
            self._first = shown
        return shown, rest

    def _unnoted(self, data: bytes) -> tuple[bytes, bytes]:
        if len(data) < MAX_PIECE:
            return b"", data
        self.kept = False
        return data, b""

    @property
    def count(self) -> int:
        """Tokens so far."""
        parts = (part.rstrip(b"!") for note in self._notes for part in note.split(b";"))
        return sum(part.count(b",") + 1 for part in parts if part[-1:].isdigit())

    def resume(self, body: Body) -> bytes:
        """The body that asks another worker to go on from here."""
        count = body.samples or 1
        tokens: list[list[int]] = [[] for _ in range(count)]
        finished = [False] * count
        for note in self._notes:
            for part in note.split(b";"):
                index, _, said = part.partition(b":")
                if not index:
                    continue
                if said.endswith(b"!"):
                    finished[int(index)], said = True, said[:-1]
                tokens[int(index)] += map(int, filter(None, said.split(b",")))
        resume: dict[str, Any] = {
            "outputs": [{"tokens": t, "finished": f} for t, f in zip(tokens, finished, strict=True)],
            **self._identity(),
        }
        if self._seed is not None:
            resume["seed"] = int(self._seed)
        return append(body.raw, b'"baton_resume":' + msgspec.json.encode(resume))

    def _identity(self) -> dict[str, Any]:
        """What the chunks call themselves: the client must not see another answer begin."""
        if not self._first.startswith(b"data: {"):
            return {}
        event = msgspec.json.decode(self._first[6:].partition(b"\n")[0], type=dict[str, Any])
        meta = event.get("meta_info") or {}
        found = {"id": event.get("id") or meta.get("id"), "created": event.get("created")}
        return {key: value for key, value in found.items() if value is not None}
