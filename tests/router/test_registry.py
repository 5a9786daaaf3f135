from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from baton.base.errors import BadRequest, NotFound, Unavailable
from baton.router.ask import Ask
from baton.router.health import Limits
from baton.router.origin import Origin
from baton.router.registry import Description, Facts, Registry, Role, Runtime, Worker
from baton.router.router import Router, RouterOptions
from baton.router.target import Target
from baton.router.upstream import Pool
from tests.router.mocks import Mock, hang, run, until

ASK = Ask(10, 10)
LONG = Ask(10_000, 10)


def registry() -> tuple[Registry, list[Worker]]:
    doubted: list[Worker] = []
    return Registry(Limits(failures=2, cooldown=1.0), doubted.append), doubted


def add(to: Registry, role: Role, port: int, *, up: bool = True, runtime: Runtime = "sglang") -> Worker:
    origin = Origin("127.0.0.1", port, False)
    worker = to.add(origin, Description(role, runtime=runtime), Pool(origin, connect_timeout=1), 0.0)
    if up:
        to.up(worker, 0.0)
    return worker


def loads(of: Registry) -> list[int]:
    """As the policies see them."""
    return [load for some in of.snapshot.fleets[""].prefill.values() for load in some.view.loads]


def test_loads_are_counted_at_dispatch_and_survive_a_new_snapshot() -> None:
    known, _ = registry()
    one, two = add(known, "prefill", 1), add(known, "prefill", 2)
    known.charge(two, 100, 0.0)
    assert loads(known) == [0, 100]
    known.down(one, "test", 0.0)
    assert loads(known) == [100]
    known.charge(two, 50, 0.0)
    assert loads(known) == [150]
    known.up(one, 0.0)
    known.discharge(two, 100)
    known.discharge(two, 50)
    assert loads(known) == [0, 0]
    assert two.in_flight == 0


def test_a_snapshot_never_changes_its_members() -> None:
    known, _ = registry()
    add(known, "prefill", 1)
    before = known.snapshot
    add(known, "prefill", 2)
    assert len(before.of("prefill")) == 1
    assert len(known.snapshot.of("prefill")) == 2


def test_failures_take_a_worker_out_and_a_trial_brings_it_back() -> None:
    known, doubted = registry()
    worker = add(known, "decode", 1)
    for _ in range(2):
        known.failed(worker, "reset", 5.0)
    assert known.snapshot.of("decode") == ()
    assert doubted == [worker, worker]
    known.refresh(6.0)
    assert known.snapshot.of("decode") == (worker,)
    known.charge(worker, 1, 6.0)  # the trial: nobody else meanwhile
    assert known.snapshot.of("decode") == ()
    known.succeeded(worker, 6.1)
    assert known.snapshot.of("decode") == (worker,)
    assert worker.errors == {"reset": 2}


def test_a_restarted_worker_is_a_new_revision() -> None:
    known, _ = registry()
    worker = add(known, "prefill", 1, up=False)
    for instance, revision in (("a", 1), ("a", 1), ("b", 2)):
        known.learned(worker, Facts("baton", instance, "m", 9000))
        assert worker.revision == revision
    assert worker.bootstrap_port == 9000


def test_one_worker_per_address() -> None:
    known, _ = registry()
    worker = add(known, "prefill", 1)
    with pytest.raises(BadRequest, match="registered already"):
        add(known, "decode", 1)
    assert known.find(worker.id) is known.find(worker.url) is worker
    known.remove(worker, 0.0)
    assert known.snapshot.of("prefill") == ()
    with pytest.raises(NotFound):
        known.find(worker.id)


def test_two_by_two_uses_all_four_pairs() -> None:
    async def main() -> None:
        router = Router(RouterOptions(), Random(1))
        try:
            for role, port in (("prefill", 1), ("prefill", 2), ("decode", 3), ("decode", 4)):
                add(router.registry, role, port)  # type: ignore[arg-type]
            targets = [router.plan(ASK, "") for _ in range(40)]
            pairs = Counter((t.prefill.origin.port if t.prefill else 0, t.answering.origin.port) for t in targets)
            assert pairs == {(1, 3): 10, (1, 4): 10, (2, 3): 10, (2, 4): 10}
            add(router.registry, "regular", 5)
            answering = Counter(router.plan(ASK, "").answering.origin.port for _ in range(30))
            assert answering == {3: 10, 4: 10, 5: 10}
            decodes = frozenset(router.registry.snapshot.of("decode"))
            assert router.plan(ASK, "", decodes).answering.role == "regular"
        finally:
            await router.close()

    run(main())


