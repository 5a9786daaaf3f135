"""Our gateway before a real vLLM pair (prefill and decode, KV cache over NIXL), held against one plain vLLM instance.

    python benchmarks/vllm_pair.py --vllm PEERS/vllm             about eight minutes on two cores, 11 GB of memory
    python benchmarks/vllm_pair.py --vllm PEERS/vllm --connector nixl-push

A check, not a measurement: are the texts the same, did decode use what prefill computed, is nothing left behind when
clients leave, and does what a client writes itself do no harm? Prints one line per check and, last, one JSON line;
the exit status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from peers import START_SECONDS, Peers, two_cores
from servers import BATON, Fleet, NotReady, Server, free_port, note

from baton.lab.report import Conditions, rounded
from baton.models import resolve

CONNECTORS = {"nixl": "NixlConnector", "nixl-push": "NixlPushConnector"}
LEASE_SECONDS = 30.0
"""After which a prefill worker lets go what nobody came for."""
WORDS = "The lighthouse keeper counted the ships that came home before the storm and wrote their names in a book. "
TOPICS = ("water", "the moon", "bread", "a river in winter", "the first train")
PROMPTS = [f"{WORDS * (2 + 3 * i)}Now tell me, in a few sentences, about {topic}." for i, topic in enumerate(TOPICS)]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
COMMON = {"model": "bench", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
KILL = {"do_remote_prefill": True}
"""What ends a vLLM server, if a client may write it."""


def question(path: str, prompt: str, **more: Any) -> dict[str, Any]:
    asked = {"prompt": prompt} if path == COMPLETIONS else {"messages": [{"role": "user", "content": prompt}]}
    return {**COMMON, **asked, **more}


def texts(client: httpx.Client, path: str, body: dict[str, Any]) -> list[str]:
    """What every choice says, streamed or not. Raises `httpx.HTTPError`."""
    if not body.get("stream"):
        reply = client.post(path, json=body).raise_for_status()
        return [said(choice) for choice in reply.json()["choices"]]
    parts: dict[int, str] = {}
    with client.stream("POST", path, json=body) as reply:
        for event in events(reply.raise_for_status()):
            for choice in event["choices"]:
                parts[choice["index"]] = parts.get(choice["index"], "") + said(choice)
    return [parts[index] for index in sorted(parts)]


def events(reply: httpx.Response) -> Iterator[dict[str, Any]]:
    """Raises `httpx.RemoteProtocolError` if the stream does not end as it should."""
    for line in reply.iter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line[6:])
    raise httpx.RemoteProtocolError("no [DONE]")


def said(choice: dict[str, Any]) -> str:
    return str(choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or "")


def series(url: str) -> dict[str, float]:
    """A server's metrics without the label of its model."""
    found: dict[str, float] = {}
    for line in httpx.get(f"{url}/metrics", timeout=20).text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            labels = [label for label in name.rstrip("}").partition("{")[2].split(",") if label]
            kept = ",".join(label for label in labels if not label.startswith(("engine=", "model_name=")))
            found[name.partition("{")[0] + (f"{{{kept}}}" if kept else "")] = float(value)
    return found


def tokens_by_source(url: str) -> dict[str, float]:
    name = 'vllm:prompt_tokens_by_source_total{source="'
    return {key[len(name) : -2]: value for key, value in series(url).items() if key.startswith(name)}


@dataclass
class Bench:
    """The servers, and what was found out."""

    plain: httpx.Client
    gateway: httpx.Client
    prefill: Server
    decode: Server
    results: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def check(self, name: str, test: Callable[[Bench], Any]) -> None:
        """`test` returns what is worth telling; it raises if the check fails."""
        begun = time.monotonic()
        try:
            found, word = test(self), "ok"
        except (AssertionError, httpx.HTTPError, KeyError, ValueError) as error:
            found, word = repr(error), "FAILED"
            self.failed.append(name)
        self.results[name] = found
        note(f"{word:7}{name} ({time.monotonic() - begun:.1f} s): {found}")

    def same(self, path: str, body: dict[str, Any]) -> list[str]:
        """The gateway's answer, which must be the plain instance's."""
        here, there = texts(self.gateway, path, body), texts(self.plain, path, body)
        assert here == there, f"{here} instead of {there}"
        return here


