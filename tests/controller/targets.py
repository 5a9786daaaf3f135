"""Tiny processes for the tests to supervise."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from baton.base.errors import ConfigError


def touch_and_sleep(path: str, trace: str = "") -> None:
    """Ready when it has made `path`; sleeps until a signal ends it."""
    if trace:
        with open(trace, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")
    Path(path).touch()
    threading.Event().wait()


def stubborn(path: str) -> None:
    """Does not hear SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    touch_and_sleep(path)


def busy(path: str) -> None:
    """Computes without end; holds the interpreter's lock as long as Python lets it."""
    Path(path).touch()
    while True:
        sum(range(100_000))


def crash(words: str = "this is the end") -> None:
    sys.stderr.write(words + "\n")
    os.kill(os.getpid(), signal.SIGKILL)


def raising() -> None:
    raise RuntimeError("no way")


def misconfigured() -> None:
    raise ConfigError("weights are missing; pull the model first")


def crash_until(path: str, counter: str, lives: int) -> None:
    """Dies `lives` times, then works."""
    with open(counter, "a", encoding="utf-8") as file:
        file.write("x")
    if os.path.getsize(counter) <= lives:
        sys.stderr.write("not yet\n")
        sys.stderr.flush()
        os._exit(3)
    touch_and_sleep(path)


def serve_http(port: int, ready_after: float = 0.0) -> None:
    """Answers 503, then 200."""
    begun = time.monotonic()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if time.monotonic() - begun >= ready_after else 503)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    HTTPServer(("127.0.0.1", port), Handler).serve_forever()


def facts(path: str) -> None:
    """Writes what the process finds around itself."""
    cores = sorted(os.sched_getaffinity(0))
    leader = os.getsid(0) == os.getpid()
    Path(path + ".tmp").write_text(f"{cores} {os.environ.get('BATON_TEST', '')} {leader}", encoding="utf-8")
    os.rename(path + ".tmp", path)
    threading.Event().wait()
