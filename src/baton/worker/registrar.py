"""Tells gateways that this worker is there, again and again, and at the end that it goes.

    starting ── ready ──▶ POST /workers, every ttl / 3 ── SIGTERM ──▶ DELETE /workers?url=, then no new requests

A gateway that cannot be reached, or has forgotten us because it was restarted, is told at the next beat: registering
and renewing are the same request. Nothing that a gateway does or fails to do harms the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import msgspec

from baton.base.errors import ConfigError

log = logging.getLogger("baton.front")

READY_CHECK = 0.1
"""Seconds between two looks whether the engine is there."""
RETRY = 1.0
"""Seconds until a gateway that did not take it is told again, if the ttl allows as much."""
TIMEOUT = 2.0
"""Seconds a gateway has to answer."""
GOODBYE = 1.0
"""The same at the end, when somebody waits for us to go."""
EVERYWHERE = ("0.0.0.0", "::", "")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
JSON = {"content-type": "application/json"}


class Card(msgspec.Struct, frozen=True):
    """What a gateway is told: the body of `POST /workers`."""

    url: str
    worker_type: str
    bootstrap_port: int | None
    instance: str
    ttl: float
    runtime: str = "baton"


@dataclass(frozen=True, slots=True)
class Place:
    """Where this worker is reached."""

    host: str
    port: int
    advertised: str = ""
    """The whole URL, for those who know better."""

    async def seen_from(self, gateway: str) -> str:
        """The URL to tell it. Raises `OSError` if there is no way from here to the gateway."""
        if self.advertised:
            return self.advertised
        host = await asyncio.to_thread(_own_address, gateway) if self.host in EVERYWHERE else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


class Registrar:
    """`run` until it is cancelled, then `leave`."""

    def __init__(
        self, gateways: Sequence[str], place: Place, key: str, ttl: float, card: Callable[[str], Card | None]
    ) -> None:
        """`card`: what to tell, for the URL at which we are reached; None while there is no engine yet. Raises
        `ConfigError` for URLs that are none."""
        self._gateways = [_checked(gateway, "--register") for gateway in gateways]
        self._place = place
        self._ttl = ttl
        self._card = card
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._urls: dict[str, str] = {}
        """As which URL the gateways were told of us."""
        self._said: dict[str, str] = {}
        """What was wrong the last time; "": nothing."""
        if place.advertised:
            _checked(place.advertised, "--advertise-url")
        elif place.host in LOOPBACK:
            for gateway in self._gateways:
                if urlsplit(gateway).hostname not in LOOPBACK:
                    log.warning(
                        "%s will look for this worker at %s; give --host or --advertise-url", gateway, place.host
                    )

    async def run(self) -> None:
        async with httpx.AsyncClient(headers=self._headers, timeout=TIMEOUT, trust_env=False) as client:
            await asyncio.gather(*(self._look_after(client, gateway) for gateway in self._gateways))

    async def leave(self) -> None:
        """Gateways send nothing more. Raises nothing, and takes `GOODBYE` seconds at most."""
        async with httpx.AsyncClient(headers=self._headers, timeout=GOODBYE, trust_env=False) as client:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GOODBYE):
                    await asyncio.gather(*(_deregister(client, *known) for known in self._urls.items()))

    async def _look_after(self, client: httpx.AsyncClient, gateway: str) -> None:
        while True:
            problem = await self._register(client, gateway)
            if problem is None:
                await asyncio.sleep(READY_CHECK)
                continue
            if self._said.get(gateway) != problem:  # only news are logged
                self._said[gateway] = problem
                if problem:
                    log.warning("gateway %s: %s; trying again", gateway, problem)
                else:
                    log.info("registered with gateway %s as %s", gateway, self._urls[gateway])
            await asyncio.sleep(min(RETRY, self._ttl / 3) if problem else self._ttl / 3)

    async def _register(self, client: httpx.AsyncClient, gateway: str) -> str | None:
        """What is wrong; "" if it is registered, None if there is nothing to register yet."""
        try:
            url = self._urls.get(gateway) or await self._place.seen_from(gateway)
            card = self._card(url)
            if card is None:
                return None
            self._urls[gateway] = url  # before it is told: who is not sure whether it was, deregisters
            reply = await client.post(f"{gateway}/workers", content=msgspec.json.encode(card), headers=JSON)
        except httpx.HTTPError as error:
            return f"it cannot be reached ({type(error).__name__})"
        except OSError as error:
            return f"there is no way there ({error.strerror}); give --advertise-url"
        return "" if reply.is_success else f"it answers {reply.status_code}: {reply.text[:200]}"


async def _deregister(client: httpx.AsyncClient, gateway: str, url: str) -> None:
    with contextlib.suppress(httpx.HTTPError):
        await client.delete(f"{gateway}/workers", params={"url": url})


def secret(value: str) -> str:
    """A key as it was given, or the contents of the file that `@FILE` names. Raises `ConfigError`."""
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the key in {value[1:]} cannot be read: {error}") from error


def _checked(url: str, option: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f'{option}: "{url}" is no URL; write http://HOST:PORT')
    return url.rstrip("/")


def _own_address(gateway: str) -> str:
    """The address from which packets go to the gateway; none is sent. Looks up its name. Raises `OSError`."""
    parts = urlsplit(gateway)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    family, kind, _, _, address = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
