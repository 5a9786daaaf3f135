"""Which tokens a stream's bytes stand for, said in the stream itself, so that it can be continued elsewhere.

    data: {"choices": ...}
    id: 0:15,332;1:7,8!

The line is a field of the last event of every piece that is written. Per sequence of the request: the ids of the tokens
that came since the line before, those included whose text is held back; `!` if its end has been shown. It is empty if
there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.api.job import Resume, Resumed
from baton.api.output import Output


class Journal:
    """Of one stream; what was shown before it (`resume`) is not said again."""

    __slots__ = ("_ended", "_outputs", "_told")

    def __init__(self, outputs: Sequence[Output], resume: Resume | None) -> None:
        before = resume.outputs if resume is not None else [Resumed([])] * len(outputs)
        self._outputs = outputs
        self._told = [len(one.tokens) for one in before]
        self._ended = [one.finished for one in before]

    def signed(self, events: bytes) -> bytes:
        """A piece of the stream (whole events, at least one) with its line."""
        return b"%bid: %b\n\n" % (events[:-1], b";".join(self._entries()))

    def _entries(self) -> list[bytes]:
        entries = []
        for k, output in enumerate(self._outputs):
            fresh, ended = output.tokens[self._told[k] :], output.ended() and not self._ended[k]
            if fresh or ended:
                self._told[k], self._ended[k] = len(output.tokens), output.ended()
                entries.append(b"%d:%b%b" % (k, b",".join([b"%d" % token for token in fresh]), b"!" if ended else b""))
        return entries
