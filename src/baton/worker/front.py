"""The front's process: HTTP and text on one side, the engine's channel on the other. Imports no torch.

client ── HTTP ──▶ uvicorn ─ Starlette ─ routes ─ EngineClient ── Unix socket ──▶ engine
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from baton.api import openai, sglang
from baton.api.chat import ChatTemplate
from baton.api.dialect import error_body
from baton.api.sampling import NO_DEFAULTS, Defaults
from baton.api.text import load_tokenizer
from baton.base.clock import MonotonicClock
from baton.base.config import DisaggConfig, EngineConfig, WorkerConfig
from baton.base.errors import BadRequest, BatonError, ConfigError, NotFound, Unavailable
from baton.worker.http import Guard
from baton.worker.registrar import Card, Place, Registrar, secret
from baton.worker.routes_generate import GenerateRoute
from baton.worker.routes_info import InfoRoutes
from baton.worker.state import FrontState

log = logging.getLogger("baton.front")

DRAIN = 8.0
"""Seconds open requests may go on after SIGTERM."""
KEEP_ALIVE = 120
"""Seconds an idle connection stays open: longer than a gateway keeps one, so that it is not closed under a request."""
STALL = 60.0
"""Seconds a client may leave a full connection unread before its request is given up."""
SILENCE = 60.0
"""Seconds an engine with open requests may say nothing before they fail (it reports every second between steps)."""
WATCH = 5.0
"""Seconds between two looks for either."""

Handler = Callable[[Scope, Receive, Send], Awaitable[None]]


def routes(state: FrontState) -> list[Route]:
    """The hot ones first: Starlette looks from the top."""
    info, key = InfoRoutes(state), state.worker.api_key

    def route(paths: str, methods: list[str], handler: Handler, *, open: bool = False) -> Iterator[Route]:
        guard = Guard("" if open else key, handler)
        return (Route(path, guard, methods=methods) for path in paths.split())

    post, get, both = ["POST"], ["GET"], ["GET", "POST"]
    return [
        *route("/v1/chat/completions", post, GenerateRoute(state, openai.Chat())),
        *route("/generate", ["POST", "PUT"], GenerateRoute(state, sglang.Generate())),
        *route("/v1/completions", post, GenerateRoute(state, openai.Completions())),
        *route("/health /health_generate", get, info.health, open=True),
        *route("/ready", get, info.ready, open=True),
        *route("/metrics", get, info.metrics, open=True),
        *route("/v1/loads", get, info.loads),
        *route("/get_load", get, info.get_load),
        *route("/v1/models", get, info.models),
        *route("/v1/models/{id:path}", get, info.model),
        *route("/model_info /get_model_info", get, info.model_info),
        *route("/server_info /get_server_info", get, info.server_info),
        *route("/flush_cache", both, info.flush_cache),
        *route("/abort_request", post, info.abort_request),
        *route("/tokenize /v1/tokenize", post, info.tokenize),
        *route("/detokenize /v1/detokenize", post, info.detokenize),
    ]


def application(state: FrontState) -> Starlette:
    return Starlette(routes=routes(state), exception_handlers={HTTPException: _not_ours})


async def _not_ours(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in the shape of all other errors."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    kind: BatonError = NotFound(f"there is no {where} here")
    if error.status_code == 405:
        kind = BadRequest(f"{where} is not allowed; allowed: {(error.headers or {}).get('Allow', '')}")
    return Response(error_body(kind), error.status_code, error.headers, "application/json")


class _Server(uvicorn.Server):
    """uvicorn without its signal handling, telling when it listens."""

    def __init__(self, config: uvicorn.Config, opened: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._opened = opened

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        try:
            await self._opened()
        except BaseException:
            for server in self.servers:
                server.close()
            raise

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Front:
    """One front. `serve` runs until `stop`; then streams may finish for `drain` seconds."""

    def __init__(
        self,
        worker: WorkerConfig,
        model_dir: str,
        channel: str,
        disagg: DisaggConfig,
        engine: EngineConfig | None = None,
        *,
        drain: float = DRAIN,
    ) -> None:
        config = engine if engine is not None else EngineConfig(model=model_dir)
        tokenizer_dir = config.tokenizer_path or model_dir
        tokenizer = load_tokenizer(tokenizer_dir)
        chat = ChatTemplate.load(tokenizer_dir, tokenizer.special_tokens, worker.chat_template)
        defaults = Defaults.load(model_dir) if worker.sampling_defaults == "model" else NO_DEFAULTS
        self.state = FrontState(worker, disagg, config, model_dir, tokenizer, chat, defaults, MonotonicClock())
        self._channel = Path(channel)
        self._drain = drain
        self._engines: asyncio.AbstractServer | None = None
        self._stops = 0
        self._listening = asyncio.Event()
        self._server = _Server(
            uvicorn.Config(
                application(self.state),
                loop="none",
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=int(drain) + 1,
            ),
            self._open_channel,
        )
        self._socket: socket.socket | None = None
        self._registrar: Registrar | None = None
        self._registering: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port it listens on, also if the configuration said 0."""
        assert self._socket is not None, "not serving"
        return int(self._socket.getsockname()[1])

    async def serve(self) -> None:
        """Raises `ConfigError` if an address cannot be listened on."""
        self._socket = _listen(self.state.worker.host, self.state.worker.port)
        watches = [asyncio.create_task(self._cut_stalled()), asyncio.create_task(self._fail_unanswered())]
        try:
            self._begin_to_register()
            await self._server.serve(sockets=[self._socket])
        finally:
            for watch in (*watches, *([self._registering] if self._registering is not None else [])):
                watch.cancel()
            if self._registering is not None:
                await asyncio.wait([self._registering])
            self.state.client.close(Unavailable("the worker is shutting down"))
            if self._engines is not None:
                self._engines.close()
            self._channel.unlink(missing_ok=True)
            self._socket.close()
            self.state.thread.shutdown()

    async def listening(self) -> None:
        """Returns when both HTTP and the engine's channel are open."""
        await self._listening.wait()

    def stop(self) -> None:
        """Gateways that know us send no more; then take no more, finish what is open. A second call does not wait."""
        self._stops += 1
        if self._registrar is None or self._stops > 1:
            self._drain_now()
            return
        assert self._registering is not None
        self._registering.cancel()
        self._registering = asyncio.get_running_loop().create_task(self._registrar.leave())
        self._registering.add_done_callback(lambda _: self._drain_now())

    def _drain_now(self) -> None:
        self.state.draining = True
        self._server.should_exit = True
        patience = self._drain if self._stops == 1 else 0.0
        reason = Unavailable("the worker is shutting down")
        asyncio.get_running_loop().call_later(patience, self.state.client.fail_all, reason)

    def _begin_to_register(self) -> None:
        """Raises `ConfigError`."""
        config = self.state.worker
        if config.register:
            place = Place(config.host, self.port, config.advertise_url.rstrip("/"))
            self._registrar = Registrar(
                config.register, place, secret(config.register_key), config.register_ttl, self._card
            )
            self._registering = asyncio.get_running_loop().create_task(self._registrar.run())

    def _card(self, url: str) -> Card | None:
        """Who we are, for gateways; once there has been an engine, its absence is what `/health` tells."""
        ready, disagg = self.state.client.ready, self.state.disagg
        if ready is None:
            return None
        role = "regular" if disagg.mode == "null" else disagg.mode
        room = (ready.bootstrap_port or disagg.bootstrap_port) if role == "prefill" else None
        return Card(url, role, room, ready.instance, self.state.worker.register_ttl)

    async def _open_channel(self) -> None:
        """The path appears when the channel is open, and ours alone."""
        unready = self._channel.with_name(self._channel.name + ".new")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            unready.unlink(missing_ok=True)
            listener.bind(str(unready))
            unready.chmod(0o600)
            listener.setblocking(False)
            loop = asyncio.get_running_loop()
            self._engines = await loop.create_unix_server(self.state.client.connection, sock=listener)
            unready.rename(self._channel)
        except OSError as error:
            listener.close()
            raise ConfigError(f"the engine's channel {self._channel} cannot be opened: {error}") from error
        self._listening.set()

    async def _cut_stalled(self) -> None:
        """Clients that do not read: their requests end, so that the engine's pages are free again."""
        while True:
            await asyncio.sleep(WATCH)
            now = self.state.clock.now()
            for exchange in list(self.state.exchanges):
                if exchange.sending_since and now - exchange.sending_since > STALL and exchange.task is not None:
                    log.warning("a client has not read for %g s; its request is given up", STALL)
                    exchange.cut = True
                    exchange.task.cancel()

    async def _fail_unanswered(self) -> None:
        """An engine that hangs without dying: nobody waits for it for ever."""
        client = self.state.client
        while True:
            await asyncio.sleep(WATCH)
            if client.open_count and not await client.alive(SILENCE):
                log.error("the engine has been silent for %g s; %d sequences fail", SILENCE, client.open_count)
                client.fail_all(Unavailable(f"the engine has not answered for {SILENCE:g} s"))


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.setblocking(False)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where there is one (not on Windows)."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def run(
    worker: WorkerConfig, model_dir: str, channel: str, disagg: DisaggConfig, engine: EngineConfig | None = None
) -> None:
    """Entry point of the process. Returns after SIGTERM or SIGINT, when open requests are done (or cut)."""
    logging.basicConfig(level=worker.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger().level))

    async def main() -> None:
        front = Front(worker, model_dir, channel, disagg, engine)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, front.stop)
        await front.serve()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main())
