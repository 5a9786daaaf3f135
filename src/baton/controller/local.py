"""Processes on this machine. Everything that happens to them ends up in one inbox, as events.

Light processes (fronts) are started afresh; heavy ones (engines) are forked by the nursery. Each child is the
leader of its own session, so that Ctrl-C in a terminal reaches the supervisor only, and holds the end of a lifeline,
so that it never outlives the supervisor.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from baton.controller import child
from baton.controller.child import Job
from baton.controller.heavy import NurseryClient
from baton.controller.probe import Inbox, Prober
from baton.controller.spec import PathCheck, ProcessSpec
from baton.controller.supervisor import Exited, Started


class Launcher(Protocol):
    """Carries out what the supervisor decides; answers come as events."""

    def start(self, spec: ProcessSpec, run: int) -> None:
        """Begin a run: `Started`, then perhaps `Answered`, and once, whatever happens, `Exited`."""
        ...

    def terminate(self, name: str, run: int) -> None:
        """Ask it to end (SIGTERM). No-op if it is gone."""
        ...

    def kill(self, name: str, run: int) -> None: ...

    def close(self) -> None:
        """Nothing may run any more; release what the launcher itself holds."""
        ...


class LocalLauncher:
    def __init__(self, inbox: Inbox, preload: Sequence[str], nursery_log: Path) -> None:
        self._inbox = inbox
        self._prober = Prober(inbox)
        self._light: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
        self._waiters: list[threading.Thread] = []
        self._heavy = NurseryClient(inbox, preload, nursery_log, self._prober)

    def warm_up(self) -> None:
        """Begin to import the heavy libraries now."""
        self._heavy.open()

    def start(self, spec: ProcessSpec, run: int) -> None:
        job = Job(spec.name, spec.target, spec.kwargs, spec.cores, spec.env)
        try:
            if isinstance(spec.ready, PathCheck):
                spec.ready.path.unlink(missing_ok=True)  # of an earlier run
            if spec.heavy:
                self._heavy.fork(run, job, spec.log)
            else:
                self._spawn(job, run, spec.log)
        except OSError as error:  # no memory, no disk, no more processes: as a death, it may be better soon
            self._inbox.put(Exited(spec.name, run, 1, f"cannot be started: {error}"))
        else:
            self._prober.add(spec.name, run, spec.ready)

    def terminate(self, name: str, run: int) -> None:
        self._signal(name, run, signal.SIGTERM)

    def kill(self, name: str, run: int) -> None:
        self._signal(name, run, signal.SIGKILL)

    def close(self) -> None:
        self._prober.close()
        self._heavy.close()
        for process in list(self._light.values()):
            process.kill()
        for waiter in self._waiters:
            waiter.join()

    def _spawn(self, job: Job, run: int, log: Path) -> None:
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", child.__file__, job.name],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._light[job.name, run] = process
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # dead already: the waiter will tell
            process.stdin.write(json.dumps(sys.path).encode() + b"\n" + pickle.dumps(job))
            process.stdin.flush()
        self._inbox.put(Started(job.name, run, process.pid))
        waiter = threading.Thread(target=self._wait, args=(process, job.name, run), name=f"wait-{job.name}")
        waiter.start()
        self._waiters = [thread for thread in self._waiters if thread.is_alive()] + [waiter]

    def _wait(self, process: subprocess.Popen[bytes], name: str, run: int) -> None:
        code = process.wait()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        self._prober.drop(name, run)
        del self._light[name, run]
        self._inbox.put(Exited(name, run, code))

    def _signal(self, name: str, run: int, number: signal.Signals) -> None:
        process = self._light.get((name, run))
        if process is not None:
            process.send_signal(number)
        else:
            self._heavy.signal(name, run, number)
