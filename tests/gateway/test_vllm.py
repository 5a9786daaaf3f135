"""vLLM's dialect through the whole gateway, against a pair that errs as the real one does (`tests/router/vllm.py`)."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, cast

import httpx
import pytest

from baton.base.config import GatewayConfig
from baton.gateway.app import Gateway
from baton.gateway.process import serving
from baton.router.registry import Connector, Description
from tests.router.mocks import Exchange, Mock, run, until
from tests.router.vllm import (
    Decode,
    Ledger,
    Mood,
    Prefill,
    Server,
    answer_to,
    broken,
    fine,
    prompt_of,
    sick,
    sick_in_a_stream,
)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPT = "the quick brown fox"


@dataclass
class Pairs:
    gateway: Gateway
    client: httpx.AsyncClient
    ledger: Ledger
    prefill: list[Prefill]
    decode: list[Decode]
    bootstrap: list[Mock] = field(default_factory=list)

    @property
    def p(self) -> Prefill:
        return self.prefill[0]

    @property
    def d(self) -> Decode:
        return self.decode[0]

    async def ask(self, prompt: Any = PROMPT, path: str = COMPLETIONS, **more: Any) -> httpx.Response:
        return await self.client.post(path, json={"prompt": prompt, **more})

    async def served(self, prompt: Any = PROMPT, **more: Any) -> None:
        """It is answered, rightly."""
        reply = await self.ask(prompt, **more)
        assert reply.status_code == 200, reply.text
        assert said(reply) == answer_to(json.dumps(prompt))

    def worker(self, server: Server) -> Any:
        return self.gateway.router.registry.by_url(server.url)

    async def settled(self) -> None:
        workers = self.gateway.router.registry.workers
        await until(lambda: all(w.in_flight == 0 for w in workers))
        assert all(w.load == 0 for w in workers)
        await until(lambda: all(w.pool.open_connections == w.pool.idle_connections for w in workers))


def said(reply: httpx.Response) -> str:
    if reply.headers["content-type"].startswith("text/event-stream"):
        assert reply.text.endswith("data: [DONE]\n\n")
        return str(json.loads(reply.text.split("\n")[0][6:])["choices"][0]["text"])
    return str(reply.json()["choices"][0]["text"])


def leave(asking: asyncio.Task[httpx.Response] | None) -> None:
    if asking is not None:
        asking.cancel()


@contextlib.asynccontextmanager
async def pairs(connector: str = "nixl", count: tuple[int, int] = (1, 1), **options: Any) -> AsyncIterator[Pairs]:
    usual = {"request_timeout": 10.0, "health_interval": 0.1, "worker_wait": 2.0, "split": "always", "port": 0}
    config = GatewayConfig(drain_timeout=1.0, **{**usual, **options})
    ledger = Ledger()
    async with contextlib.AsyncExitStack() as stack:
        kind = connector.removesuffix("-auto")
        prefill = [Prefill(ledger, kind) for _ in range(count[0])]
        decode = [Decode(ledger, kind) for _ in range(count[1])]
        for server in (*prefill, *decode):
            await stack.enter_async_context(server)
        bootstrap = [await stack.enter_async_context(Mock(p.query)) for p in prefill] if kind == "mooncake" else []
        gateway, _, port = await stack.enter_async_context(serving(config))
        client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=15)
        await stack.enter_async_context(client)
        for index, p in enumerate(prefill):
            here = bootstrap[index].port if bootstrap else None
            gateway.router.add(p.url, Description("prefill", here, connector=cast(Connector, connector)))
        for d in decode:
            d.peer = lambda: prefill[0]
            gateway.router.add(d.url, Description("decode", connector=cast(Connector, connector)))
        await until(lambda: all(w.healthy for w in gateway.router.registry.workers))
        yield Pairs(gateway, client, ledger, prefill, decode, bootstrap)


def with_pairs(
    check: Callable[[Pairs], Awaitable[None]], connector: str = "nixl", *, left: int = 0, **options: Any
) -> None:
    """Run `check`; afterwards nothing is in flight, no server was ended, nobody got wrong text, and `left` sets of
    blocks wait for a lease to run out."""

    async def main() -> None:
        async with pairs(connector, **options) as one:
            await check(one)
            await one.settled()
            assert one.ledger.dead == []
            assert one.ledger.wrong == 0
            assert len(one.ledger.held) == left, one.ledger.held

    run(main())


# --- the exchange


@pytest.mark.parametrize("connector", ["", "nixl", "nixl-push", "mooncake"])
@pytest.mark.parametrize("stream", [False, True])
def test_prefill_then_decode_with_what_prefill_said(connector: str, stream: bool) -> None:
    async def check(s: Pairs) -> None:
        for number in range(3):
            more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
            await s.served(f"{PROMPT} {number}", max_tokens=9, **more)
        assert (s.ledger.given, s.ledger.taken, s.d.alone) == (3, 3, 0)
        if s.bootstrap:
            assert [exchange.path for exchange in s.bootstrap[0].seen] == ["/query"]

    with_pairs(check, connector)


def test_a_server_in_development_mode_is_known_too() -> None:
    async def check(s: Pairs) -> None:
        d = Decode(s.ledger)
        d.development = True
        async with d:
            worker = s.gateway.router.add(d.url, Description("decode"))
            await until(lambda: worker.healthy)
            assert worker.runtime == s.worker(s.d).runtime == "vllm"
            await s.gateway.router.remove(worker)

    with_pairs(check)


def test_what_each_leg_is_sent() -> None:
    body = (
        b'{"model": "m", "prompt":"abc" , "stream":true, "stream_options":{"include_usage":true}, "max_tokens": 77,'
        b'"max_completion_tokens":88,"min_tokens":3,"n":1,"seed":7, "temperature":1e-1, "x":{"a": [1.0, "\\u00e9"]} }'
    )

    async def check(s: Pairs) -> None:
        headers = {"x-request-id": "my-own", "content-type": "application/json"}
        reply = await s.client.post(COMPLETIONS, content=body, headers=headers)
        assert (reply.status_code, reply.headers["x-request-id"]) == (200, "my-own")
        [first], [second] = s.p.seen, s.d.seen
        asked = first.json
        assert asked.pop("kv_transfer_params")["do_remote_decode"] is True
        assert asked == {
            "model": "m",
            "prompt": "abc",
            "stream": False,
            "max_tokens": 1,
            "max_completion_tokens": 1,
            "min_tokens": 1,
            "n": 1,
            "seed": 7,
            "temperature": 0.1,
            "x": {"a": [1.0, "\u00e9"]},
        }
        kept, _, params = second.body.partition(b',"kv_transfer_params":')
        assert kept + b" }" == body, "the client's own bytes"
        assert b'"unheard_of": {"deeply": [null, 1.5, "\\u00e9"]}' in params, "as prefill wrote it"
        ids = [first.headers["x-request-id"], second.headers["x-request-id"]]
        assert ids[0] == ids[1] != "my-own"
        assert ids[0].startswith("my-own-")

    with_pairs(check)


@pytest.mark.parametrize(
    ("path", "limit"),
    [(CHAT, "max_tokens"), ("/v1/messages", "max_tokens"), ("/v1/responses", "max_output_tokens")],
)
def test_one_token_by_the_name_that_the_route_has_for_it(path: str, limit: str) -> None:
    async def check(s: Pairs) -> None:
        said_first = {"messages": [{"role": "user", "content": "hi"}], "input": "hi"}
        reply = await s.client.post(path, json={**said_first, "store": True, "stream": True})
        assert reply.status_code == 200
        asked = s.p.seen[0].json
        assert (asked[limit], asked["store"]) == (1, False)
        assert {"max_tokens", "max_output_tokens"} & asked.keys() == {limit}
        assert s.d.seen[0].json["store"] is True

    with_pairs(check)


def test_both_workers_are_charged_while_prefill_runs() -> None:
    async def check(s: Pairs) -> None:
        s.p.open.clear()
        task = asyncio.create_task(s.served())
        await until(lambda: bool(s.p.seen))
        assert s.d.seen == []
        assert s.worker(s.d).in_flight == s.worker(s.p).in_flight == 1
        assert s.worker(s.d).load > 0
        s.p.open.set()
        await task

    with_pairs(check)


@pytest.mark.parametrize("connector", ["nixl", "nixl-push", "mooncake"])
@pytest.mark.parametrize(
    "more",
    [
        {"prompt": ["a", "b", "c"]},
        {"prompt": [[1, 2], [3]]},
        {"prompt": "a", "n": 2},
        {"prompt": "a", "echo": True, "logprobs": 1},
        {"prompt": "a", "prompt_logprobs": 0},
        {"prompt": "a", "use_beam_search": True, "n": 2},
        {"prompt": "a", "background": True},
    ],
    ids=lambda more: ",".join(more) + str(more["prompt"]),
)
def test_what_a_pair_cannot_do_goes_whole(connector: str, more: dict[str, Any]) -> None:
    async def check(s: Pairs) -> None:
        reply = await s.client.post(COMPLETIONS, json=more)
        assert said(reply) == answer_to(json.dumps(more["prompt"]))
        assert (s.p.seen, s.d.alone) == ([], 1)
        assert s.d.seen[0].json == more

    with_pairs(check, connector)


def test_a_list_of_one_prompt_is_one_prompt() -> None:
    async def check(s: Pairs) -> None:
        for prompt in (["a"], [1, 2, 3], [[1, 2, 3]]):
            await s.served(prompt, n=1)
        assert s.ledger.taken == 3

    with_pairs(check)


# --- what prefill says


@pytest.mark.parametrize(
    "edit",
    [
        lambda params: None,
        lambda params: {},
        lambda params: "params",
        lambda params: {**params, "do_remote_prefill": False},
        lambda params: {**params, "remote_port": "5600"},
        lambda params: {**params, "remote_block_ids": []},
        lambda params: {**params, "remote_block_ids": [[], []]},
        *(
            lambda params, name=name: {key: value for key, value in params.items() if key != name}
            for name in ("remote_engine_id", "remote_request_id", "remote_host", "remote_port", "remote_block_ids")
        ),
    ],
)
def test_parameters_that_are_not_whole_are_not_passed_on(edit: Callable[[dict[str, Any]], Any]) -> None:
    async def check(s: Pairs) -> None:
        s.p.edit = edit
        await s.served()
        await s.served(stream=True)
        assert (s.d.alone, s.worker(s.p).errors) == (2, {"no_kv_params": 2})
        assert s.worker(s.p).healthy
        assert all("kv_transfer_params" not in exchange.json for exchange in s.d.seen)

    with_pairs(check, left=2)


def test_mooncake_keeps_nothing_of_an_answer_that_ended_by_itself() -> None:
    async def check(s: Pairs) -> None:
        s.p.finish = "stop"
        await s.served()
        assert s.d.alone == 1

    with_pairs(check, "mooncake")


# --- what clients write


KILL = json.dumps({"do_remote_prefill": True})
WRITTEN = {
    "once": f'"kv_transfer_params":{KILL}',
    "twice": f'"kv_transfer_params":{{}},"kv_transfer_params":{KILL}',
    "escaped": f'"kv\\u005ftransfer_params":{KILL}',
    "no object": '"kv_transfer_params":"x"',
    "smuggled": '"vllm_xargs":{"kv_transfer_params":"x"}',
    "smuggled, escaped": '"vllm_xargs":{"kv\\u005ftransfer_params":"x"}',
}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/other"])
@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN.keys())
def test_a_client_cannot_write_kv_transfer_params(path: str, written: str) -> None:
    async def check(s: Pairs) -> None:
        for start in ('{"prompt":"a",', '{"prompt":["a","b"],'):
            body = start + written + ',"input":"b"}'
            reply = await s.client.post(path, content=body, headers={"content-type": "application/json"})
            assert reply.status_code == 200
        for exchange in (*s.p.seen, *s.d.seen):
            params = exchange.json.get("kv_transfer_params") or {}
            assert params in ({},) or params.get("do_remote_decode") or params.get("remote_engine_id") == s.p.engine
            assert "kv_transfer_params" not in exchange.json.get("vllm_xargs", {})

    with_pairs(check)


@pytest.mark.parametrize("xargs", ['{"a": "b\\n\\u00e9"}', '{"b": "kv_transfer_params"}', "{}"])
def test_other_extra_arguments_pass(xargs: str) -> None:
    async def check(s: Pairs) -> None:
        reply = await s.client.post(COMPLETIONS, content=f'{{"prompt":"a","vllm_xargs":{xargs}}}')
        assert reply.status_code == 200
        assert s.p.seen[0].json["vllm_xargs"] == s.d.seen[0].json["vllm_xargs"] == json.loads(xargs)

    with_pairs(check)


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings"])
@pytest.mark.parametrize(
    "body",
    [
        f'{{"a":NaN,"kv_transfer_params":{KILL}}}'.encode(),
        f'{{"a":1,"kv_transfer_params":{KILL}}}'.encode("utf-16"),
        f'{{"a":1,"kv_transfer_params":{KILL}}}'.encode("utf-16-be"),
        f'{{"a":1,"kv_transfer_params":{KILL}}}'.encode("utf-32-le"),
        f'{{"a":1,"kv_transfer_params":{KILL}}}'.encode("utf-8-sig"),
    ],
    ids=["NaN", "UTF-16", "UTF-16-BE", "UTF-32-LE", "BOM"],
)
def test_what_a_lenient_parser_would_read_is_refused(path: str, body: bytes) -> None:
    """Python's parser, which vLLM has, takes all of these."""
    assert json.loads(body)["kv_transfer_params"]

    async def check(s: Pairs) -> None:
        reply = await s.client.post(path, content=body, headers={"content-type": "application/json"})
        assert reply.status_code == 400
        assert s.p.seen == s.d.seen == []

    with_pairs(check)


def test_a_body_that_is_no_json_passes() -> None:
    async def check(s: Pairs) -> None:
        body = b'--x\r\ncontent-disposition: form-data; name="file"\r\n\r\n\x00\\u kv_transfer_params {\r\n--x--\r\n'
        got: list[bytes] = []

        async def behave(exchange: Exchange) -> None:
            got.append(exchange.body)
            exchange.whole({})

        s.d.behave = behave
        reply = await s.client.post(
            "/v1/audio/transcriptions", content=body, headers={"content-type": "multipart/form-data; boundary=x"}
        )
        assert (reply.status_code, got) == (200, [body])

    with_pairs(check)


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
