from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from baton.transports.base import Transport, create
from baton.transports.loopback import LoopbackTransport, Network
from baton.transports.region import Region
from tests.disagg.pair import Pair, worker

TRANSPORTS = ("loopback", "shm", "tcp")


@pytest.fixture
def make_pair() -> Iterator[Callable[..., Pair]]:
    """Pairs over any transport; closed at the end."""
    made: list[Pair] = []

    def make(transport: str = "loopback", prefill: dict[str, object] | None = None, **options: object) -> Pair:
        woken, network = threading.Event(), Network()

        def transports(region: Region) -> dict[str, Transport]:
            if transport == "loopback":
                return {"loopback": LoopbackTransport(region, woken.set, network)}
            return {transport: create(transport, region, woken.set)}

        options = {"transports": transports, **options}
        p = worker("prefill", woken.set, **{**options, **(prefill or {})})  # type: ignore[arg-type]
        d = worker("decode", woken.set, **options)  # type: ignore[arg-type]
        made.append(Pair(p, d, woken))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name
