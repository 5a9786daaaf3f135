"""Time of one decision per routing policy, with a prompt of 2,000 words that is cached in full: the longest look-up.

    python benchmarks/policies.py [--workers 10 1000] [--rounds 7]

Each figure is the best of `--rounds`, in microseconds: the code's cost, not the machine's other work. `sent` is what
learning costs after the decision. Every request is a new `Ask`: nothing is remembered from the last. The last line
is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable

from baton.router.ask import Ask
from baton.router.policies import BUILDERS, Policy, View, build

REQUESTS = 400
CONVERSATIONS = 50
WORDS = 2000


def ask(conversation: int) -> Ask:
    draw = random.Random(conversation)
    words = " ".join("".join(draw.choices("abcdefghij", k=5)) for _ in range(WORDS))
    prompt = f'[{{"role": "user", "content": "{words}"}}]'.encode()
    return Ask(len(prompt) // 4, 128, prompt, key=b"%d" % conversation)


def fresh(like: Ask) -> Ask:
    return Ask(like.prompt_tokens, like.max_tokens, like.prompt, like.key)


def microseconds(act: Callable[[Ask], object], asks: list[Ask]) -> float:
    started = time.perf_counter()
    for one in asks:
        act(one)
    return (time.perf_counter() - started) / len(asks) * 1e6


def measure(name: str, workers: int, rounds: int) -> dict[str, float]:
    draw = random.Random(workers)
    view = View(tuple(f"worker-{i}" for i in range(workers)), [draw.randrange(10_000, 100_000) for _ in range(workers)])
    policy: Policy = build(name)
    talks = [ask(i) for i in range(CONVERSATIONS)]
    for turn in range(REQUESTS):
        talk = talks[turn % CONVERSATIONS]
        policy.sent(talk, view.ids[policy.choose(talk, view, turn, draw.random())])
    choose, both = [], []
    for _ in range(rounds):
        asks = [fresh(talks[i % CONVERSATIONS]) for i in range(REQUESTS)]
        choose.append(microseconds(lambda one: policy.choose(one, view, 7, 0.7), asks))
        asks = [fresh(one) for one in asks]
        both.append(microseconds(lambda one: policy.sent(one, view.ids[policy.choose(one, view, 7, 0.7)]), asks))
    return {"choose": round(min(choose), 2), "sent": round(min(both) - min(choose), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print(f"{'us per request':18}" + "".join(f"{f'choose, {n}':>16}{f'sent, {n}':>16}" for n in options.workers))
    report: dict[str, dict[str, dict[str, float]]] = {}
    for name in BUILDERS:
        row = report[name] = {str(n): measure(name, n, options.rounds) for n in options.workers}
        print(f"{name:18}" + "".join(f"{cell['choose']:16.2f}{cell['sent']:16.2f}" for cell in row.values()))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
