"""vLLM's workers: first prefill, then decode with what prefill said.

    P: the request for one token ──▶ complete answer with `kv_transfer_params` ──▶ D: the request itself, and these

Every attempt prefills anew, with a request id of its own on both legs: parameters that are used twice, or after their
blocks were freed, give a wrong answer with status 200.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

import msgspec
from msgspec.structs import replace

from baton.router import splice
from baton.router.call import Failure
from baton.router.dialects import handover
from baton.router.dialects.mooncake import Directory, Engine
from baton.router.dialects.whole import Whole
from baton.router.legs import Leg, Legs, Pulse
from baton.router.registry import Connector, Registry, Worker
from baton.router.sequential import Sequential
from baton.router.target import Parcel, Target, dispatch

log = logging.getLogger("baton.gateway")

UNUSABLE = "no_kv_params"
"""Kind of error: a prefill worker answered without what decode needs."""
_REQUEST_ID = re.compile(rb"^(x-request-id: [^\r]*)", re.MULTILINE)


class Transfer(Protocol):
    """One attempt's hand-over."""

    @property
    def ask(self) -> bytes:
        """The prefill leg's parameters, JSON."""
        ...

    def give(self, answer: bytes) -> bytes | None:
        """The decode leg's, from prefill's answer; None: there is nothing to hand over."""
        ...


class Handshake(Protocol):
    """How the workers of one connector find each other."""

    def begin(self, prefill: Worker, then: Callable[[Transfer | Failure], None]) -> None:
        """`then` hears, now or later, what this attempt is to say."""
        ...

    def failed(self, prefill: Worker) -> None: ...


class Vllm:
    """`close` ends what it has begun by itself."""

    def __init__(
        self, registry: Registry, loop: asyncio.AbstractEventLoop, random: Random, connect_timeout: float
    ) -> None:
        self._registry, self._loop, self._random = registry, loop, random
        self._whole = Whole(registry, loop)
        self.directory = Directory(loop, connect_timeout)
        nixl = Nixl()
        self._handshakes: dict[Connector, Handshake] = {
            "": nixl,
            "nixl": nixl,
            "nixl-push": nixl,  # the same words; only who copies is another
            "mooncake": Mooncake(self.directory, random),
        }

    async def close(self) -> None:
        await self.directory.close()

    def send(self, target: Target, parcel: Parcel, pulse: Pulse) -> Legs:
        body, prefill, decode = parcel.body, target.prefill, target.answering
        assert prefill is not None
        members = splice.members(body)
        if not handover.divisible(body, members):
            return self._whole.send(target, parcel, pulse)
        handshake = self._handshakes[prefill.connector or decode.connector]
        parcel = replace(parcel, headers=self._renamed(parcel.headers))
        now = self._loop.time()
        answer = Leg("decode", decode, body.prompt_tokens + body.max_tokens, self._registry, now)
        receipt = Leg("prefill", prefill, target.uncached, self._registry, now)
        legs = Sequential(pulse, self._loop, answer, receipt, failed=lambda: handshake.failed(prefill))
        answer.call.notify = legs.on_answer
        receipt.call.notify = legs.on_receipt

        def begin(transfer: Transfer | Failure) -> None:
            if isinstance(transfer, Failure):
                legs.refuse(transfer)
                return
            legs.proceed = lambda said: dispatch(answer, parcel, self._decode_body(parcel, prefill, transfer, said))
            dispatch(receipt, parcel, handover.prefill_body(parcel.path, members, transfer.ask))

        handshake.begin(prefill, begin)
        return legs

    def _decode_body(self, parcel: Parcel, prefill: Worker, transfer: Transfer, said: bytes) -> bytes:
        params = transfer.give(said)
        if params is None:
            if UNUSABLE not in prefill.errors:
                log.warning("%r answered without usable kv_transfer_params: decode workers prefill again", prefill)
            self._registry.noted(prefill, UNUSABLE)
        return handover.decode_body(parcel.body, params)

    def _renamed(self, headers: bytes) -> bytes:
        """The client's request id would be used again by the next attempt, and perhaps by other requests."""
        return _REQUEST_ID.sub(rb"\1-%016x" % self._random.getrandbits(64), headers)


class Nixl:
    """Prefill's answer says everything, so nothing has to be known before."""

    ask = handover.ASK

    def begin(self, prefill: Worker, then: Callable[[Transfer | Failure], None]) -> None:
        then(self)

    def failed(self, prefill: Worker) -> None:
        """There is nothing to forget."""

    def give(self, answer: bytes) -> bytes | None:
        return handover.nixl_params(answer)


class Mooncake:
    """Prefill's answer says nothing: the name of the transfer is ours, the engine is known to its bootstrap server."""

    def __init__(self, directory: Directory, random: Random) -> None:
        self._directory, self._random = directory, random

    def begin(self, prefill: Worker, then: Callable[[Transfer | Failure], None]) -> None:
        transfer = f"xfer-{self._random.getrandbits(128):032x}"

        def told(engine: Engine | Failure) -> None:
            then(engine if isinstance(engine, Failure) else Push(transfer, engine))

        self._directory.find(prefill, told)

    def failed(self, prefill: Worker) -> None:
        self._directory.forget(prefill)


@dataclass(frozen=True, slots=True)
class Push:
    """Mooncake's hand-over."""

    transfer: str
    engine: Engine

    @property
    def ask(self) -> bytes:
        return msgspec.json.encode({"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": self.transfer})

    def give(self, answer: bytes) -> bytes | None:
        if handover.stopped(answer):
            return None
        return msgspec.json.encode(
            {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "transfer_id": self.transfer,
                "remote_bootstrap_addr": self.engine.address,
                "remote_engine_id": self.engine.id,
            }
        )
