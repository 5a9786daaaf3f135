"""One line per finished request, as text or JSON. No prompts, no keys, no headers."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Literal

import msgspec

from baton.gateway.stages import name, stages
from baton.gateway.timeline import Timeline
from baton.gateway.views import failed

log = logging.getLogger("baton.requests")

Which = Literal["none", "errors", "all"]
LogFormat = Literal["text", "json"]
LONGEST = 300
"""Characters of what a client or a worker said."""
TEXT = "%(asctime)s %(levelname)s %(message)s"


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """A request in a log; times in milliseconds."""

    id: str
    route: str
    status: int
    total: float
    stages: dict[str, float]
    user: str = ""
    model: str = ""
    stream: bool = False
    ttft: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    workers: list[str] = []
    """Of the last attempt: who prefilled, who answered."""
    lost: list[str] = []
    """Why earlier attempts failed."""
    resumes: int = 0
    error: str = ""

    @classmethod
    def of(cls, timeline: Timeline) -> Entry:
        attempts = timeline.attempts
        target = attempts[-1].target if attempts else None
        workers = (target.prefill, target.answering) if target is not None else ()
        return cls(
            id=timeline.id,
            route=timeline.route,
            status=timeline.status,
            total=_ms(timeline.finished - timeline.received),
            stages={stage.name: _ms(stage.seconds) for stage in stages(timeline, timeline.finished)},
            user=timeline.user,
            model=plain(timeline.model),
            stream=timeline.stream,
            ttft=_ms(timeline.first - timeline.received) if timeline.first else 0.0,
            prompt_tokens=timeline.prompt_tokens,
            output_tokens=timeline.output_tokens,
            workers=[name(worker) for worker in workers if worker is not None],
            lost=[attempt.lost for attempt in attempts if attempt.lost],
            resumes=sum(attempt.resumed for attempt in attempts),
            error=plain(timeline.error),
        )

    def __str__(self) -> str:
        parts = [f"{self.route} {self.status} in {self.total:g} ms"]
        parts.append("(" + ", ".join(f"{stage} {ms:g}" for stage, ms in self.stages.items()) + ")")
        if self.workers:
            parts.append("by " + " -> ".join(self.workers))
        parts.append(f"id={self.id}")
        for label, value in (("user", self.user), ("model", self.model), ("tokens", self.output_tokens or "")):
            if value:
                parts.append(f"{label}={value}")
        if self.lost:
            parts.append(f"lost: {'; '.join(self.lost)}")
        if self.error:
            parts.append(f"error: {self.error}")
        return " ".join(parts)


class AccessLog:
    """A sink of the recorder. `errors`: what failed, was repeated or went on elsewhere."""

    def __init__(self, which: Which) -> None:
        self._all = which == "all"

    def __call__(self, timeline: Timeline) -> None:
        wrong = failed(timeline)
        if (self._all or wrong or len(timeline.attempts) > 1) and log.isEnabledFor(logging.INFO):
            log.log(logging.WARNING if wrong else logging.INFO, "%s", Entry.of(timeline))


class JsonFormatter(logging.Formatter):
    """One object per line: time, level, logger, message, and the request if it is about one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        arguments = record.args if isinstance(record.args, tuple) else ()
        if len(arguments) == 1 and isinstance(arguments[0], Entry):
            line["request"] = arguments[0]
        else:
            line["message"] = record.getMessage()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def configure(level: str, form: str) -> None:
    """For a process: everything to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(TEXT))
    logging.basicConfig(handlers=[handler], level=level.upper())


def plain(text: str) -> str:
    """Others' words, on one line and not too many."""
    return "".join(char if char.isprintable() else " " for char in text[:LONGEST])


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 2)
