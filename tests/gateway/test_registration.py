"""Workers that register themselves, renew, drain and expire; what the gateway says of where requests go."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from baton.base.config import GatewayConfig
from baton.gateway.process import serving
from baton.gateway.roster import Entry, Event, Roster
from baton.router.ask import Ask
from baton.router.registry import Worker
from baton.router.router import Router, RouterOptions
from tests.gateway.stack import CHAT, RECEIPT, Stack, stack, with_stack
from tests.router.mocks import Exchange, Mock, events, hang, reset, run, until, whole

BATON = {"instance": "first", "served_model_name": "m"}


@contextlib.asynccontextmanager
async def empty(**options: Any) -> AsyncIterator[Stack]:
    """A gateway before which there are no workers."""
    config = GatewayConfig(port=0, **{"drain_timeout": 5.0, "health_interval": 0.2, "worker_wait": 0.0, **options})
    async with (
        serving(config) as (gateway, _, port),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=15) as client,
    ):
        nobody = Mock(hang)
        yield Stack(gateway, client, nobody, nobody, f"http://127.0.0.1:{port}")


async def register(s: Stack, mock: Mock, **card: Any) -> httpx.Response:
    new = {"url": mock.url, "worker_type": "decode", "runtime": "baton", "instance": "first", "ttl": 30.0, **card}
    return await s.client.post("/workers", json=new)


def known(s: Stack, mock: Mock) -> Worker:
    return s.gateway.router.registry.find(mock.url)


async def usable(s: Stack, *mocks: Mock) -> None:
    await until(lambda: all(known(s, mock) in s.gateway.router.registry.snapshot.workers for mock in mocks))


# --- coming and staying


def test_a_gateway_without_workers_serves_those_that_come() -> None:
    async def main() -> None:
        async with Mock(whole({"ok": 1}), BATON) as mock, empty() as s:
            assert (await s.post()).status_code == 503
            reply = await s.client.get("/readiness")
            assert (reply.status_code, reply.json()["status"]) == (503, "not_ready")
            assert (await register(s, mock)).status_code == 202
            await usable(s, mock)
            assert (await s.post()).json() == {"ok": 1}
            assert (await s.client.get("/readiness")).json()["status"] == "ready"

    run(main())


def test_registering_again_renews_and_silence_expires() -> None:
    async def main() -> None:
        async with Mock(whole({}), BATON) as mock, empty() as s:
            await register(s, mock, ttl=30.0)
            worker, first = known(s, mock), known(s, mock).expires
            reply = await register(s, mock, ttl=60.0)
            assert (reply.status_code, reply.json()["worker_id"]) == (200, worker.id)
            assert first is not None
            assert worker.expires is not None
            assert worker.expires > first + 29
            shown = (await s.client.get(f"/workers/{worker.id}")).json()
            assert 59 < shown["expires_in"] <= 60
            assert (await register(s, mock, ttl=0.1)).status_code == 200
            await until(lambda: not s.gateway.router.registry.workers)
            assert (await register(s, mock)).status_code == 202  # it was not removed by anybody: it may come back

    run(main())


def test_a_heartbeat_does_not_make_a_worker_expire_that_was_registered_to_stay() -> None:
    async def check(s: Stack) -> None:
        reply = await register(s, s.decode, runtime=None, ttl=0.2)
        assert reply.status_code == 200
        assert known(s, s.decode).expires is None

    with_stack(hang, hang, check)


def test_another_start_of_a_worker_is_a_new_one_for_policies() -> None:
    async def main() -> None:
        async with Mock(whole({}), dict(BATON)) as mock, empty(decode_policy="cache_aware") as s:
            await register(s, mock)
            await usable(s, mock)
            worker, router = known(s, mock), s.gateway.router
            prompt = Ask(1000, 10, b'"' + b"word " * 2000 + b'"')
            router.plan(prompt, "m")
            assert "cached" in router.planner.explain(prompt, "m").why[0]
            for _ in range(3):
                router.registry.failed(worker, "reset", asyncio.get_running_loop().time())
            mock.info["instance"] = "second"
            assert (await register(s, mock, instance="second")).status_code == 200
            assert (worker.instance, worker.revision, worker.breaker.opened) == ("second", 2, False)
            assert "nobody has a beginning" in router.planner.explain(prompt, "m").why[0]
            assert worker in router.registry.snapshot.workers

    run(main())


def test_a_worker_that_comes_back_in_another_role_takes_its_own_place() -> None:
    async def main() -> None:
        async with Mock(whole({}), BATON) as mock, empty() as s:
            await register(s, mock)
            old = known(s, mock)
            assert (await register(s, mock, worker_type="regular", instance="second")).status_code == 202
            assert known(s, mock) is not old
            assert known(s, mock).role == "regular"
            await usable(s, mock)
            assert s.gateway.router.registry.workers == (known(s, mock),)
            to_stay = {"url": mock.url, "worker_type": "decode"}
            assert (await s.client.post("/workers", json=to_stay)).status_code == 400

    run(main())


@pytest.mark.parametrize(
    "card",
    [{"ttl": 0}, {"ttl": -1}, {"bootstrap_port": 70000}, {"labels": {"a": 1}}, {"runtime": "x"}, {"api_key": "k"}],
)
def test_bad_cards_are_refused(card: dict[str, Any]) -> None:
    async def main() -> None:
        async with empty(worker_api_key="the right one") as s:
            assert (await register(s, s.decode, **card)).status_code == 400
            assert s.gateway.router.registry.workers == ()

    run(main())


def test_what_sglang_router_takes_is_taken() -> None:
    async def main() -> None:
        async with Mock(whole({"ok": 1})) as mock, empty(worker_api_key="k") as s:
            new = {
                "url": mock.url, "api_key": "k", "model_id": "mine", "runtime": None, "labels": {"zone": "a"},
                "priority": 5, "cost": 1.5, "disable_health_check": False, "health_check_timeout_secs": 3,
            }  # fmt: skip
            assert (await s.client.post("/workers", json=new)).status_code == 202
            await usable(s, mock)
            shown = (await s.client.get("/workers")).json()["workers"][0]
            assert (shown["model_id"], shown["labels"]) == ("mine", {"zone": "a"})
            place = f"/workers/{shown['id']}"
            assert (await s.client.put(place, json={"labels": {"zone": "b"}, "priority": 1})).status_code == 202
            assert (await s.client.put(place, json={"bootstrap_port": 9000})).status_code == 202
            shown = (await s.client.get(place)).json()
            assert (shown["labels"], shown["bootstrap_port"]) == ({"zone": "b"}, 9000)
            assert (await s.client.put(place, json={"worker_type": "decode"})).status_code == 400
            assert (await s.client.put("/workers/nobody", json={})).status_code == 404

    run(main())


def test_an_empty_put_is_a_heartbeat() -> None:
    async def main() -> None:
        async with Mock(whole({}), BATON) as mock, empty() as s:
            await register(s, mock, ttl=20.0)
            worker = known(s, mock)
            worker.expires = 0.0
            assert (await s.client.put(f"/workers/{worker.id}")).status_code == 202
            assert worker.expires > asyncio.get_running_loop().time() + 19

    run(main())


# --- going


async def begun(exchange: Exchange, gate: asyncio.Event) -> None:
    exchange.begin_stream()
    exchange.piece(b"data: 1\n\n")
    await gate.wait()
    exchange.piece(b"data: [DONE]\n\n")
    exchange.end_stream()


def test_removal_drains_and_the_answer_does_not_wait_for_it() -> None:
    async def main() -> None:
        gate = asyncio.Event()
        async with (
            Mock(lambda e: begun(e, gate), BATON) as mock,
            Mock(whole({"other": 1}), BATON) as other,
            empty() as s,
        ):
            await register(s, mock)
            await usable(s, mock)
            stream = asyncio.create_task(s.post(json={"stream": True}))
            await until(lambda: bool(mock.seen))
            await register(s, other)
            await usable(s, other)
            place = f"/workers/{known(s, mock).id}"
            assert (await s.client.delete(place)).status_code == 202
            assert (await s.client.get(place)).json()["draining"]
            for _ in range(4):
                assert (await s.post()).json() == {"other": 1}
            assert not stream.done()
            gate.set()
            assert (await stream).text == "data: 1\n\ndata: [DONE]\n\n"
            await until(lambda: len(s.gateway.router.registry.workers) == 1)

    run(main())


@pytest.mark.parametrize("how", ["force", "patience", "both"])
def test_what_does_not_finish_is_broken_off(how: str) -> None:
    async def main() -> None:
        async with Mock(hang, BATON) as mock, empty(drain_timeout=0.1 if how == "patience" else 60.0) as s:
            await register(s, mock)
            await usable(s, mock)
            asked = asyncio.create_task(s.post())
            await until(lambda: bool(mock.seen))
            place = f"/workers/{known(s, mock).id}"
            if how != "force":
                assert (await s.client.delete(place)).status_code == 202
            if how != "patience":
                assert (await s.client.delete(place, params={"force": "true"})).status_code == 202
            assert (await asked).status_code in (502, 503)
            await until(lambda: not s.gateway.router.registry.workers)
            await until(lambda: not mock.connections)

    run(main())


def test_a_worker_that_was_removed_does_not_come_back_by_its_heartbeat() -> None:
    async def main() -> None:
        async with Mock(whole({}), BATON) as mock, empty() as s:
            await register(s, mock)
            await s.client.delete("/workers", params={"url": mock.url})
            reply = await register(s, mock)
            assert (reply.status_code, "was removed" in reply.text) == (409, True)
            await until(lambda: not s.gateway.router.registry.workers)
            assert (await register(s, mock)).status_code == 409
            assert (await register(s, mock, instance="second")).status_code == 202
            await s.client.delete("/workers", params={"url": mock.url})
            await until(lambda: not s.gateway.router.registry.workers)
            assert (await register(s, mock, instance="", ttl=None)).status_code == 202  # somebody wants it back

    run(main())


def test_who_drains_may_be_kept_after_all() -> None:
    async def main() -> None:
        async with Mock(hang, BATON) as mock, empty(drain_timeout=60.0) as s:
            await register(s, mock)
            await usable(s, mock)
            asked = asyncio.create_task(s.post())
            await until(lambda: bool(mock.seen))
            worker = known(s, mock)
            await s.client.delete(f"/workers/{worker.id}")
            assert worker.draining
            assert (await register(s, mock, ttl=None)).status_code == 200
            assert known(s, mock) is worker
            assert not worker.draining
            asked.cancel()
            await until(lambda: worker.in_flight == 0)
            await asyncio.sleep(0.05)  # longer than the draining would have taken to see it
            assert s.gateway.router.registry.workers == (worker,)

    run(main())


def test_closing_does_not_wait_for_those_who_drain() -> None:
    async def main() -> None:
        async with Mock(hang) as mock:
            router = Router(RouterOptions())
            roster = Roster(router)
            told: list[Event] = []
            roster.told = told.append
            worker, new = roster.add(Entry(mock.url + "/", "regular"))
            assert new
            await until(lambda: worker.healthy)
            router.registry.charge(worker, 1, 0.0)
            roster.remove(worker, 60.0)
            assert worker.draining  # before anybody else has a turn
            await asyncio.wait_for(roster.close(), 1.0)
            await router.close()
            assert [event.url for event in told] == [mock.url] * 2

    run(main())


# --- readiness, models, errors


def test_degraded_is_ready_once_everything_was_there() -> None:
    async def main() -> None:
        async with Mock(whole({}), BATON) as prefill, Mock(whole({}), BATON) as decode, empty() as s:

            async def readiness() -> tuple[int, str]:
                reply = await s.client.get("/readiness")
                return reply.status_code, reply.json()["status"]

            prefill.health = 503
            await register(s, prefill, worker_type="prefill")
            await register(s, decode)
            await usable(s, decode)
            assert await readiness() == (503, "not_ready")  # it could serve, but is only starting
            prefill.health = 200
            await usable(s, prefill)
            assert await readiness() == (200, "ready")
            prefill.health = 503
            await until(lambda: not known(s, prefill).healthy)
            assert await readiness() == (200, "degraded")
            assert prefill.url in (await s.client.get("/readiness")).json()["reason"]
            decode.health = 503
            await until(lambda: not known(s, decode).healthy)
            assert await readiness() == (503, "not_ready")

    run(main())


def test_models_of_all_workers_each_once() -> None:
    def serves(model: str) -> Mock:
        card = {"id": model, "object": "model", "owned_by": "x"}

        async def behave(exchange: Exchange) -> None:
            exchange.whole({"object": "list", "data": [card]} if exchange.path == "/v1/models" else card)

        return Mock(behave, {"served_model_name": model})

    async def main() -> None:
        async with serves("a") as one, serves("a") as again, serves("b/c") as other, empty() as s:
            for mock in (one, again, other):
                await register(s, mock, worker_type="regular", instance="")
            await usable(s, one, again, other)
            listed = (await s.client.get("/v1/models")).json()
            assert sorted(card["id"] for card in listed["data"]) == ["a", "b/c"]
            assert (await s.client.get("/v1/models/b/c")).json()["id"] == "b/c"
            missing = await s.client.get("/v1/models/d")
            assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found_error")
            other.behave = reset
            assert [card["id"] for card in (await s.client.get("/v1/models")).json()["data"]] == ["a"]
            one.behave = again.behave = reset
            assert (await s.client.get("/v1/models")).status_code == 503

    run(main())


@pytest.mark.parametrize("path", ["/v1/tokenize", "/v1/detokenize", "/tokenize", "/detokenize"])
def test_tokenizers_are_the_workers(path: str) -> None:
    async def check(s: Stack) -> None:
        assert (await s.post(path, json={"prompt": "x"})).json() == {"tokens": [1]}
        assert [exchange.path for exchange in s.decode.seen] == [path]

    with_stack(hang, whole({"tokens": [1]}), check)


def test_clients_learn_names_and_operators_addresses() -> None:
    async def main() -> None:
        async with stack(reset, hang, retries=0) as s:
            texts = [(await s.post()).text, (await s.client.get("/v1/models")).text]
            s.decode.behave = s.prefill.behave = reset
            texts.append((await s.client.get("/model_info")).text)
            texts.append((await s.client.post("/abort_request", json={"rid": "r"})).text)
            for mock in (s.prefill, s.decode):
                await mock.stop()
            await until(lambda: not any(worker.healthy for worker in s.gateway.router.registry.workers))
            texts.append((await s.post()).text)
            texts.append((await s.client.get("/model_info")).text)
            for text in texts:
                assert "127.0.0.1" not in text
                assert str(s.prefill.port) not in text
            assert known(s, s.decode).name in texts[-1]
            for path in ("/readiness", "/workers", "/explain"):
                assert s.decode.url in (await s.client.get(path)).text

    run(main())


# --- explain


def test_explain_says_where_and_why_and_sends_nothing() -> None:
    async def check(s: Stack) -> None:
        before = s.gateway.router.registry.workers[0].load
        for reply in (
            await s.client.get("/explain", params={"prompt": "why", "max_tokens": "7"}),
            await s.client.post("/explain", json={"messages": [], "max_tokens": 7}),
        ):
            said = reply.json()
            assert (said["prefill"], said["answering"]) == (s.prefill.url, s.decode.url)
            assert [line.split()[0] for line in said["why"]] == ["decode", "prefill", "split"]
            assert said["request"]["max_tokens"] == 7
            assert {w["url"]: w["usable"] for w in said["workers"]} == {s.prefill.url: True, s.decode.url: True}
            assert said["configuration"]["api_key"] is True
            assert said["configuration"]["policy"] == "round_robin"
            assert "secret" not in reply.text
        assert s.gateway.router.registry.workers[0].load == before
        assert s.decode.seen == s.prefill.seen == []
        for wrong in ("x", "-1", "²"):
            assert (await s.client.get("/explain", params={"max_tokens": wrong})).status_code == 400
        assert (await s.client.post("/explain", content=b"[")).status_code == 400
        await s.client.delete("/workers", params={"url": s.decode.url})
        said = (await s.client.get("/explain")).json()
        assert said["answering"] is None
        assert "no decode worker" in said["why"][0] or "not enough" in said["why"][0]

    async def with_key(s: Stack) -> None:
        s.client.headers["authorization"] = "Bearer secret"
        await check(s)

    with_stack(hang, hang, with_key, api_key="secret")


@pytest.mark.parametrize("stream", [True, False])
def test_who_asks_is_told_the_route(stream: bool) -> None:
    async def check(s: Stack) -> None:
        body = {"messages": [], "stream": stream}
        silent = await s.client.post(CHAT, json=body)
        assert "x-baton-route" not in silent.headers
        told = (await s.client.post(CHAT, json=body, headers={"x-baton-explain": "1"})).headers["x-baton-route"]
        names = f"{known(s, s.prefill).name} {known(s, s.decode).name}; "
        assert told.startswith(names)
        assert len(told) > len(names)
        assert "x-baton-explain" not in s.decode.seen[-1].headers

    with_stack(RECEIPT, events(b"data: 1\n\n") if stream else whole({}), check)


def test_loads_are_what_was_sent() -> None:
    async def check(s: Stack) -> None:
        asked = asyncio.create_task(s.post())
        await until(lambda: bool(s.decode.seen))
        for path in ("/loads", "/get_loads"):
            said = (await s.client.get(path)).json()
            assert said["load"] == sum(worker["load"] for worker in said["workers"]) > 0
            assert {worker["worker"] for worker in said["workers"]} == {s.prefill.url, s.decode.url}
        asked.cancel()

    with_stack(RECEIPT, hang, check)
