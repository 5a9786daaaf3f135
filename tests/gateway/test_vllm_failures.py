"""vLLM pairs and clients that fail, leave and hang: nothing is used twice, nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
from random import Random
from typing import Any

import httpx
import pytest

from tests.gateway.vllm_stack import COMPLETIONS, Pairs, leave, said, with_pairs
from tests.router.mocks import Exchange, until
from tests.router.vllm import (
    Mood,
    answer_to,
    broken,
    fine,
    prompt_of,
    sick,
    sick_in_a_stream,
)

# --- what fails


@pytest.mark.parametrize("connector", ["nixl", "nixl-push", "mooncake"])
@pytest.mark.parametrize(
    ("mood", "stream"), [(sick, False), (broken, False), (sick, True), (broken, True), (sick_in_a_stream, True)]
)
def test_decode_fails_before_its_first_token_and_prefill_is_done_anew(connector: str, mood: Mood, stream: bool) -> None:
    async def check(s: Pairs) -> None:
        s.d.moods = [mood]
        await s.served(stream=stream)
        asked = [exchange.json["kv_transfer_params"] for exchange in s.d.seen]
        assert len(s.p.seen) == len(asked) == 2
        assert asked[0] != asked[1]
        ids = [exchange.headers["x-request-id"] for exchange in (*s.p.seen, *s.d.seen)]
        assert ids[0] == ids[2] != ids[1] == ids[3]

    with_pairs(check, connector)


def test_an_error_event_that_is_the_clients_fault_is_not_tried_again() -> None:
    event = b'data: {"error": {"message": "too long", "type": "BadRequestError", "code": 400}}\n\ndata: [DONE]\n\n'

    async def mood(exchange: Exchange) -> bool:
        exchange.begin_stream()
        exchange.piece(event)
        exchange.end_stream()
        return True

    async def check(s: Pairs) -> None:
        s.d.moods = [mood]
        reply = await s.ask(stream=True)
        assert (reply.status_code, reply.content) == (200, event)
        assert len(s.d.seen) == 1

    with_pairs(check)


def test_an_error_event_that_stays_is_passed_on_as_it_came() -> None:
    async def check(s: Pairs) -> None:
        s.d.moods = [sick_in_a_stream] * 2
        reply = await s.ask(stream=True)
        assert reply.text.startswith('data: {"error": {"message": "Internal server error", "code": 500}}')
        assert len(s.p.seen) == len(s.d.seen) == 2

    with_pairs(check, retries=1)


@pytest.mark.parametrize("connector", ["nixl", "mooncake"])
@pytest.mark.parametrize("mood", [sick, broken])
def test_prefill_fails_and_decode_does_it_alone(connector: str, mood: Mood) -> None:
    async def check(s: Pairs) -> None:
        s.p.moods = [mood]
        await s.served()
        assert (len(s.p.seen), len(s.d.seen), s.d.alone) == (1, 1, 1)

    with_pairs(check, connector)


def test_prefill_fails_and_another_one_does_it() -> None:
    async def check(s: Pairs) -> None:
        s.p.moods = [sick, sick]
        for _ in range(4):
            await s.served()
        assert (s.ledger.taken, s.d.alone) == (4, 0)
        assert [len(p.seen) for p in s.prefill] == [s.worker(s.p).served + 2, s.worker(s.prefill[1]).served]

    with_pairs(check, count=(2, 1))


def test_what_prefill_refuses_the_client_hears_and_decode_does_not() -> None:
    async def mood(exchange: Exchange) -> bool:
        exchange.whole({"error": {"message": "temperature must be a number", "code": 400}}, 400)
        return True

    async def check(s: Pairs) -> None:
        s.p.moods = [mood]
        reply = await s.ask()
        assert (reply.status_code, reply.json()["error"]["message"]) == (400, "temperature must be a number")
        assert s.d.seen == []

    with_pairs(check)


def test_prefill_is_killed_with_requests_in_hand_and_stays_dead() -> None:
    async def check(s: Pairs) -> None:
        s.p.open.clear()
        tasks = [asyncio.create_task(s.served(str(i))) for i in range(4)]
        await until(lambda: len(s.p.seen) == 4)
        await s.p.stop()
        await asyncio.gather(*tasks)
        await s.served("afterwards")
        assert s.d.alone == 5

    with_pairs(check)


def test_prefill_hangs_and_decode_does_it_alone() -> None:
    async def check(s: Pairs) -> None:
        s.p.open.clear()
        await s.served()
        assert s.d.alone == 1
        assert s.p.seen[0].gone.is_set()

    with_pairs(check, stage_timeout=0.3)


def test_decode_hangs_and_another_one_gets_a_new_prefill() -> None:
    async def check(s: Pairs) -> None:
        worker = s.worker(s.d)
        s.d.frozen = True
        await s.served()
        await s.served()
        assert (s.ledger.given, s.ledger.taken) == (3, 2)
        assert not worker.healthy
        s.d.frozen = False
        await until(lambda: worker.healthy)

    with_pairs(check, left=1, count=(1, 2), health_interval=0.05, health_timeout=0.1)


def test_no_prefill_worker_at_all() -> None:
    async def check(s: Pairs) -> None:
        await s.p.stop()
        await until(lambda: not s.worker(s.p).healthy)
        await s.served()
        await s.served(stream=True)
        assert s.d.alone == 2

    with_pairs(check)


# --- Mooncake's engines


def test_a_restarted_mooncake_engine_is_asked_who_it_is() -> None:
    async def check(s: Pairs) -> None:
        await s.served()
        await s.p.stop()
        await until(lambda: not s.worker(s.p).healthy)
        await s.p.start()
        await until(lambda: bool(s.worker(s.p).healthy))
        await s.served()
        assert (len(s.bootstrap[0].seen), s.ledger.taken, len(s.d.seen)) == (2, 2, 2)

    with_pairs(check, "mooncake")


def test_an_engine_that_changed_unnoticed_is_found_out_by_the_failure() -> None:
    async def check(s: Pairs) -> None:
        await s.served()
        s.p.engine = "another"
        await s.served()
        assert (len(s.bootstrap[0].seen), len(s.d.seen)) == (2, 3)

    with_pairs(check, "mooncake", left=1)  # what the failed attempt computed: nobody could know whom to tell


@pytest.mark.parametrize(
    "ranks", [b"{}", b'{"0":{"engine_id":"a"},"1":{"engine_id":"b"}}', b'{"0":{}}', b"no", b'{"detail":"none"}']
)
def test_a_bootstrap_server_that_is_of_no_use(ranks: bytes) -> None:
    async def behave(exchange: Exchange) -> None:
        exchange.whole(ranks)

    async def check(s: Pairs) -> None:
        s.bootstrap[0].behave = behave
        await s.served()
        assert (s.p.seen, s.d.alone) == ([], 1)

    with_pairs(check, "mooncake")


def test_many_wait_for_one_query_and_a_client_may_leave_meanwhile() -> None:
    async def check(s: Pairs) -> None:
        answer = asyncio.Event()

        async def behave(exchange: Exchange) -> None:
            await answer.wait()
            await s.p.query(exchange)

        s.bootstrap[0].behave = behave
        leaver, *others = [asyncio.create_task(s.served(str(i))) for i in range(4)]
        await until(lambda: bool(s.bootstrap[0].seen) and s.worker(s.p).in_flight == 4)
        leaver.cancel()
        await until(lambda: s.worker(s.p).in_flight == 3)
        answer.set()
        await asyncio.gather(*others)
        assert (len(s.bootstrap[0].seen), len(s.p.seen), s.ledger.taken) == (1, 3, 3)

    with_pairs(check, "mooncake")


# --- clients that leave


@pytest.mark.parametrize("connector", ["nixl", "nixl-push", "mooncake"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["prefill", "between", "connecting", "decode"])
def test_a_client_that_leaves_leaves_nothing_behind(connector: str, stream: bool, when: str) -> None:
    async def check(s: Pairs) -> None:
        await s.served("first")  # connections stand
        task = asyncio.create_task(s.ask("second", stream=stream))
        if when == "prefill":
            s.p.open.clear()
            await until(lambda: len(s.p.seen) == 2)
            task.cancel()
            await until(lambda: s.p.seen[1].gone.is_set())
            assert len(s.d.seen) == 1
            return
        s.d.open.clear()
        if when == "between":
            s.p.answered = lambda exchange: leave(task)
        if when == "connecting":

            def answered(exchange: Exchange) -> None:
                s.worker(s.d).pool.discard_idle()
                leave(task)

            s.p.answered = answered
        await until(lambda: len(s.d.seen) == 2)
        task.cancel()
        await until(lambda: s.d.seen[1].gone.is_set())
        assert s.ledger.taken == 2

    with_pairs(check, connector)


def test_the_deadline_passes_and_nothing_is_left_behind() -> None:
    async def check(s: Pairs) -> None:
        s.d.open.clear()
        reply = await s.ask()
        assert reply.status_code == 504
        await until(lambda: s.d.seen[0].gone.is_set())

    with_pairs(check, request_timeout=0.3)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("connector", ["nixl", "nixl-push"])
def test_whatever_happens_nothing_is_left_behind_and_nobody_gets_wrong_text(connector: str, seed: int) -> None:
    random = Random(seed)

    async def one(s: Pairs, number: int) -> None:
        leaves = random.random() < 0.3
        prompt: Any = random.choice([f"prompt {number}", [f"a {number}", "b"], [number, 2, 3]])
        body = {"prompt": prompt, "stream": random.random() < 0.5, "n": random.choice([1, 1, 2])}
        asking = asyncio.create_task(s.client.post(COMPLETIONS, json=body))
        if leaves:
            leaving[prompt_of(body)] = asking
        with contextlib.suppress(asyncio.CancelledError):
            reply = await asking
            if reply.status_code == 200 and '"error"' not in reply.text:
                assert said(reply) == answer_to(prompt_of(body))

    leaving: dict[str, asyncio.Task[httpx.Response]] = {}

    def answered(exchange: Exchange) -> None:
        """Between the legs."""
        leave(leaving.get(prompt_of(exchange.json)))

    async def check(s: Pairs) -> None:
        for p in s.prefill:
            p.answered = answered
        for server in (*s.prefill, *s.decode):
            server.moods = [random.choice([fine, fine, fine, sick, broken, sick_in_a_stream]) for _ in range(30)]
        for start in range(0, 48, 6):
            await asyncio.gather(*(one(s, start + i) for i in range(6)))
        assert s.ledger.taken > 10

    with_pairs(check, connector, count=(2, 2), breaker_failures=1000)
