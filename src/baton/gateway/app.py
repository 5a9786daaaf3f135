"""The gateway as an application: whose request is it, and who answers it?"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import TYPE_CHECKING, cast

from baton.base.config import GatewayConfig
from baton.base.errors import BatonError, ConfigError
from baton.gateway import asgi, keys
from baton.gateway.accesslog import AccessLog, Which
from baton.gateway.admission import AdmissionLimits
from baton.gateway.bounds import Refusal
from baton.gateway.control import OPEN_PATHS, Control, new_request_id
from baton.gateway.door import Answer, Inbound
from baton.gateway.explain import ExplainRoutes
from baton.gateway.inference import PAIRED, Inference, InferenceOptions
from baton.gateway.journey import Patience
from baton.gateway.keys import Identity
from baton.gateway.metrics import Metrics
from baton.gateway.models import ModelRoutes
from baton.gateway.openapi import OpenApi
from baton.gateway.recorder import Recorder, Sink
from baton.gateway.replies import RateLimited, error_body, error_headers, refuse
from baton.gateway.roster import Roster
from baton.gateway.timeline import Timeline
from baton.gateway.trace import TRACEPARENT
from baton.gateway.turnstile import Turnstile
from baton.gateway.watch import Watch
from baton.gateway.workers import WorkerRoutes
from baton.router.call import Header
from baton.router.health import Limits
from baton.router.legs import ClientGone, Pulse
from baton.router.monitor import Rhythm
from baton.router.planner import PlannerOptions, Split
from baton.router.router import Router, RouterOptions

if TYPE_CHECKING:
    from baton.gateway.tracing import Tracer

log = logging.getLogger("baton.gateway")

REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
NATIVE = frozenset({"/generate", "/tokenize", "/detokenize"})
"""Routes for workers outside /v1/."""

ADMIN_PATHS = ("/workers", "/flush_cache", "/explain", "/requests", "/stats", "/loads", "/get_loads")
"""What begins so needs an admin's key."""
NOBODY = Identity("nobody")


class Gateway:
    """The application. Made inside a running loop; `close` releases everything it owns."""

    def __init__(self, config: GatewayConfig) -> None:
        self.router = Router(_router_options(config))
        self.metrics = Metrics(self.router.registry)
        self._config = config
        self._keys = keys.load(config.api_key, config.admin_api_key, config.api_keys, os.environ)
        self._loop = asyncio.get_running_loop()
        self._tracer = _tracer(config)
        self.recorder = Recorder(self.metrics, self.router.planner.speeds, monotonic, _sinks(config, self._tracer))
        self.turnstile = Turnstile(_admission_limits(config), self.router)
        self.metrics.queued = lambda: self.turnstile.admission.waiting
        self.roster = Roster(self.router)
        worker_key = keys.secret(config.worker_api_key, "worker_api_key", os.environ)
        workers = WorkerRoutes(self.router.registry, self.roster, worker_key, config.drain_timeout)
        self.control = Control(
            self.router,
            self.metrics,
            [
                workers,
                ModelRoutes(self.router),
                ExplainRoutes(self.router, config),
                Watch(self.router, self.recorder, self.turnstile),
                OpenApi(),
            ],
        )
        self._control = self.control.app()
        patience = Patience(config.stall_timeout, config.stage_timeout, config.worker_wait, config.retries)
        options = InferenceOptions(config.request_timeout, patience, worker_key)
        self._inference = Inference(self.router, self.turnstile, self.metrics, options)

    async def close(self) -> None:
        self.turnstile.close()
        self._inference.close()
        await self.roster.close()
        await self.router.close()
        if self._tracer is not None:
            self._tracer.close()

    async def __call__(self, inbound: Inbound, answer: Answer, pulse: Pulse) -> None:
        path = inbound.path
        try:
            identity = self._identify(inbound.headers, path)
        except BatonError as error:
            refuse(answer, path, error, [])
            return
        if inbound.method in ("POST", "PUT") and (path.startswith("/v1/") or path in NATIVE):
            await self._infer(inbound, answer, pulse, identity)
        else:
            await asgi.serve(self._control, inbound, answer, pulse)

    def unwelcome(self, url: bytes, headers: Sequence[Header]) -> Refusal | None:
        """Without a key nobody fills our memory."""
        try:
            self._identify(headers, url.partition(b"?")[0].decode("ascii", "replace"))
        except BatonError as error:
            return Refusal(error.status, error.code, error.message)
        return None

    def refused(self, path: str, status: int, code: str, message: str) -> tuple[list[Header], bytes]:
        error = BatonError(message)
        error.status, error.code = status, code
        return error_headers(error), error_body(path, error)

    async def _infer(self, inbound: Inbound, answer: Answer, pulse: Pulse, identity: Identity) -> None:
        metrics, path = self.metrics, inbound.path
        request_id = _request_id(inbound.headers)
        timeline = Timeline(
            request_id.decode("ascii"), path if path in PAIRED else "other", monotonic(), user=identity.name
        )
        if self._tracer is not None:
            timeline.trace = self._tracer.join(inbound.header(TRACEPARENT))
        self.recorder.began(timeline)
        try:
            if metrics.in_flight >= self._config.max_concurrent_requests:
                error = RateLimited(
                    f"{metrics.in_flight} requests are in progress, which is the limit here; try again soon"
                )
                refuse(answer, path, error, [(b"x-request-id", request_id)])
                timeline.status, timeline.error = error.status, error.message
                return
            metrics.in_flight += 1
            try:
                await self._inference.serve(inbound, answer, pulse, timeline, identity)
                timeline.status = answer.status
            except ClientGone:
                timeline.status = 499
            finally:
                metrics.in_flight -= 1
        finally:
            timeline.finished = monotonic()
            self.recorder.finished(timeline)

    def _identify(self, headers: Sequence[Header], path: str) -> Identity:
        """Raises `Unauthorized` or `Forbidden`."""
        if path in OPEN_PATHS:
            return NOBODY
        return keys.require(self._keys.identify(headers), "admin" if path.startswith(ADMIN_PATHS) else "user")