def equal_texts(bench: Bench) -> dict[str, Any]:
    before, count = tokens_by_source(bench.decode.url), 0
    for path in (CHAT, COMPLETIONS):
        for index, prompt in enumerate(PROMPTS):
            stream = {"stream": True, "stream_options": {"include_usage": True}} if index % 2 else {}
            assert bench.same(path, question(path, prompt, **stream))[0]
            count += 1
    after = tokens_by_source(bench.decode.url)
    sources = {name: after[name] - before.get(name, 0.0) for name in after}
    assert sources["local_compute"] <= count, sources
    assert sources["external_kv_transfer"] > 100 * len(PROMPTS), sources
    return {"requests": count, "decode's prompt tokens by source": sources}


def sampling(bench: Bench) -> int:
    """A seed, logprobs and n: the first token is decode's own."""
    prompt = f"Once more. {PROMPTS[1]}"
    bench.same(COMPLETIONS, question(COMPLETIONS, prompt, temperature=0.8, seed=7, logprobs=3))
    both = bench.same(CHAT, question(CHAT, prompt, n=2, temperature=0.8, seed=7))
    assert len(both) == 2
    return len(both)


def batch(bench: Bench) -> int:
    """Several prompts in one request go whole: nobody gets another one's cache."""
    prompts = [f"{topic}: {PROMPTS[0]}" for topic in TOPICS[:3]]
    return len(bench.same(COMPLETIONS, {**COMMON, "prompt": prompts}))


def harmless(bench: Bench) -> dict[str, int]:
    """`kv_transfer_params` from a client, however it is written: the servers live on."""
    kill = json.dumps(KILL)
    plain = json.dumps(question(CHAT, "Hello."))[:-1]
    bodies = {
        "as it is": f'{plain},"kv_transfer_params":{kill}}}',
        "twice": f'{plain},"kv_transfer_params":{{}},"kv_transfer_params":{kill}}}',
        "escaped": f'{plain},"kv\\u005ftransfer_params":{kill}}}',
        "in vllm_xargs": f'{plain},"vllm_xargs":{{"kv_transfer_params":"x"}}}}',
        "beside NaN": f'{plain},"x":NaN,"kv_transfer_params":{kill}}}',
    }
    found = {}
    for name, body in bodies.items():
        for path in (CHAT, "/v1/embeddings", "/v1/chat/completions/render"):
            for raw in (body.encode(), body.encode("utf-16")):
                reply = bench.gateway.post(path, content=raw, headers={"content-type": "application/json"})
                found[f"{path}, {name}{', UTF-16' if len(raw) > len(body) else ''}"] = reply.status_code
    for server in (bench.prefill, bench.decode):
        assert server.ready(), f"{server.name} is gone"
    bench.same(CHAT, question(CHAT, "Hello again."))
    return found


def leave(client: httpx.Client, body: dict[str, Any], after: float) -> None:
    begun = time.monotonic()
    try:
        with client.stream("POST", CHAT, json=body, timeout=httpx.Timeout(after, connect=5)) as reply:
            for _ in reply.iter_raw():
                if time.monotonic() - begun > after:
                    return
    except httpx.TimeoutException:
        return
    raise AssertionError(f"{body['max_tokens']} tokens within {after} s")


def leaving(bench: Bench) -> dict[str, float]:
    """Clients leave at all times of a request's life; prefill's lease never has to run out for them, only for one that
    is left behind on purpose."""
    expired = "vllm:nixl_num_kv_expired_reqs_total"
    before = series(bench.prefill.url).get(expired, 0.0)
    waits = (0.02, 0.1, 0.3, 0.6, 0.9, 1.2, 1.6, 2.0, 2.5, 3.0)
    for index, wait in enumerate(waits):
        prompt = f"Chapter {index}. {PROMPTS[4]}"
        leave(bench.gateway, question(CHAT, prompt, stream=bool(index % 2), max_tokens=200), wait)
    left_behind = question(COMPLETIONS, f"On purpose. {PROMPTS[2]}", max_tokens=1)
    left_behind["kv_transfer_params"] = {"do_remote_decode": True, "do_remote_prefill": False}
    httpx.post(f"{bench.prefill.url}{COMPLETIONS}", json=left_behind, timeout=60).raise_for_status()
    time.sleep(LEASE_SECONDS + 6)
    texts(bench.gateway, CHAT, question(CHAT, "Are you there?"))  # makes prefill look at its leases, too
    time.sleep(2)
    now = series(bench.prefill.url)
    left = now[expired] - before
    assert left == 1, f"{left} sets of blocks were left behind"
    return {"left": len(waits), "leases run out, with ours": left, "cache in use": now["vllm:kv_cache_usage_perc"]}


