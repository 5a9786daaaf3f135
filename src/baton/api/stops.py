"""Stop strings: found across token boundaries, and never shown in part."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Feeds on text in pieces of any size; what it says does not depend on how the text was cut.

    The stop string that is complete first (by its end) wins; of two that end together, the longer one.
    """

    __slots__ = ("_held", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would stop everything"
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Text that can be shown, and the stop string if one is complete (nothing after it is kept)."""
        text = self._held + text
        found = min(((at + len(s), at, s) for s in self._stops if (at := text.find(s)) >= 0), default=None)
        if found is not None:
            self._held = ""
            return text[: found[1]], found[2]
        keep = self._doubtful(text)
        self._held = text[keep:]
        return text[:keep], None

    def finish(self) -> str:
        """The end came before the stop string was complete: what was held back is text after all."""
        held, self._held = self._held, ""
        return held

    def _doubtful(self, text: str) -> int:
        """Where the earliest suffix of `text` begins that may still become a stop string."""
        earliest = len(text)
        for stop in self._stops:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1), earliest)
            while at >= 0:
                if stop.startswith(text[at:]):
                    earliest = at
                    break
                at = text.find(stop[0], at + 1, earliest)
        return earliest
