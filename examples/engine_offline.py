"""The heart without servers: scheduler, pages and the loop, with a fake model that echoes its prompt."""

from baton.base.clock import MonotonicClock
from baton.base.messages import Generate, Sampling
from baton.engine.blocks import PagePool
from baton.engine.engine import Engine
from baton.engine.roles import Committer, Unified
from baton.engine.scheduler import Scheduler
from baton.engine.sockets import EchoRunner

clock, runner = MonotonicClock(), EchoRunner()
scheduler = Scheduler(PagePool(64), page_size=16, max_running=8, max_waiting=32, chunk=128, max_model_len=1024)
engine = Engine(scheduler, runner, Unified(scheduler, Committer(scheduler, runner, [], clock)), clock)

for number in range(3):
    engine.handle(Generate(f"request-{number}", tuple(range(10 * number, 10 * number + 5)), Sampling(max_tokens=8)))

answers: dict[str, list[int]] = {}
while engine.busy:
    for message in engine.step():
        answers.setdefault(message.id, []).extend(message.tokens)

for name, tokens in answers.items():
    print(name, tokens)
print(scheduler.pool)