@pytest.mark.parametrize(("runtime", "alone"), [("baton", True), ("vllm", True), ("sglang", False)])
def test_a_decode_worker_without_partner_does_it_alone_if_it_can(runtime: Runtime, alone: bool) -> None:
    async def main() -> None:
        router = Router(RouterOptions(), Random(1))
        try:
            prefill = add(router.registry, "prefill", 1, runtime=runtime)
            decode = add(router.registry, "decode", 2, runtime=runtime)
            assert router.plan(LONG, "").prefill is prefill
            if alone:
                assert router.plan(LONG, "", frozenset({prefill})) == Target(decode, None, LONG.prompt_tokens)
            else:
                with pytest.raises(Unavailable, match="failed just now"):
                    router.plan(LONG, "", frozenset({prefill}))
        finally:
            await router.close()

    run(main())


def test_only_workers_of_one_kind_are_paired_and_models_are_kept_apart() -> None:
    async def main() -> None:
        router = Router(RouterOptions(), Random(1))
        try:
            for runtime, port in (("baton", 1), ("vllm", 3), ("sglang", 5)):
                add(router.registry, "prefill", port, runtime=runtime)  # type: ignore[arg-type]
                add(router.registry, "decode", port + 1, runtime=runtime)  # type: ignore[arg-type]
            for target in (router.plan(LONG, "") for _ in range(12)):
                assert target.prefill is not None
                assert target.prefill.runtime == target.answering.runtime
            for port, model in ((7, "one"), (8, "two")):
                worker = add(router.registry, "regular", port, up=False)
                router.registry.learned(worker, Facts("vllm", "", model))
                router.registry.up(worker, 0.0)
            assert [router.plan(ASK, m).answering.origin.port for m in ("one", "two")] == [7, 8]
            with pytest.raises(NotFound, match="model 'three' is not served here; served: , one, two"):
                router.plan(ASK, "three")
        finally:
            await router.close()

    run(main())


def test_the_reason_nobody_can_serve_is_readable() -> None:
    async def main() -> None:
        router = Router(RouterOptions())
        try:
            with pytest.raises(Unavailable, match="no workers are registered"):
                router.plan(ASK, "")
            prefill = add(router.registry, "prefill", 1)
            with pytest.raises(Unavailable, match="no decode worker is registered"):
                router.plan(ASK, "")
            add(router.registry, "decode", 2, up=False)
            with pytest.raises(Unavailable, match=r"decode-\w{4} is down \(not checked yet\)"):
                router.plan(ASK, "")
            assert router.plan_one().answering is prefill
        finally:
            await router.close()

    run(main())


def test_the_monitor_learns_recovers_and_refuses_a_wrong_role() -> None:
    async def main() -> None:
        info = {"disaggregation_mode": "prefill", "disaggregation_bootstrap_port": 7001, "instance": "one"}
        async with Mock(hang, info) as mock:
            router = Router(RouterOptions())
            try:
                worker = router.add(mock.url, Description("prefill"))
                await until(lambda: worker.healthy)
                assert (worker.bootstrap_port, worker.instance, worker.revision) == (7001, "one", 1)
                await mock.stop()
                router.registry.doubted(worker)
                await until(lambda: not worker.healthy)
                assert "refused" in worker.reason
                mock.info = {**info, "instance": "two"}
                await mock.start()
                await until(lambda: worker.healthy)
                assert (worker.instance, worker.revision) == ("two", 2)
                await router.remove(worker)
                wrong = router.add(mock.url, Description("decode"))
                await until(lambda: "says of itself" in wrong.reason)
                assert not wrong.healthy
            finally:
                await router.close()

    run(main())


def test_requests_that_are_not_generation_go_to_workers_of_their_model() -> None:
    async def main() -> None:
        router = Router(RouterOptions(), Random(1))
        try:
            for port, model in ((1, "one"), (2, "two"), (3, "two")):
                worker = add(router.registry, "regular", port, up=False)
                router.registry.learned(worker, Facts("baton", "", model))
                router.registry.up(worker, 0.0)
            ports = [{router.plan_one(model=m).answering.origin.port for _ in range(9)} for m in ("one", "two", "")]
            assert ports == [{1}, {2, 3}, {1, 2, 3}]
        finally:
            await router.close()

    run(main())