def killed(bench: Bench) -> dict[str, Any]:
    """The prefill worker dies with a request in hand, and stays dead: decode does it all."""
    prompt = f"An end. {PROMPTS[4]}"
    answers: list[list[str]] = []
    body = question(CHAT, prompt)
    asking = threading.Thread(target=lambda: answers.append(texts(bench.gateway, CHAT, body)))
    asking.start()
    time.sleep(0.5)
    os.killpg(bench.prefill.process.pid, signal.SIGKILL)
    asking.join()
    assert answers == [texts(bench.plain, CHAT, body)], answers
    begun = time.monotonic()
    for path in (CHAT, COMPLETIONS):
        bench.same(path, question(path, f"Afterwards. {PROMPTS[2]}", stream=path == CHAT))
    return {"seconds for two requests": time.monotonic() - begun}


CHECKS = {
    "equal texts, transferred": equal_texts,
    "seed, logprobs, n": sampling,
    "batch": batch,
    "client's kv_transfer_params": harmless,
    "clients that leave": leaving,
    "prefill killed": killed,
}


def start(fleet: Fleet, args: argparse.Namespace, model: str) -> tuple[Server, Server, Server, Server]:
    """(plain, prefill, decode, gateway)"""
    peers = Peers(args.vllm.resolve(), args.vllm, model)
    first, second = two_cores()
    eager, connector = not args.compile, CONNECTORS[args.connector]

    def half(name: str, core: int, role: str) -> Server:
        return peers.instance(fleet, name, [core], role=role, side_port=free_port(), eager=eager, connector=connector)

    prefill, decode = half("vllm prefill", first, "kv_producer"), half("vllm decode", second, "kv_consumer")
    plain = peers.instance(fleet, "vllm plain", [first], eager=eager)
    fleet.wait([prefill, decode, plain], START_SECONDS)
    port = free_port()
    command = [*BATON, "gateway", "--port", str(port), "--split", "always", "--prefill", prefill.url]
    gateway = fleet.launch("gateway", [*command, "--decode", decode.url], port, ready_path="/readiness")
    fleet.wait([gateway], 30)
    return plain, prefill, decode, gateway


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="short name, Hub id or directory")
    parser.add_argument("--vllm", type=Path, required=True, help="virtual environment of vLLM (benchmarks/peers.py)")
    parser.add_argument("--connector", choices=sorted(CONNECTORS), default="nixl")
    parser.add_argument("--compile", action="store_true", help="with torch.compile: starts minutes later")
    parser.add_argument("--only", default="", help="checks of whose names this is a part")
    parser.add_argument("--logs", type=Path, help="where logs of the servers go")
    return parser.parse_args()


def main() -> int:
    args, conditions = arguments(), Conditions.here()
    logs = args.logs or Path(tempfile.mkdtemp(prefix="baton-vllm-"))
    note(f"logs: {logs}")
    try:
        with Fleet(logs) as fleet:
            plain, prefill, decode, gateway = start(fleet, args, str(resolve(args.model).resolve()))
            with (
                httpx.Client(base_url=plain.url, timeout=120) as there,
                httpx.Client(base_url=gateway.url, timeout=120) as here,
            ):
                bench = Bench(there, here, prefill, decode)
                for name, test in CHECKS.items():
                    if args.only in name:
                        bench.check(name, test)
    except (KeyboardInterrupt, NotReady) as error:
        note(f"stopped early: {error if str(error) else 'interrupted'}")
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    result = {"bench": "vllm_pair", "connector": args.connector, "checks": bench.results, "failed": bench.failed}
    document = rounded({**result, "conditions": dataclasses.asdict(conditions)})
    sys.stdout.write(json.dumps(document, separators=(",", ":")) + "\n")
    return int(bool(bench.failed))


if __name__ == "__main__":
    sys.exit(main())
