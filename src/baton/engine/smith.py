"""Grammars are compiled in a thread beside the engine's: a large schema takes seconds, and streams go on meanwhile.

    engine's thread    begin: hold the sequence ──▶ orders              done: let it go, or fail it
    baton-smith                                      └──▶ compile ──▶ finished, wake ──┘

One at a time, in the order they came; what has ended meanwhile is passed over. The library lets go of the interpreter
while it compiles. Only its table of the vocabulary it makes without, so that is done first, before anybody streams.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from baton.base.errors import BatonError, Internal
from baton.base.messages import Grammar
from baton.engine.sequence import Sequence

log = logging.getLogger("baton.engine")


class Compiler(Protocol):
    """What is done here: `Grammars`, or `NoGrammars`. To be called from any thread."""

    def warm_up(self) -> None:
        """What all grammars need. Idempotent."""
        ...

    def compiled(self, grammar: Grammar) -> object | None:
        """What `compile` has made of it, if that is still known; does not wait for anything."""
        ...

    def compile(self, grammar: Grammar) -> object:
        """Raises `BadRequest`."""
        ...


class Smith:
    def __init__(self, compiler: Compiler, wake: Callable[[], None]) -> None:
        """`wake` is called, in the thread, when `done` has news."""
        self._compiler = compiler
        self._wake = wake
        self._orders: queue.SimpleQueue[Sequence | None] = queue.SimpleQueue()
        self._finished: deque[tuple[Sequence, BatonError | None]] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="baton-smith", daemon=True)
        self._thread.start()

    def begin(self, sequence: Sequence) -> None:
        grammar = sequence.sampling.grammar
        if grammar is None:
            return
        sequence.prepared = self._compiler.compiled(grammar)
        if sequence.prepared is None:
            sequence.held = True
            self._orders.put(sequence)

    def done(self) -> list[tuple[Sequence, BatonError | None]]:
        finished = []
        while self._finished:
            finished.append(self._finished.popleft())
        return finished

    def close(self) -> None:
        """Returns when the thread has ended: after the grammar in hand, which the library's limits bound."""
        self._closing = True
        self._orders.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._compiler.warm_up()
        except Exception:  # whoever asks for a grammar will hear of it
            log.exception("structured output cannot be served")
        while (sequence := self._orders.get()) is not None and not self._closing:
            if sequence.held:  # else nobody waits for it any more
                self._finished.append((sequence, self._forge(sequence)))
                self._wake()

    def _forge(self, sequence: Sequence) -> BatonError | None:
        assert sequence.sampling.grammar is not None
        try:
            sequence.prepared = self._compiler.compile(sequence.sampling.grammar)
        except BatonError as error:
            return error
        except Exception:
            log.exception("a grammar could not be compiled")
            return Internal("an unexpected error while the grammar was compiled; see the engine's log")
        return None


class ManualSmith:
    """The fake: has no thread, and is done with what a test says is done."""

    def __init__(self) -> None:
        self.orders: list[Sequence] = []
        self.closed = False
        self._finished: list[tuple[Sequence, BatonError | None]] = []

    def begin(self, sequence: Sequence) -> None:
        if sequence.sampling.grammar is not None:
            sequence.held = True
            self.orders.append(sequence)

    def finish(self, sequence: Sequence, error: BatonError | None = None) -> None:
        self.orders.remove(sequence)
        self._finished.append((sequence, error))

    def done(self) -> list[tuple[Sequence, BatonError | None]]:
        finished, self._finished = self._finished, []
        return finished

    def close(self) -> None:
        self.closed = True
