"""The header `Server-Timing`: how long the stages took that are over when a reply's head goes out, in milliseconds.

The names are explained in docs/worker.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from baton.base.messages import Timeline
from baton.worker.http import Header

Stages = Mapping[str, tuple[str, str]]
"""By name: the marks at which it begins and ends."""
FIRST_TOKEN = {"first_token": ("received", "first_token")}
COMPUTED: Stages = {"queue": ("received", "scheduled"), "prefill": ("scheduled", "prefilled")}
DECODED: Stages = {"decode": ("first_token", "finished")}
PREFILL: Stages = {**COMPUTED, "transfer": ("prefilled", "delivered")}
DECODE: Stages = {"offer": ("received", "offered"), "handoff": ("offered", "delivered"), **FIRST_TOKEN, **DECODED}
UNIFIED: Stages = {**COMPUTED, **FIRST_TOKEN, **DECODED}


def server_timing(timelines: Iterable[Timeline | None]) -> list[Header]:
    """Of the first sequence that has a timeline; no header if none has."""
    timeline = next((timeline for timeline in timelines if timeline is not None), None)
    if timeline is None:
        return []
    entries = []
    for name, (begin, end) in _stages(timeline).items():
        start, stop = getattr(timeline, begin), getattr(timeline, end)
        if start and stop >= start:
            entries.append(b"%b;dur=%.3f" % (name.encode(), 1e3 * (stop - start)))
    return [(b"server-timing", b", ".join(entries))] if entries else []


def _stages(timeline: Timeline) -> Stages:
    """On D nothing of the prompt is computed, on P nothing is decoded."""
    if not timeline.offered:
        return UNIFIED
    return PREFILL if timeline.prefilled else DECODE
