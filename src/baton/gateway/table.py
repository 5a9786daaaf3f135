"""The workers as the processes of one gateway have agreed on them: what a process that starts later must be told."""

from __future__ import annotations

import msgspec

from baton.gateway.roster import Change, Entry, Event, Removal


class Table:
    """No clock: time is a parameter. Who serves is decided by the processes; this only remembers it."""

    def __init__(self) -> None:
        self._events: dict[str, Entry | Removal] = {}
        """By URL."""
        self._heard: dict[str, float] = {}

    def apply(self, event: Event, now: float) -> None:
        self._heard[event.url] = now
        known = self._events.get(event.url)
        if isinstance(event, Change):
            if isinstance(known, Entry):
                self._events[event.url] = _changed(known, event)
        elif isinstance(event, Entry) and isinstance(known, Entry) and known.ttl is None:
            self._events[event.url] = msgspec.structs.replace(event, ttl=None)  # registered to stay
        else:
            self._events[event.url] = event

    def events(self, now: float) -> list[Event]:
        """What makes an empty roster the same; who has expired is left out."""
        return [event for event in self._events.values() if not self._expired(event, now)]

    def _expired(self, event: Event, now: float) -> bool:
        return isinstance(event, Entry) and event.ttl is not None and self._heard[event.url] + event.ttl < now


def _changed(entry: Entry, change: Change) -> Entry:
    return msgspec.structs.replace(
        entry,
        bootstrap_port=entry.bootstrap_port if change.bootstrap_port is None else change.bootstrap_port,
        labels=entry.labels if change.labels is None else change.labels,
        ttl=entry.ttl if entry.ttl is None or change.ttl is None else change.ttl,
        instance=change.instance or entry.instance,
    )
