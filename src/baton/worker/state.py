"""What the routes of one front share."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from baton import __version__
from baton.api.chat import ChatTemplate
from baton.api.job import ModelContext
from baton.api.reasoning import REASONING_FORMATS
from baton.api.sampling import Defaults
from baton.api.text import TextCodec
from baton.api.tool_calls import TOOL_FORMATS
from baton.base.clock import Clock
from baton.base.config import DisaggConfig, EngineConfig, WorkerConfig
from baton.base.errors import Unavailable
from baton.base.messages import Ready
from baton.worker.client import EngineClient
from baton.worker.metrics import Metrics

if TYPE_CHECKING:
    from baton.worker.routes_generate import Exchange


@dataclass(slots=True)
class FrontState:
    """Made once by `Front`; `context` appears when the engine has said what it can do."""

    worker: WorkerConfig
    disagg: DisaggConfig
    engine: EngineConfig
    model_dir: str
    tokenizer: TextCodec
    chat: ChatTemplate
    defaults: Defaults
    clock: Clock
    client: EngineClient = field(init=False)
    metrics: Metrics = field(default_factory=Metrics)
    exchanges: set[Exchange] = field(default_factory=set)
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenize"))
    """Long prompts are tokenised here, so that streams go on meanwhile."""
    draining: bool = False
    started: float = field(default_factory=time.time)
    _context: ModelContext | None = None

    def __post_init__(self) -> None:
        self.client = EngineClient(self.clock, self._learn)

    @property
    def max_body(self) -> int:
        return int(self.worker.max_body_mb * 2**20)

    @property
    def served_name(self) -> str:
        return self.worker.served_model_name or self.engine.model or Path(self.model_dir).name

    @property
    def context(self) -> ModelContext:
        """Raises `Unavailable` while there is no engine to work for it, or the worker is on its way out."""
        if self.draining:
            raise Unavailable("the worker is shutting down")
        if self._context is None:
            raise Unavailable("the engine is starting")
        self.client.require()
        return self._context

    def _learn(self, ready: Ready) -> None:
        names = dict.fromkeys([self.served_name, ready.model_path, self.model_dir])
        self._context = ModelContext(
            names=tuple(names),
            tokenizer=self.tokenizer,
            chat=self.chat,
            vocab_size=ready.vocab_size,
            longest=min(ready.max_model_len, ready.num_pages * ready.page_size),
            eos_token_ids=ready.eos_token_ids,
            defaults=self.defaults,
            tools=TOOL_FORMATS.get(self.worker.tool_call_parser),
            reasoning=REASONING_FORMATS.get(self.worker.reasoning_parser),
            bootstrap_host=self.disagg.bootstrap_host,
            bootstrap_port=ready.bootstrap_port or self.disagg.bootstrap_port,
            fingerprint=f"baton-{__version__}-{ready.weight_dtype}",
            clock=self.clock,
        )
