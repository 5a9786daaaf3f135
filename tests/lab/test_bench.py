"""The generator against a real server that misbehaves as told: relations and counts, never wall times."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from baton.base.errors import ConfigError, Unavailable
from baton.lab.bench import measure, run
from baton.lab.client import EventSplitter
from baton.lab.config import BenchConfig
from baton.lab.report import Outcome, json_line

from .mock_server import (
    Answer,
    Asked,
    Mock,
    chunk,
    event,
    good,
    mock_server,
    plain,
    stream_end,
    stream_head,
    token,
    usage,
)


def config(**options: Any) -> BenchConfig:
    defaults = {"requests": 6, "input_len": "4-9", "output_len": "5", "warmup": 0, "timeout": 5.0}
    return BenchConfig(**(defaults | options))


def bench(answer: Answer, **options: Any) -> tuple[Outcome, Mock]:
    async def main() -> tuple[Outcome, Mock]:
        async with mock_server(answer) as mock:
            return await measure(config(url=mock.url, **options)), mock

    return asyncio.run(main())


def test_every_request_is_sent_as_planned_and_every_token_counted() -> None:
    outcome, mock = bench(good())
    assert outcome.exit_code == 0
    assert outcome.summary.completed == 6
    assert outcome.summary.output_tokens == 30
    assert outcome.summary.prompt_tokens == sum(len(asked.body["prompt"]) for asked in mock.asked)
    assert all(len(record.chunks) == 5 for record in outcome.records)
    assert {asked.body["max_tokens"] for asked in mock.asked} == {5}
    assert all(asked.body["ignore_eos"] and asked.body["stream"] for asked in mock.asked)


def test_latencies_stand_in_the_relations_that_the_server_makes() -> None:
    outcome, _ = bench(good(first=0.1, gap=0.02), requests=3)
    for record in outcome.records:
        assert record.ttft is not None
        assert record.ttst is not None
        assert record.tpot is not None
        assert 0.1 <= record.ttft < record.ttst < record.e2e
        assert record.e2e >= 0.1 + 4 * 0.02
        assert record.tpot >= 0.02


def test_the_cap_holds_and_connections_are_kept() -> None:
    outcome, mock = bench(good(first=0.01), requests=12, concurrency=3)
    assert outcome.summary.completed == 12
    assert mock.most == 3
    assert mock.connections <= 4  # three, and the one that asked for the model


def test_warmup_is_sent_but_not_counted() -> None:
    outcome, mock = bench(good(), warmup=2)
    assert len(mock.asked) == 8
    assert outcome.summary.sent == 6


def test_an_open_loop_behind_a_cap_says_how_late_it_sent() -> None:
    outcome, _ = bench(good(first=0.05), requests=6, rate="1000", concurrency=1)
    late = [record.late for record in outcome.records]
    assert late == sorted(late)
    assert late[-1] >= 4 * 0.05
    assert outcome.records[-1].ttft_due >= late[-1] + 0.05


def test_kinds_of_failure_are_told_apart() -> None:
    async def answer(mock: Mock, asked: Asked, writer: asyncio.StreamWriter) -> None:
        kind = len(mock.asked)
        if kind == 1:
            plain(writer, 503, {"error": {"message": "come back later"}})
        elif kind == 2:
            stream_head(writer)
            event(writer, token(" a"))
            writer.close()
        elif kind == 3:
            stream_head(writer)
            event(writer, token(" a"))
            event(writer, {"error": {"message": "decode died"}})
            stream_end(writer)
        elif kind == 4:
            stream_head(writer)
            event(writer, token(" a"))
            event(writer, usage(asked, 1))
            stream_end(writer)
        elif kind == 5:
            await asyncio.sleep(30)
        else:
            stream_head(writer)
            chunk(writer, b"data: not json\n\n")
            stream_end(writer)

    outcome, _ = bench(answer, concurrency=1, timeout=0.3)
    assert outcome.summary.errors == {
        "bad_chunk": 1,
        "disconnected": 1,
        "http_503": 1,
        "stream_error": 1,
        "timeout": 1,
        "wrong_length": 1,
    }
    assert outcome.summary.completed == 0
    assert outcome.exit_code == 1
    assert "come back later" in outcome.records[0].detail


def test_an_answer_without_content_or_not_a_stream_is_a_failure() -> None:
    async def answer(mock: Mock, asked: Asked, writer: asyncio.StreamWriter) -> None:
        if len(mock.asked) == 1:
            plain(writer, 200, {"choices": [{"text": "whole"}]})
        else:
            stream_head(writer)
            stream_end(writer)

    outcome, _ = bench(answer, requests=2, concurrency=1)
    assert outcome.summary.errors == {"empty": 2}


def test_without_usage_chunks_are_counted_and_said_so() -> None:
    async def answer(mock: Mock, asked: Asked, writer: asyncio.StreamWriter) -> None:
        stream_head(writer)
        for _ in range(3):
            event(writer, token(" a"))
        stream_end(writer)

    outcome, _ = bench(answer, requests=2)
    assert outcome.summary.output_tokens == 6
    assert outcome.summary.counted == 2


def test_role_and_finish_chunks_of_a_chat_are_not_tokens() -> None:
    async def answer(mock: Mock, asked: Asked, writer: asyncio.StreamWriter) -> None:
        assert asked.path == "/v1/chat/completions"
        stream_head(writer)
        event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        await asyncio.sleep(0.05)
        event(writer, {"choices": [{"delta": {"content": "Hi"}}]})
        event(writer, {"choices": [{"delta": {"reasoning_content": "hm"}}]})
        event(writer, {"choices": [{"delta": {}, "finish_reason": "length"}]})
        event(writer, {"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 5}})
        stream_end(writer)

    outcome, _ = bench(answer, requests=1, endpoint="chat")
    assert len(outcome.records[0].chunks) == 2
    assert outcome.records[0].ttft >= 0.05
    assert outcome.records[0].prompt_tokens == 12


def test_generate_repeats_its_text_and_only_new_tokens_count() -> None:
    async def answer(mock: Mock, asked: Asked, writer: asyncio.StreamWriter) -> None:
        assert asked.path == "/generate"
        assert asked.body["sampling_params"]["max_new_tokens"] == 3
        stream_head(writer)
        for count in (1, 2, 3, 3):
            meta = {"prompt_tokens": len(asked.body["input_ids"]), "completion_tokens": count, "cached_tokens": 2}
            event(writer, {"text": " w" * count, "meta_info": meta})
        stream_end(writer)

    outcome, _ = bench(answer, requests=2, endpoint="generate", output_len="3")
    assert outcome.summary.completed == 2
    assert [len(record.chunks) for record in outcome.records] == [3, 3]
    assert outcome.summary.cached_tokens == 4


def test_without_streaming_there_is_an_end_but_no_first_token() -> None:
    async def answer(mock: Mock, asked: Asked, writer: asyncio.StreamWriter) -> None:
        assert "stream" not in asked.body
        plain(writer, 200, {"choices": [{"text": "x"}], "usage": {"prompt_tokens": 4, "completion_tokens": 5}})

    outcome, _ = bench(answer, stream=False)
    assert outcome.summary.completed == 6
    assert outcome.summary.ttft is None
    assert outcome.summary.e2e is not None


def test_a_kept_connection_that_the_server_closed_meanwhile_costs_nothing() -> None:
    async def answer(mock: Mock, asked: Asked, writer: asyncio.StreamWriter) -> None:
        await good()(mock, asked, writer)
        writer.close()

    outcome, mock = bench(answer, concurrency=1)
    assert outcome.summary.completed == 6
    assert mock.connections >= 6


def test_a_refusing_port_is_a_clear_error_before_the_run_and_a_failure_in_it() -> None:
    with pytest.raises(Unavailable, match=r"cannot reach 127\.0\.0\.1:9"):
        asyncio.run(measure(config(url="http://127.0.0.1:9")))
    outcome = asyncio.run(measure(config(url="http://127.0.0.1:9", model="m")))
    assert outcome.summary.errors == {"connect": 6}


def test_a_wrong_url_and_a_wrong_extra_body_are_the_callers_fault() -> None:
    with pytest.raises(ConfigError, match="http://HOST:PORT"):
        asyncio.run(measure(config(url="localhost:8000")))
    with pytest.raises(ConfigError, match="extra_body"):
        asyncio.run(measure(config(model="m", extra_body="[1]")))


def test_headers_and_extra_fields_arrive() -> None:
    _, mock = bench(good(), requests=1, api_key="secret", extra_body='{"top_k": 3}')
    assert mock.asked[0].headers["authorization"] == "Bearer secret"
    assert mock.asked[0].body["top_k"] == 3


def test_the_key_stays_out_of_the_report() -> None:
    outcome, _ = bench(good(), requests=1, api_key="secret")
    assert "secret" not in json_line(outcome)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_survive_any_cut(size: int) -> None:
    stream = b': ping\n\ndata: {"a":1}\r\n\r\ndata:b\ndata: c\n\nevent: x\ndata: [DONE]\n\ndata: unfinished'
    splitter = EventSplitter()
    events = [found for at in range(0, len(stream), size) for found in splitter.feed(stream[at : at + size])]
    assert events == [b'{"a":1}', b"b\nc", b"[DONE]"]


def test_cancelling_the_run_closes_every_connection() -> None:
    async def main() -> Mock:
        async with mock_server(good(first=30.0)) as mock:
            task = asyncio.ensure_future(measure(config(url=mock.url)))
            while mock.running < 6:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return mock

    mock = asyncio.run(main())
    assert mock.most == 6


SCRIPT = """
import sys
from baton.lab.bench import run
from baton.lab.config import BenchConfig
sys.exit(run(BenchConfig(url=sys.argv[1], requests=50, output_len="5", concurrency=2, warmup=0, save=sys.argv[2])))
"""


def test_ctrl_c_gives_a_partial_report(tmp_path: Path) -> None:
    async def answer(mock: Mock, asked: Asked, writer: asyncio.StreamWriter) -> None:
        await (good() if len(mock.asked) <= 4 else good(first=60.0))(mock, asked, writer)

    async def main() -> tuple[int | None, str]:
        async with mock_server(answer) as mock:
            bench = await asyncio.create_subprocess_exec(
                sys.executable, "-c", SCRIPT, mock.url, str(tmp_path / "raw.jsonl"), stdout=subprocess.PIPE
            )
            try:
                while len(mock.asked) < 6:
                    await asyncio.sleep(0.01)
                bench.send_signal(signal.SIGINT)
                out, _ = await asyncio.wait_for(bench.communicate(), 20)
            finally:
                if bench.returncode is None:
                    bench.kill()
                    await bench.wait()
            return bench.returncode, out.decode()

    code, out = asyncio.run(main())
    assert code == 130
    last = json.loads(out.splitlines()[-1])
    assert (last["completed"], last["interrupted"], last["failed"]) == (4, 2, 0)
    assert "4 completed" in out
    raw = [json.loads(line) for line in (tmp_path / "raw.jsonl").read_text().splitlines()]
    assert sorted(row["error"] for row in raw) == ["", "", "", "", "interrupted", "interrupted"]


def test_a_file_that_cannot_be_written_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match="save"):
        run(config(save=f"/nowhere-{os.getpid()}/raw.jsonl"))


def test_a_callers_own_signal_handlers_are_back_after_a_run() -> None:
    def mine(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        bench(good(), requests=1)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
