"""Several processes on one port, and one gateway that takes over from another."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import httpx
import psutil
import pytest

from baton.base.config import GatewayConfig
from baton.gateway.exposition import merged
from baton.gateway.listen import bind, bind_several
from baton.gateway.process import workers
from baton.gateway.roster import Change, Entry, Removal
from baton.gateway.table import Table
from tests.gateway.stack import CHAT
from tests.router.mocks import Exchange, Mock, run, whole

PATIENCE = 20.0
RUN = """
import sys
from baton.base.config import GatewayConfig
from baton.gateway.process import run
run(GatewayConfig(**eval(sys.argv[1])), [], [], sys.argv[2:])
"""


@dataclass
class Running:
    """A gateway in processes of its own."""

    process: asyncio.subprocess.Process
    url: str = ""
    said: list[str] = field(default_factory=list)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    async def line(self, pattern: str) -> re.Match[str]:
        """Waits for a line of its log."""
        assert self.process.stderr is not None
        async with asyncio.timeout(PATIENCE):
            while True:
                line = (await self.process.stderr.readline()).decode()
                assert line, self.said
                self.said.append(line)
                if match := re.search(pattern, line):
                    return match

    async def end(self) -> int:
        """Its exit status; what it has said is read."""
        assert self.process.stderr is not None
        async with asyncio.timeout(PATIENCE):
            self.said.append((await self.process.stderr.read()).decode())
            return await self.process.wait()


@contextlib.asynccontextmanager
async def gateway(*urls: str, **options: object) -> AsyncIterator[Running]:
    """Until the block ends; stopped then, and nothing of it may be left."""
    usual = {"port": 0, "drain_timeout": 10.0, "health_interval": 0.2}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", RUN, repr({**usual, **options}), *urls),
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    running = Running(process)
    try:
        running.url = (await running.line(r"listens on (http://\S+)"))[1]
        yield running
        children = running.children() if process.returncode is None else []
        if process.returncode is None:
            process.terminate()
        assert await running.end() == 0, running.said
        assert "Traceback" not in "".join(running.said)
        assert not psutil.wait_procs(children, timeout=5)[1]
    finally:
        if process.returncode is None:
            for child in running.children():
                child.kill()
            process.kill()
            await process.wait()
        process._transport.close()  # type: ignore[attr-defined]


async def eventually(check: Callable[[], object], seconds: float = PATIENCE) -> None:
    """`check` is asked until it is content; it may be a coroutine function."""
    async with asyncio.timeout(seconds):
        while True:
            said = check()
            if asyncio.iscoroutine(said):
                said = await said
            if said:
                return
            await asyncio.sleep(0.02)


async def alone(method: str, url: str, **options: object) -> httpx.Response:
    """On a connection of its own: the kernel chooses a process for it."""
    async with httpx.AsyncClient(timeout=15) as client:
        return await client.request(method, url, **options)  # type: ignore[arg-type]


async def everywhere(url: str, condition: Callable[[dict[str, object]], bool], times: int = 12) -> bool:
    """So many connections in a row see it: all processes do, but for one in a million tries."""
    for _ in range(times):
        if not condition((await alone("GET", f"{url}/workers")).json()):
            return False
    return True


def ticking(gate: asyncio.Event) -> Callable[[Exchange], object]:
    """A stream whose end waits for `gate`."""

    async def behave(exchange: Exchange) -> None:
        exchange.begin_stream()
        exchange.piece(b'data: {"first": 1}\n\n')
        await gate.wait()
        exchange.piece(b"data: [DONE]\n\n")
        exchange.end_stream()

    return behave


def test_two_processes_serve_and_agree_who_serves() -> None:
    async def main() -> None:
        async with Mock(whole({"one": 1})) as one, Mock(whole({"two": 2})) as two, gateway(one.url, processes=2) as g:
            assert len(g.children()) == 2
            new = {"url": two.url, "labels": {"zone": "a"}}
            assert (await alone("POST", f"{g.url}/workers", json=new)).status_code == 202
            await eventually(lambda: everywhere(g.url, lambda seen: seen["total"] == 2))
            answers = set()
            async with asyncio.timeout(PATIENCE):
                while len(answers) < 2:
                    answers.add((await alone("POST", f"{g.url}{CHAT}", json={"messages": []})).text)
            assert (await alone("DELETE", f"{g.url}/workers", params={"url": one.url})).status_code == 202
            await eventually(lambda: everywhere(g.url, lambda seen: seen["total"] == 1))
            assert (await alone("POST", f"{g.url}{CHAT}", json={"messages": []})).json() == {"two": 2}

    run(main(), 60)


def test_metrics_of_all_processes_come_from_any() -> None:
    async def main() -> None:
        async with Mock(whole({"ok": 1})) as mock, gateway(mock.url, processes=2) as g:
            for _ in range(20):
                assert (await alone("POST", f"{g.url}{CHAT}", json={"messages": []})).status_code == 200
            for _ in range(4):
                text = (await alone("GET", f"{g.url}/metrics")).text
                found = re.findall(r'^baton_gateway_requests_total\{process="(\d)".*\} (\S+)$', text, re.MULTILINE)
                assert sum(float(count) for _, count in found) == 20
                assert {process for process, _ in found} <= {"0", "1"}
                in_flight = re.findall(r'^baton_gateway_in_flight\{process="(\d)"\}', text, re.MULTILINE)
                assert in_flight == ["0", "1"]

    run(main(), 60)


def test_a_child_that_is_killed_comes_back_and_knows_who_serves() -> None:
    async def main() -> None:
        async with Mock(whole({"one": 1})) as one, Mock(whole({"two": 2})) as two, gateway(one.url, processes=2) as g:
            assert (await alone("POST", f"{g.url}/workers", json={"url": two.url})).status_code == 202
            await eventually(lambda: everywhere(g.url, lambda seen: seen["total"] == 2))
            first, second = g.children()
            first.kill()
            await g.line(r"gateway process \d ended \(status -9\)")
            await eventually(lambda: len(g.children()) == 2 and first.pid not in [c.pid for c in g.children()])
            # what the kernel gave to the dead one's socket waits for the new one
            assert await everywhere(g.url, lambda seen: seen["total"] == 2)
            assert second.is_running()

    run(main(), 60)


def test_sigterm_lets_streams_of_all_processes_finish() -> None:
    async def main() -> None:
        gate = asyncio.Event()
        async with Mock(ticking(gate)) as mock, gateway(mock.url, processes=2) as g:
            texts = [asyncio.create_task(streamed(g.url)) for _ in range(6)]
            await eventually(lambda: len(mock.seen) == 6)
            g.process.send_signal(signal.SIGINT)
            await eventually(lambda: refuses(g.url))
            gate.set()
            for text in await asyncio.gather(*texts):
                assert text.endswith("data: [DONE]\n\n")
            assert await g.end() == 0

    run(main(), 60)


def test_children_end_with_their_parent() -> None:
    async def main() -> None:
        async with Mock(whole({})) as mock:
            with contextlib.suppress(AssertionError):  # the status is SIGKILL's
                async with gateway(mock.url, processes=2) as g:
                    children = g.children()
                    g.process.kill()
                    await g.process.wait()
            assert not psutil.wait_procs(children, timeout=10)[1]

    run(main(), 60)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_roll_loses_neither_streams_nor_requests(processes: int) -> None:
    async def main() -> None:
        gate = asyncio.Event()
        stream = ticking(gate)

        async def behave(exchange: Exchange) -> None:
            if exchange.json.get("stream"):
                await stream(exchange)  # type: ignore[misc]
            else:
                exchange.whole({"ok": 1})

        options = {"reuse_port": True, "processes": processes}
        async with Mock(behave) as mock, gateway(mock.url, **options) as old:
            port = int(old.url.rpartition(":")[2])
            texts = [asyncio.create_task(streamed(old.url)) for _ in range(4)]
            await eventually(lambda: len(mock.seen) == 4)
            stop = asyncio.Event()
            loops = [asyncio.create_task(asked(old.url, stop, keep_alive=index % 2 == 0)) for index in range(4)]
            async with gateway(mock.url, **{**options, "port": port}) as new:
                assert new.url == old.url
                old.process.terminate()
                counts = await counted(loops, stop, more=100)
                gate.set()
                for text in await asyncio.gather(*texts):
                    assert text == 'data: {"first": 1}\n\ndata: [DONE]\n\n'
                assert await old.end() == 0
                assert min(counts) > 0
                assert (await alone("POST", f"{new.url}{CHAT}", json={})).json() == {"ok": 1}

    run(main(), 90)


async def streamed(url: str) -> str:
    return (await alone("POST", f"{url}{CHAT}", json={"messages": [], "stream": True})).text


async def refuses(url: str) -> bool:
    try:
        await alone("GET", f"{url}/health")
    except httpx.ConnectError:
        return True
    return False


async def asked(url: str, stop: asyncio.Event, *, keep_alive: bool) -> int:
    """Requests in a loop, none of which may fail."""
    count = 0
    limits = httpx.Limits(max_keepalive_connections=1 if keep_alive else 0)
    async with httpx.AsyncClient(timeout=15, limits=limits) as client:
        while not stop.is_set():
            reply = await client.post(f"{url}{CHAT}", json={"messages": []})
            assert (reply.status_code, reply.json()) == (200, {"ok": 1})
            count += 1
    return count


async def counted(loops: list[asyncio.Task[int]], stop: asyncio.Event, more: int) -> list[int]:
    """The loops go on for a while in which every one of them asks often."""
    async with asyncio.timeout(PATIENCE):
        for _ in range(more):
            assert not any(task.done() for task in loops), [task for task in loops if task.done()]
            await asyncio.sleep(0.02)
    stop.set()
    return await asyncio.gather(*loops)


# --- parts


def test_expositions_of_several_processes_keep_families_together() -> None:
    texts = {
        1: b'# HELP a_total A\n# TYPE a_total counter\na_total{x="{ y"} 1.0\n# HELP b B\n# TYPE b gauge\nb 2.0\n',
        0: b"# HELP b B\n# TYPE b gauge\nb 3.0\n",
    }
    assert merged(texts).decode().splitlines() == [
        "# HELP b B",
        "# TYPE b gauge",
        'b{process="0"} 3.0',
        'b{process="1"} 2.0',
        "# HELP a_total A",
        "# TYPE a_total counter",
        'a_total{process="1",x="{ y"} 1.0',
    ]


def test_the_table_is_what_a_late_process_must_be_told() -> None:
    table = Table()
    table.apply(Entry("http://a:1", "decode"), 0.0)
    table.apply(Entry("http://b:1", ttl=10.0, instance="x"), 0.0)
    table.apply(Change("http://a:1", labels={"zone": "1"}, ttl=5.0), 1.0)
    table.apply(Entry("http://a:1", "decode", ttl=5.0), 2.0)
    assert table.events(9.0) == [Entry("http://a:1", "decode"), Entry("http://b:1", ttl=10.0, instance="x")]
    table.apply(Change("http://b:1", instance="y"), 9.0)
    assert table.events(18.0)[1] == Entry("http://b:1", ttl=10.0, instance="y")
    assert len(table.events(19.5)) == 1
    table.apply(Removal("http://a:1", 1.0, "z"), 20.0)
    assert table.events(20.0) == [Removal("http://a:1", 1.0, "z")]


def test_a_port_is_shared_only_among_those_who_agreed() -> None:
    with bind("127.0.0.1", 0, reuse=True) as one:
        port = one.getsockname()[1]
        with pytest.raises(Exception, match="Address already in use"):
            bind("127.0.0.1", port)
        with pytest.raises(Exception, match="Address already in use"):
            bind_several("127.0.0.1", port, 2, reuse=False)
        for socket in bind_several("127.0.0.1", port, 2, reuse=True):
            assert socket.getsockname()[1] == port
            socket.close()


def test_several_processes_that_cannot_start_say_why() -> None:
    async def main() -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", RUN, repr({"port": 0, "processes": 2, "api_keys": "/nowhere.toml"})),
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await asyncio.wait_for(process.communicate(), PATIENCE)
        assert process.returncode == 1
        assert b"/nowhere.toml" in errors.splitlines()[-1]
        assert b"ConfigError" in errors.splitlines()[-1]

    run(main(), 30)


def test_a_worker_given_twice_is_a_mistake() -> None:
    with pytest.raises(Exception, match="http://a:1 is given twice"):
        workers([], ["http://a:1"], ["http://a:1/"])
    assert GatewayConfig().processes == 1
