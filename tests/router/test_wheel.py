from __future__ import annotations

import asyncio

from baton.router.wheel import RESOLUTION, Wheel
from tests.router.mocks import run, until


def test_timers_go_off_in_time_and_cancelled_ones_never() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        wheel, went = Wheel(loop), dict[float, float]()
        begun = loop.time()
        for seconds in (0.0, 0.01, 0.12, 0.3):
            wheel.call_later(seconds, lambda s=seconds: went.update({s: loop.time() - begun}))  # type: ignore[misc]
        never = [wheel.call_later(0.1, lambda: went.update({-1.0: 0.0})) for _ in range(3)]
        for timer in never:
            timer.cancel()
            timer.cancel()
        await until(lambda: len(went) == 4)
        assert -1.0 not in went
        assert list(went) == sorted(went)
        for seconds, at in went.items():
            assert seconds <= at < seconds + 2 * RESOLUTION + 1.0
        await asyncio.sleep(0.12)  # idle: it has stopped turning, and turns again when it is asked to
        again = asyncio.Event()
        wheel.call_later(0.02, again.set)
        await asyncio.wait_for(again.wait(), 2)
        wheel.close()

    run(main())


def test_a_timer_may_set_and_cancel_others_when_it_goes_off() -> None:
    async def main() -> None:
        wheel, went = Wheel(asyncio.get_running_loop()), list[str]()
        other = wheel.call_later(0.2, lambda: went.append("other"))

        def first() -> None:
            went.append("first")
            other.cancel()
            wheel.call_later(0.0, lambda: went.append("second"))

        wheel.call_later(0.01, first)
        await until(lambda: went == ["first", "second"])
        await asyncio.sleep(0.3)
        assert went == ["first", "second"]
        wheel.close()

    run(main())
