"""Everything that does not generate: health, what the worker is, how busy it is, and the few levers."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import Receive, Scope, Send

from baton import __version__
from baton.api.dialect import decode
from baton.base.errors import BadRequest, NotFound, Unavailable
from baton.base.messages import Load, Ready
from baton.worker.client import Heard
from baton.worker.http import read_body, reply, reply_json
from baton.worker.metrics import FrontCollector, render
from baton.worker.state import FrontState

HEALTH_TIMEOUT = 4.0
"""Seconds `/health` waits for the engine's answer (routers give it 5)."""
LOAD_TIMEOUT = 1.0
"""Seconds load reports wait before they report the last known state."""


class AbortRequest(msgspec.Struct):
    rid: str | None = None
    abort_all: bool = False


class TokenizeRequest(msgspec.Struct):
    """vLLM's and SGLang's; `text` is another name for `prompt`."""

    prompt: str | list[str] | None = None
    text: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct):
    tokens: list[int]
    skip_special_tokens: bool = False


class InfoRoutes:
    def __init__(self, state: FrontState) -> None:
        self._state = state
        self._abort = msgspec.json.Decoder(AbortRequest)
        self._tokenize = msgspec.json.Decoder(TokenizeRequest)
        self._detokenize = msgspec.json.Decoder(DetokenizeRequest)

    # --- health ------------------------------------------------------------------------------------------------

    async def health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 if the engine has said something lately, or answers now. Cheap: nothing is generated."""
        if self._state.draining:
            raise Unavailable("the worker is shutting down")
        self._state.client.require()
        if not await self._state.client.alive(HEALTH_TIMEOUT):
            raise Unavailable("the engine does not answer")
        await reply_json(send, {"status": "ok"})

    async def ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 if a request would be taken; asks nobody."""
        _ = self._state.context
        await reply_json(send, {"status": "ready"})

    # --- what it is ----------------------------------------------------------------------------------------------

    async def models(self, scope: Scope, receive: Receive, send: Send) -> None:
        await reply_json(send, {"object": "list", "data": [self._card()]})

    async def model(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = scope["path_params"]["id"]
        card = self._card()
        if wanted != card["id"]:
            error = NotFound(f'the model "{wanted}" is not served here; served: {card["id"]}', param="model")
            raise error
        await reply_json(send, card)

    async def model_info(self, scope: Scope, receive: Receive, send: Send) -> None:
        state, ready = self._state, self._state.client.ready
        architectures = list(ready.architectures) if ready is not None else []
        info = {
            "model_path": ready.model_path if ready is not None else state.engine.model,
            "served_model_name": state.served_name,
            "tokenizer_path": state.engine.tokenizer_path or state.model_dir,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": "default",
            "load_format": state.engine.load_format,
            "reasoning_parser": _named(state.worker.reasoning_parser),
            "tool_call_parser": _named(state.worker.tool_call_parser),
            "disaggregation_mode": state.disagg.mode,
            "has_image_understanding": False,
            "has_audio_understanding": False,
            "model_type": architectures[0].removesuffix("ForCausalLM").lower() if architectures else None,
            "architectures": architectures,
        }
        await reply_json(send, info)

    async def server_info(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The resolved configuration, flat, under SGLang's names where they mean the same."""
        state, ready = self._state, self._state.client.ready
        engine = dataclasses.asdict(state.engine)
        worker = dataclasses.asdict(state.worker)
        del worker["api_key"], worker["register_key"]
        disagg = {f"disaggregation_{key}": value for key, value in dataclasses.asdict(state.disagg).items()}
        learned = _learned(ready) if ready is not None else {}
        load = await state.client.load(LOAD_TIMEOUT)
        info = {
            **engine,
            **worker,
            **disagg,
            "disaggregation_transfer_backend": state.disagg.transport,
            "model_path": state.engine.model,
            "tokenizer_path": state.engine.tokenizer_path or state.model_dir,
            "served_model_name": state.served_name,
            "pp_size": 1,
            "load_balance_method": "round_robin",
            "status": "ready" if state.client.connected else "starting",
            "startup_time": state.started,
            "version": __version__,
            "frontend": "python",
            "kv_event_sources": [],
            **learned,
            "internal_states": [self._load_entry(load, ready)] if load is not None and ready is not None else [],
        }
        await reply_json(send, info)

    def _card(self) -> dict[str, Any]:
        ready = self._state.client.ready
        return {
            "id": self._state.served_name,
            "object": "model",
            "created": int(self._state.started),
            "owned_by": "baton",
            "root": ready.model_path if ready is not None else self._state.engine.model,
            "parent": None,
            "max_model_len": ready.max_model_len if ready is not None else None,
        }

    # --- how busy it is ------------------------------------------------------------------------------------------

    async def loads(self, scope: Scope, receive: Receive, send: Send) -> None:
        load, ready = await self._load()
        body = {
            "timestamp": time.time(),
            "version": __version__,
            "accelerator": ready.device,
            "num_accelerators": 1,
            "loads": [self._load_entry(load, ready)],
        }
        await reply_json(send, body)

    async def get_load(self, scope: Scope, receive: Receive, send: Send) -> None:
        """SGLang's older form, which sglang-router's power_of_two policy reads."""
        load, ready = await self._load()
        used = (load.total_pages - load.free_pages) * ready.page_size
        entry = {"dp_rank": 0, "num_reqs": load.running + load.waiting, "num_waiting_reqs": load.waiting}
        await reply_json(send, [{**entry, "num_tokens": used + load.waiting_tokens}])

    async def metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = self._state
        load = await state.client.load(LOAD_TIMEOUT)
        role = "unified" if state.disagg.mode == "null" else state.disagg.mode
        collector = FrontCollector(state.metrics, state.served_name, role, lambda: (state.client.ready, load))
        await reply(send, 200, render(collector), content_type=CONTENT_TYPE_LATEST.encode())

    async def _load(self) -> tuple[Load, Ready]:
        self._state.client.require()
        load, ready = await self._state.client.load(LOAD_TIMEOUT), self._state.client.ready
        if load is None or ready is None:
            raise Unavailable("the engine does not answer")
        return load, ready

    def _load_entry(self, load: Load, ready: Ready) -> dict[str, Any]:
        used = (load.total_pages - load.free_pages) * ready.page_size
        total = load.total_pages * ready.page_size
        mode, client = self._state.disagg.mode, self._state.client
        usage = used / max(total, 1)
        return {
            "dp_rank": 0,
            "timestamp": time.time(),
            "num_running_reqs": load.running,
            "num_waiting_reqs": load.waiting,
            "num_waiting_uncached_tokens": load.waiting_tokens,
            "num_used_tokens": used,
            "num_total_tokens": used + load.waiting_tokens,
            "num_active_tokens": used,
            "num_prealloc_ready_tokens": 0,
            "max_total_num_tokens": total,
            "max_running_requests": self._state.engine.max_running_requests,
            "token_usage": usage,
            "gen_throughput": _rate(client.before, client.heard),
            "cache_hit_rate": load.cached_tokens / max(load.cached_tokens + load.prompt_tokens, 1),
            "utilization": max(usage, load.running / max(self._state.engine.max_running_requests, 1)),
            "total_prefill_uncached_tokens": load.prompt_tokens,
            "total_prefill_busy_us": int(load.busy_seconds * 1e6),
            "memory": {"token_capacity": total},
            "disaggregation": {
                "mode": mode,
                "prefill_bootstrap_queue_reqs": 0,
                "prefill_inflight_queue_reqs": load.handoffs if mode == "prefill" else 0,
                "decode_prealloc_queue_reqs": load.handoffs_waiting,
                "decode_transfer_queue_reqs": load.handoffs if mode == "decode" else 0,
                "decode_retracted_queue_reqs": 0,
                "kv_transfer_speed_gb_s": load.handoff_bytes / 1e9 / load.handoff_seconds
                if load.handoff_seconds
                else 0,
                "kv_transfer_latency_ms": load.handoff_seconds * 1e3 / max(load.handoffs_done, 1),
                "handoffs_done": load.handoffs_done,
                "handoffs_failed": load.handoffs_failed,
            },
            "queues": {"waiting": load.waiting, "retracted": 0},
            "pages": {
                "free": load.free_pages,
                "cached": load.cached_pages,
                "total": load.total_pages,
                "quarantined": load.quarantined_pages,
            },
        }

    # --- levers --------------------------------------------------------------------------------------------------

    async def flush_cache(self, scope: Scope, receive: Receive, send: Send) -> None:
        """400 while sequences are open; else the prefix cache is emptied."""
        client = self._state.client
        client.require()
        load = await client.load(LOAD_TIMEOUT)
        busy = client.open_count or (load is not None and load.running + load.waiting + load.handoffs)
        if busy:
            raise BadRequest("the cache cannot be flushed while requests are running")
        flushed = await client.flush(HEALTH_TIMEOUT)
        await reply_json(send, {"success": flushed.ok, "pages": flushed.pages})

    async def abort_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Every request whose id begins with `rid`; an empty one without `abort_all` is ignored."""
        request: AbortRequest = decode(self._abort, await read_body(scope, receive, self._state.max_body) or b"{}")
        if request.abort_all:
            self._state.client.abort("")
        elif request.rid:
            self._state.client.abort(request.rid)
        await reply(send, 200, b"")

    # --- text ----------------------------------------------------------------------------------------------------

    async def tokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(scope, receive, self._state.max_body)
        request: TokenizeRequest = decode(self._tokenize, body)
        prompt = request.prompt if request.prompt is not None else request.text
        if prompt is None:
            raise BadRequest("prompt is missing", param="prompt")
        texts = prompt if isinstance(prompt, list) else [prompt]
        tokenizer = self._state.tokenizer
        rows = [tokenizer.encode(text, special=request.add_special_tokens) for text in texts]
        many = isinstance(prompt, list)
        answer: dict[str, Any] = {
            "tokens": rows if many else rows[0],
            "count": [len(row) for row in rows] if many else len(rows[0]),
            "max_model_len": self._card()["max_model_len"],
        }
        if request.return_token_strs:
            names = [[tokenizer.token_text(token) for token in row] for row in rows]
            answer["token_strs"] = names if many else names[0]
        await reply_json(send, answer)

    async def detokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(scope, receive, self._state.max_body)
        request: DetokenizeRequest = decode(self._detokenize, body)
        _check_ids(request.tokens, self._state.tokenizer.vocab_size)
        text = self._state.tokenizer.decode(request.tokens, skip_special=request.skip_special_tokens)
        await reply_json(send, {"prompt": text, "text": text})


def _check_ids(tokens: Sequence[int], vocab_size: int) -> None:
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
        raise BadRequest(f"token ids must be at least 0 and less than {vocab_size}", param="tokens")


def _named(choice: str) -> str | None:
    """SGLang's clients know null, not "none"."""
    return None if choice == "none" else choice


def _learned(ready: Ready) -> dict[str, Any]:
    """What only the engine knows."""
    return {
        "max_total_num_tokens": ready.num_pages * ready.page_size,
        "max_model_len": ready.max_model_len,
        "context_length": ready.max_model_len,
        "page_size": ready.page_size,
        "kv_pages": ready.num_pages,
        "dtype": ready.dtype,
        "weight_dtype": ready.weight_dtype,
        "device": ready.device,
        "instance": ready.instance,
        "engine_pid": ready.pid,
        "disaggregation_bootstrap_port": ready.bootstrap_port or None,
        "transports": list(ready.transports),
    }


def _rate(before: Heard | None, now: Heard | None) -> float:
    """Tokens per second between the last two reports."""
    if before is None or now is None or now.at <= before.at:
        return 0.0
    return max(0, now.load.generated_tokens - before.load.generated_tokens) / (now.at - before.at)
