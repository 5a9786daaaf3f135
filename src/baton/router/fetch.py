"""Control requests to workers: a whole request, a whole reply, a deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from baton.router.call import Fault, Header
from baton.router.origin import Origin
from baton.router.upstream import Pool


def request_bytes(origin: Origin, method: str, path: str, headers: Iterable[Header] = (), body: bytes = b"") -> bytes:
    """A whole HTTP/1.1 request. Names and values must be free of CR and LF."""
    lines = [f"{method} {path} HTTP/1.1\r\nhost: {origin.authority}\r\n".encode("ascii")]
    for name, value in headers:
        lines += (name, b": ", value, b"\r\n")
    if body or method not in ("GET", "HEAD"):
        lines.append(b"content-length: %d\r\n" % len(body))
    lines += (b"\r\n", body)
    return b"".join(lines)


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply, for control requests."""

    status: int
    headers: tuple[Header, ...]
    body: bytes

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300


class FetchFailed(Exception):
    """The worker gave no reply; the message says why."""


class Silence(FetchFailed):
    """Because nothing came in time, which is not even a refusal."""


async def fetch(
    pool: Pool,
    method: str,
    path: str,
    *,
    headers: Iterable[Header] = (),
    body: bytes = b"",
    timeout: float,
    limit: int = 16 << 20,
) -> Reply:
    """One whole exchange for control requests. A stale connection is replaced once. Raises `FetchFailed`."""
    request = request_bytes(pool.origin, method, path, headers, body)
    for fresh in (False, True):
        news = asyncio.Event()
        call = pool.call(request, lambda _, news=news: news.set(), fresh=fresh)  # type: ignore[misc]
        parts = []
        try:
            async with asyncio.timeout(timeout):
                while not call.done:
                    await news.wait()
                    news.clear()
                    parts.append(call.take())
                    if call.received > limit:
                        raise FetchFailed(f"{path}: more than {limit} bytes")
        except TimeoutError:
            raise Silence(f"{path}: no reply within {timeout:g} s") from None
        finally:
            call.cancel()
        if call.complete:
            parts.append(call.take())
            return Reply(call.status, tuple(call.headers), b"".join(parts))
        failure = call.failure
        if failure is None or failure.fault is not Fault.STALE:
            break
    kind = Silence if failure is not None and failure.fault is Fault.SILENT else FetchFailed
    raise kind(f"{path}: {failure.message if failure else 'no reply'}")
