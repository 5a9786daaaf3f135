"""What a test may leave behind, counted: Python threads, child processes, sockets, shared memory."""

from __future__ import annotations

import gc
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

SETTLE_SECONDS = 3.0
"""Threads and processes that were told to end may need a moment."""
FOR_LIFE = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
"""Helpers that Python starts once per process and stops with it."""
LIFELONG_THREADS = ("tqdm_monitor", "pytest_timeout")
FILE_KINDS = ("socket:", "anon_inode:", "/memfd:")
"""Descriptors counted: sockets, event polls, shared memory. Plain files and pipes stay open in libraries for life."""


@dataclass(frozen=True, slots=True)
class Held:
    threads: frozenset[threading.Thread]
    children: frozenset[psutil.Process]
    files: frozenset[tuple[int, str]]
    segments: frozenset[str]


def look() -> Held:
    return Held(
        frozenset(t for t in threading.enumerate() if not t.name.startswith(LIFELONG_THREADS)),
        frozenset(psutil.Process(pid) for pid in _children()),
        frozenset(_files()),
        frozenset(_segments()),
    )


def left_since(before: Held) -> list[str]:
    """Waits up to `SETTLE_SECONDS` for what is about to end; describes what is still there then."""
    deadline = time.monotonic() + SETTLE_SECONDS
    left = _difference(before, look())
    if left:
        gc.collect()
    while left and time.monotonic() < deadline:
        time.sleep(0.02)
        left = _difference(before, look())
    return left


def _difference(before: Held, now: Held) -> list[str]:
    return [
        *(f"thread {thread.name}" for thread in now.threads - before.threads),
        *(f"process {text}" for child in now.children - before.children if (text := _described(child))),
        *(f"descriptor {number} -> {target}" for number, target in now.files - before.files),
        *(f"/dev/shm/{name}" for name in now.segments - before.segments),
    ]


def _described(child: psutil.Process) -> str:
    """`""` for one that ended meanwhile or stays for life."""
    try:
        command = " ".join(child.cmdline())
        if any(name in command for name in FOR_LIFE):
            return ""
        return f"{child.pid} {child.status()}: {command or child.name()}"
    except psutil.NoSuchProcess:
        return ""


def _children() -> list[int]:
    """Without a walk over all processes of the machine where the kernel tells."""
    tasks = Path(f"/proc/{os.getpid()}/task")
    try:
        texts = [(task / "children").read_text() for task in tasks.iterdir()]
    except OSError:
        return [child.pid for child in psutil.Process().children()]
    return [pid for text in texts for pid in map(int, text.split()) if psutil.pid_exists(pid)]


def _files() -> list[tuple[int, str]]:
    found = []
    for entry in Path("/proc/self/fd").iterdir() if Path("/proc/self/fd").is_dir() else ():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:  # the descriptor of this very listing
            continue
        if target.startswith(FILE_KINDS):
            found.append((int(entry.name), target))
    return found


def _segments() -> list[str]:
    folder = Path("/dev/shm")
    return [entry.name for entry in folder.glob("baton*")] if folder.is_dir() else []
