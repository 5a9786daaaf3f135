"""The first lines of every process that the controller starts.

Run as a script for light processes: the job comes through standard input, which then stays open as the lifeline:
when the supervisor dies, in whatever way, the kernel closes the other end. The fork server calls `live` in the
processes it forks.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

LAST_WORDS = 1.0
"""Seconds an orphan has to end by itself (and remove what it owns) before it is killed."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a child is to do."""

    name: str
    target: str
    kwargs: Mapping[str, object] = field(default_factory=dict)
    cores: tuple[int, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


def live(job: Job, lifeline: int) -> int:
    """Settle in, run the target, return the exit status. The standard streams are the log already."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the supervisor, which then tells us
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(job.env)
    with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="utf-8") as name:
        name.write(job.name[:15])  # what `top` shows; Linux only
    if job.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job.cores)
    threading.Thread(target=_watch, args=(lifeline,), name="lifeline", daemon=True).start()
    return _run(job)


def resolve(target: str) -> Callable[..., object]:
    """The function that an import string `package.module:function` names."""
    module, _, function = target.partition(":")
    found: Callable[..., object] = getattr(importlib.import_module(module), function)
    return found


def _run(job: Job) -> int:
    from baton.base.errors import BatonError, ConfigError
    from baton.controller.supervisor import EX_CONFIG

    try:
        resolve(job.target)(**job.kwargs)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except ConfigError as error:
        print(f"error: {error.message}", file=sys.stderr)  # noqa: T201
        return EX_CONFIG
    except BatonError as error:
        print(f"error: {error.message}", file=sys.stderr)  # noqa: T201
        return 1
    except Exception:  # noqa: BLE001 (the last frame of a process: whatever it is, it goes to the log)
        traceback.print_exc()
        return 1
    return 0


def _watch(lifeline: int) -> None:
    """Nothing is ever sent: the read ends when the supervisor does."""
    os.read(lifeline, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(LAST_WORDS)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    import faulthandler
    import pickle

    faulthandler.enable()
    job = pickle.load(sys.stdin.buffer)
    lifeline = os.dup(0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    sys.exit(live(job, lifeline))


if __name__ == "__main__":
    import json

    sys.path[:] = json.loads(sys.stdin.buffer.readline())  # the supervisor's: what it can import, we can
    from baton.controller import child

    child.main()
