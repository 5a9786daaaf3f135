"""What prefill and decode say together is what one engine says, token for token."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import pytest

from baton.base.messages import Finish
from tests.disagg.pair import EOS, PAGE_SIZE, Pair, undivided

MakePair = Callable[..., Pair]


def prompt(length: int, seed: int = 0) -> list[int]:
    return [random.Random(f"{seed} {i}").randrange(1000) for i in range(length)]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 50])
def test_any_length_and_chunk_boundary(make_pair: MakePair, transport: str, length: int) -> None:
    pair = make_pair(transport)
    requests = [pair.request(f"r{i}", prompt(length, i), room=i) for i in range(3)]  # room 0 is a room
    for request in requests:
        pair.prefill.send(request)
        pair.decode.send(request)
        pair.finish(request.id)
    expected = undivided(requests)
    for request in requests:
        assert pair.decode.answer(request.id) == expected[request.id]
        receipt = pair.prefill.last(request.id)
        assert receipt.tokens == (expected[request.id][0],)
        assert receipt.finish == Finish("length")
        assert receipt.usage is not None
        assert (receipt.usage.prompt_tokens, receipt.usage.completion_tokens) == (length, 1)
    pair.settle()


def test_many_at_once(make_pair: MakePair, transport: str) -> None:
    pair = make_pair(transport, pages=400)
    requests = [
        pair.request(f"r{i}", prompt(5 + 7 * i % 60, i), i + 1, temperature=1.0, seed=i, max_tokens=1 + i % 9)
        for i in range(24)
    ]
    for request in requests:
        pair.prefill.send(request)
    for request in reversed(requests):  # D hears of them in another order
        pair.decode.send(request)
    pair.finish(*(r.id for r in requests))
    expected = undivided(requests, pages=400)
    assert {r.id: pair.decode.answer(r.id) for r in requests} == expected
    assert pair.decode.role.handoffs.done == pair.prefill.role.handoffs.done == 24
    pair.settle()


@pytest.mark.parametrize("cached", [PAGE_SIZE, 2 * PAGE_SIZE + 1, 20])
@pytest.mark.parametrize("where", ["prefill", "decode", "both"])
def test_prefix_hits_on_either_side(make_pair: MakePair, transport: str, cached: int, where: str) -> None:
    pair = make_pair(transport)
    pair.ask("warm", prompt(cached), 1)
    pair.finish("warm")
    pair.settle()
    if where == "prefill":
        pair.decode.engine.scheduler.flush()
    if where == "decode":
        pair.prefill.engine.scheduler.flush()
    request = pair.request("r", prompt(30), 9)
    pair.prefill.send(request)
    pair.decode.send(request)
    pair.finish("r")
    assert pair.decode.answer("r") == undivided([request])["r"]
    hit = cached // PAGE_SIZE * PAGE_SIZE if where != "decode" else 0
    assert pair.decode.last("r").cached_tokens == pair.prefill.last("r").cached_tokens == hit  # P's count is told
    pair.settle()


def test_what_d_has_is_not_sent_again(make_pair: MakePair, transport: str) -> None:
    pair = make_pair(transport)
    pair.ask("a", prompt(33), 1)
    pair.finish("a")
    moved = pair.prefill.role.handoffs.bytes
    pair.ask("b", [*prompt(32), 5], 2)
    pair.finish("b")
    assert moved == 9 * 1024
    assert pair.prefill.role.handoffs.bytes - moved == 1024  # the tail alone
    pair.settle()


def test_the_first_token_ends_it(make_pair: MakePair, transport: str) -> None:
    pair = make_pair(transport)
    pair.ask("one", prompt(10), 1, max_tokens=1)
    pair.finish("one")
    assert pair.decode.last("one").finish == Finish("length")
    assert pair.decode.last("one").usage.completion_tokens == 1  # type: ignore[union-attr]
    first = pair.decode.answer("one")[0]
    pair.ask("stop", prompt(10), 2, stop_token_ids=(first,))
    pair.finish("stop")
    assert pair.decode.last("stop").finish == Finish("stop", first)
    pair.settle()


def test_eos_as_the_first_token(make_pair: MakePair) -> None:
    pair = make_pair(pages=16)
    for seed in range(5000):  # a prompt whose first token is the end of the sequence
        if undivided([pair.request("x", [seed], 1, max_tokens=1)], pages=16)["x"] == [EOS]:
            break
    else:
        pytest.fail("no such prompt")
    pair.ask("eos", [seed], 1)
    pair.finish("eos")
    assert pair.decode.last("eos").finish == Finish("stop", EOS)
    assert pair.decode.answer("eos") == [EOS]
    pair.settle()


def test_logprobs_and_prompt_logprobs(make_pair: MakePair, transport: str) -> None:
    pair = make_pair(transport)
    pair.ask("r", prompt(10), 1, logprobs=0, prompt_logprobs=0)
    pair.finish("r")
    receipt, parts = pair.prefill.last("r"), pair.decode.heard["r"]
    assert [entry.token for entry in receipt.prompt_logprobs] == prompt(10)
    assert not any(part.prompt_logprobs for part in parts)  # type: ignore[union-attr]
    assert [len(part.logprobs) for part in parts] == [1] * 6  # type: ignore[union-attr]
    assert parts[0].logprobs == receipt.logprobs  # type: ignore[union-attr]


def test_ps_seed_is_the_one_that_counts(make_pair: MakePair) -> None:
    pair = make_pair()
    mine = pair.request("r", prompt(10), 1, seed=11)
    pair.prefill.send(mine)
    pair.decode.send(pair.request("r", prompt(10), 1, seed=99))
    pair.finish("r")
    assert pair.decode.answer("r") == undivided([mine])["r"]


def test_timelines_are_in_order(make_pair: MakePair, transport: str) -> None:
    pair = make_pair(transport)
    pair.ask("r", prompt(40), 1)
    pair.finish("r")
    p, d = pair.prefill.last("r").timeline, pair.decode.last("r").timeline
    assert p is not None
    assert d is not None
    assert 0 < p.received <= p.scheduled <= p.prefilled <= p.delivered == p.finished
    assert p.received <= p.offered <= p.delivered
    assert 0 < d.received <= d.offered <= d.delivered <= d.first_token <= d.finished


def test_a_decode_worker_serves_whole_requests_too(make_pair: MakePair) -> None:
    pair = make_pair()
    request = pair.request("whole", prompt(20), 0, ticket=False)
    pair.decode.send(request)
    pair.pump(lambda: pair.decode.ended("whole"))
    assert pair.decode.answer("whole") == undivided([request])["whole"]
    pair.settle()


def test_more_than_fits_at_once(make_pair: MakePair, transport: str) -> None:
    """Pages for three prompts on either side, nine requests: preemption, parking and waiting, no wrong token."""
    pair = make_pair(transport, pages=30, chunk=10, max_running=4)
    requests = [pair.request(f"r{i}", prompt(24, i), i, max_tokens=12) for i in range(9)]
    for request in requests:
        pair.prefill.send(request)
        pair.decode.send(request)
    pair.finish(*(r.id for r in requests))
    assert {r.id: pair.decode.answer(r.id) for r in requests} == undivided(requests)
    pair.settle()


@pytest.mark.parametrize("resumed", [1, 3, 4, 11])
def test_going_on_where_another_worker_broke_off(make_pair: MakePair, transport: str, resumed: int) -> None:
    """Tokens of an answer come with the request: they count as output on both sides, found in the cache or not."""
    pair = make_pair(transport)
    request = pair.request("whole", prompt(18), 1, max_tokens=12)
    answer = undivided([request])["whole"]
    for room in (2, 3):  # the second one finds pages, of the prompt and of the answer
        again = pair.request(f"r{room}", [*prompt(18), *answer[:resumed]], room, max_tokens=12)
        again = msgspec.structs.replace(again, resumed=resumed)
        pair.prefill.send(again)
        pair.decode.send(again)
        pair.finish(again.id)
        assert pair.decode.answer(again.id) == answer[resumed:]
        receipt, last = pair.prefill.last(again.id).usage, pair.decode.last(again.id).usage
        assert receipt is not None
        assert last is not None
        assert (receipt.prompt_tokens, receipt.completion_tokens) == (18, resumed + 1)
        assert (last.prompt_tokens, last.completion_tokens) == (18, 12)
        cached = min((18 + resumed - 1) // PAGE_SIZE * PAGE_SIZE, 18) if room == 3 else 0
        assert last.cached_tokens == receipt.cached_tokens == cached
    pair.settle()
