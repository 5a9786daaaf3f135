"""A real front on loopback with a real engine (and a fake model) at the other end of the channel."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from baton.base.clock import MonotonicClock
from baton.base.config import DisaggConfig, EngineConfig, WorkerConfig
from baton.base.messages import Ready, TokenLogprob
from baton.engine.blocks import PagePool
from baton.engine.engine import Engine
from baton.engine.roles import Committer, Unified
from baton.engine.scheduler import Scheduler
from baton.engine.sockets import EchoRunner, Sampled, Slice
from baton.worker.channel import ChannelClosed, EngineEnd, Waker
from baton.worker.front import Front, new_event_loop

MODEL = "tiny"
VOCAB = 400
PATIENCE = 10.0
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model_dir(directory: Path) -> Path:
    """A byte-level tokenizer with a chat template; nothing else a front reads."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello there, how are you today? the quick brown fox says hello there"], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}')
    (directory / "chat_template.jinja").write_text(CHATML)
    return directory


class FakeModel(EchoRunner):
    """Says the prompt again, at a pace, with logprobs that can be checked: -token/1000, and top ones below it."""

    def __init__(self, pace: float = 0.0) -> None:
        self.pace = pace
        self.steps = 0

    def run(self, batch: Sequence[Slice]) -> list[Sampled]:
        self.steps += 1
        if self.pace:
            time.sleep(self.pace)  # computing takes time
        return [self._answer(piece) for piece in batch]

    def _answer(self, piece: Slice) -> Sampled:
        sampled = self._next(piece)
        sampling, tokens = piece.sequence.sampling, piece.sequence.tokens
        prompt: list[TokenLogprob] = []
        if sampling.prompt_logprobs is not None and piece.start < piece.sequence.prompt_len:
            end = min(piece.start + piece.count + 1, piece.sequence.prompt_len)
            prompt = [logprob(tokens[at], sampling.prompt_logprobs) for at in range(max(piece.start + 1, 1), end)]
        chosen = (
            None if sampled.token is None or sampling.logprobs is None else logprob(sampled.token, sampling.logprobs)
        )
        return Sampled(sampled.token, chosen, tuple(prompt))


def logprob(token: int, top: int) -> TokenLogprob:
    return TokenLogprob(-token / 1000, token, tuple((-token / 1000 - k, token + k) for k in range(top)))


class EngineThread:
    """An engine that can be started, killed and started again."""

    def __init__(self, channel: str, pace: float, instance: str, pages: int = 512, page_size: int = 8) -> None:
        self.waker = Waker()
        self.end = EngineEnd.connect(channel, self.waker)
        self.runner = FakeModel(pace)
        clock = MonotonicClock()
        self.scheduler = Scheduler(
            PagePool(pages), page_size=page_size, max_running=256, max_waiting=64, chunk=64, max_model_len=1024
        )
        role = Unified(self.scheduler, Committer(self.scheduler, self.runner, [2], clock))
        self.engine = Engine(self.scheduler, self.runner, role, clock)
        ready = Ready(
            MODEL,
            ("TinyForCausalLM",),
            VOCAB,
            1024,
            (2,),
            page_size,
            pages,
            "float32",
            "float32",
            "cpu",
            "null",
            instance,
        )
        self.end.send([ready])
        self.dead = threading.Event()
        self.hung = threading.Event()
        self.thread = threading.Thread(target=self._loop, name="engine")
        self.thread.start()

    def _loop(self) -> None:
        try:
            while not self.dead.is_set():
                messages = self.end.receive(0.0 if self.engine.busy else 0.5)
                while self.hung.is_set() and not self.dead.is_set():
                    time.sleep(0.01)
                for message in messages:
                    self.end.send(self.engine.handle(message))
                self.end.send(self.engine.expire() + self.engine.step())
        except ChannelClosed:
            pass
        finally:
            self.end.close()
            self.waker.close()

    def kill(self) -> None:
        """As SIGKILL would: the channel closes in the middle of whatever it did."""
        self.dead.set()
        self.waker.wake()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()

    @property
    def idle(self) -> bool:
        return not self.scheduler.running and not self.scheduler.waiting and self.scheduler.pool.free == 512


@dataclass
class Rig:
    front: Front
    channel: str
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    engine: EngineThread | None = None
    engines: int = 0
    cleanup: list[EngineThread] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.front.port}"

    def start_engine(self, pace: float = 0.0) -> EngineThread:
        self.engines += 1
        self.engine = EngineThread(self.channel, pace, f"instance-{self.engines}")
        self.cleanup.append(self.engine)
        wait_for(lambda: self.front.state.client.connected and self._knows(f"instance-{self.engines}"))
        return self.engine

    def _knows(self, instance: str) -> bool:
        ready = self.front.state.client.ready
        return ready is not None and ready.instance == instance

    def settle(self) -> None:
        """Nothing of any request is left: in the front, in the engine."""
        assert self.engine is not None
        engine = self.engine
        wait_for(lambda: engine.idle)
        wait_for(lambda: not self.front.state.exchanges and not self.front.state.client.open_count)


@contextmanager
def paced(rig: Rig, seconds: float) -> Iterator[None]:
    """Every step of the model takes so long."""
    assert rig.engine is not None
    rig.engine.runner.pace = seconds
    try:
        yield
    finally:
        rig.engine.runner.pace = 0.0


def wait_for(condition: object, patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    assert callable(condition)
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@contextmanager
def serving(
    model_dir: Path, run_dir: Path, *, drain: float = 2.0, engine: bool = True, **worker: object
) -> Iterator[Rig]:
    channel = str(run_dir / "engine.sock")
    config = WorkerConfig(port=0, served_model_name=MODEL, **worker)  # type: ignore[arg-type]
    started: list[Rig] = []
    failed: list[BaseException] = []

    async def main() -> None:
        front = Front(config, str(model_dir), channel, DisaggConfig(), EngineConfig(model=MODEL), drain=drain)
        task = asyncio.ensure_future(front.serve())
        listening = asyncio.ensure_future(front.listening())
        await asyncio.wait([task, listening], return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        started.append(Rig(front, channel, asyncio.get_running_loop(), threading.current_thread()))
        await task

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=new_event_loop) as runner:
                runner.run(main())
        except BaseException as error:
            failed.append(error)
            raise

    thread = threading.Thread(target=run, name="front")
    thread.start()
    wait_for(lambda: started or failed)
    rig = started[0]
    rig.front.state.thread.submit(int).result(PATIENCE)  # the thread exists before a test counts threads
    try:
        if engine:
            rig.start_engine()
        yield rig
    finally:
        if thread.is_alive():
            rig.loop.call_soon_threadsafe(rig.front.stop)
        thread.join(PATIENCE + drain)
        for one in rig.cleanup:
            one.kill()
        assert not thread.is_alive()
        assert not Path(channel).exists()


@contextmanager
def in_flight(rig: Rig) -> Iterator[None]:
    """One long request runs meanwhile; it is dropped afterwards."""
    assert rig.engine is not None
    engine = rig.engine
    body = b'{"prompt": "hello there", "max_tokens": 1000, "ignore_eos": true}'
    with paced(rig, 0.01), raw_connection(rig) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_for(lambda: engine.scheduler.running)
        yield


def raw_connection(rig: Rig) -> socket.socket:
    return socket.create_connection(("127.0.0.1", rig.front.port), timeout=PATIENCE)