def _request_id(headers: Sequence[Header]) -> bytes:
    """The client's if it is a decent one, else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            return value
    return new_request_id()


def _tracer(config: GatewayConfig) -> Tracer | None:
    """Raises `ConfigError` if it is wanted and cannot be had."""
    if not config.otlp_endpoint:
        return None
    try:
        from baton.gateway.tracing import tracer
    except ImportError as error:
        raise ConfigError("--otlp-endpoint needs OpenTelemetry; pip install 'baton-llm[otel]'") from error
    return tracer(config.otlp_endpoint, monotonic)


def _sinks(config: GatewayConfig, tracer: Tracer | None) -> Iterator[Sink]:
    """Who wants every finished request."""
    if config.request_log != "none":
        yield AccessLog(cast(Which, config.request_log))
    if tracer is not None:
        yield tracer


def _admission_limits(config: GatewayConfig) -> AdmissionLimits:
    return AdmissionLimits(
        prefill_tokens=config.max_inflight_prompt_tokens,
        prefill_requests=config.max_inflight_prefills,
        decode_sequences=config.max_inflight_sequences,
        queue_size=config.queue_size,
        queue_timeout=config.queue_timeout,
        ttft_objective=config.ttft_objective or math.inf,
        ageing=config.priority_ageing,
    )


def _router_options(config: GatewayConfig) -> RouterOptions:
    key = keys.secret(config.worker_api_key, "worker_api_key", os.environ)
    key = key or keys.secret(config.api_key, "api_key", os.environ)
    return RouterOptions(
        planner=PlannerOptions(
            prefill_policy=config.prefill_policy or config.policy,
            decode_policy=config.decode_policy or config.policy,
            split=cast(Split, config.split),
            min_split_tokens=config.min_split_tokens,
        ),
        connect_timeout=config.connect_timeout,
        health=Rhythm(config.health_interval, config.health_timeout, config.health_failures),
        breaker=Limits(failures=config.breaker_failures),
        worker_headers=((b"authorization", b"Bearer " + key.encode()),) if key else (),
    )
