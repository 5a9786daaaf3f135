"""How fast the workers are, learned from finished requests: what `split.decide` and `Retry-After` reckon with.

What was seen fades by half in `HALF_LIFE` seconds, but only when more is seen: whoever was idle for a day still knows
what it knew. What cannot be is ignored; what is far from the estimate is pulled near it, so one request that hung
moves little, and a change that lasts is followed in a few requests. Pure: time is a parameter.
"""

from __future__ import annotations

import math

from baton.router.split import Costs

HALF_LIFE = 60.0
LONGEST_FADE = 4
"""Half-lives; a longer pause fades no more."""
KEPT = 0.95
"""Of a ratio's past, at every further observation: about twenty count."""
OUTLIER = 8.0
"""An observation counts as at most so many times the estimate, and at least that fraction of it."""
LEAST_PROMPT = 64
"""Tokens; the seconds of a shorter prefill speak of its step, not of its length."""
SHORTEST_RETRY, LONGEST_RETRY = 1.0, 60.0


class Fading:
    """How much of the past is left when something is seen at `now`."""

    __slots__ = ("_at",)

    def __init__(self) -> None:
        self._at: float | None = None

    def factor(self, now: float) -> float:
        """Of everything before, since the last call. A clock that goes backwards stands still."""
        pause = 0.0 if self._at is None else max(0.0, now - self._at)
        self._at = now if self._at is None else max(now, self._at)
        return float(0.5 ** min(pause / HALF_LIFE, LONGEST_FADE))


class Ratio:
    """A typical amount per unit: the geometric mean of what was seen, weighed by units, so that a slow request moves it
    no more than a fast one. Begins at `start`, which weighs as much as `units`."""

    __slots__ = ("_fading", "_log", "_weight", "measured", "value")

    def __init__(self, start: float, units: float) -> None:
        self.value = start
        self._log, self._weight = math.log(start) * units, units
        self._fading = Fading()
        self.measured = False

    def see(self, units: float, amount: float, now: float) -> None:
        if not (_sane(units) and _sane(amount)):
            return
        left = self._fading.factor(now) * KEPT
        self._log = self._log * left + math.log(_near(amount / units, self.value)) * units
        self._weight = self._weight * left + units
        self.value = math.exp(self._log / self._weight)
        self.measured = True


class Line:
    """An amount with a base and a slope: least squares over faded observations.

    Two light anchors keep the shape of the beginning where the observations do not tell it (all of one size), at the
    height of the observations.
    """

    __slots__ = ("_base", "_fading", "_n", "_slope", "_start", "_x", "_xx", "_xy", "_y")

    ANCHOR_WEIGHT, ANCHOR_X = 0.1, 4096.0

    def __init__(self, base: float, slope: float) -> None:
        self._start = self._base, self._slope = base, slope
        self._fading = Fading()
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    @property
    def base(self) -> float:
        return self._base

    @property
    def slope(self) -> float:
        return self._slope

    def at(self, x: float) -> float:
        return self._base + self._slope * x

    def see(self, x: float, y: float, now: float) -> None:
        if not (_sane(x) and _sane(y)):
            return
        y = _near(y, max(self.at(x), 1e-4))
        left = self._fading.factor(now)
        self._n = self._n * left + 1
        self._x = self._x * left + x
        self._y = self._y * left + y
        self._xx = self._xx * left + x * x
        self._xy = self._xy * left + x * y
        self._fit()

    def _fit(self) -> None:
        base, slope = self._start
        height = self._y / (base * self._n + slope * self._x)
        near, far = base * height, (base + slope * self.ANCHOR_X) * height
        weight, x = self.ANCHOR_WEIGHT, self.ANCHOR_X
        n, sx, sy = self._n + 2 * weight, self._x + weight * x, self._y + weight * (near + far)
        sxx, sxy = self._xx + weight * x * x, self._xy + weight * x * far
        self._slope = max(0.0, (n * sxy - sx * sy) / (n * sxx - sx * sx))
        self._base = (sy - self._slope * sx) / n
        if self._base < 0:
            self._base, self._slope = 0.0, sxy / sxx


class Speeds:
    """Of the workers that serve one model. Until something is measured: a small model on a middling GPU."""

    __slots__ = ("_decode", "_handoff", "_local", "_output", "_prefill", "_prompt")

    def __init__(self) -> None:
        self._prefill = Ratio(1 / 4000, 256)
        self._local = Ratio(1 / 4000, 256)
        self._handoff = Line(0.005, 5e-6)
        self._decode = Ratio(0.02, 16)
        self._prompt = Ratio(512, 1)
        self._output = Ratio(256, 1)

    def prefilled(self, tokens: int, seconds: float, now: float) -> None:
        """A prefill worker computed `tokens` (prompt less cached) in `seconds`, its queue not included."""
        self._prefilled(self._prefill, tokens, seconds, now)

    def prefilled_locally(self, tokens: int, seconds: float, now: float) -> None:
        """A decode worker did."""
        self._prefilled(self._local, tokens, seconds, now)

    def handed_off(self, tokens: int, seconds: float, now: float) -> None:
        """`tokens` moved; `seconds` from the end of the prefill until the decode worker had them."""
        self._handoff.see(tokens, seconds, now)

    def decoded(self, tokens: int, seconds: float, now: float) -> None:
        """One request's `tokens` after the first came in `seconds`."""
        self._decode.see(tokens, seconds, now)
        if _sane(seconds):
            self._output.see(1, tokens, now)

    def costs(self, min_split_tokens: int = 64, harm_weight: float = 0.1) -> Costs:
        """For `split.decide`. The side that was never measured is taken to be as fast as the other."""
        prefill, local = self._prefill, self._local
        return Costs(
            prefill_speed=1 / (prefill if prefill.measured or not local.measured else local).value,
            local_speed=1 / (local if local.measured or not prefill.measured else prefill).value,
            handoff_base=self._handoff.base,
            handoff_per_token=self._handoff.slope,
            min_split_tokens=min_split_tokens,
            harm_weight=harm_weight,
        )

    def duration(self, first_token: float, max_tokens: int) -> float:
        """Seconds until the last token, if the first comes after `first_token` seconds and the answer is as long as
        answers are here, or `max_tokens` if that is less."""
        return first_token + self._decode.value * max(0.0, min(self._output.value, max_tokens))

    def retry_after(self, in_flight: int) -> float:
        """Seconds until one of `in_flight` requests is likely to be over, if they began evenly spread; 1 to 60."""
        costs, prompt = self.costs(), self._prompt.value
        first_token = prompt / costs.prefill_speed + self._handoff.at(prompt)
        seconds = self.duration(first_token, int(self._output.value) + 1) / max(1, in_flight)
        return min(max(seconds, SHORTEST_RETRY), LONGEST_RETRY)

    def _prefilled(self, side: Ratio, tokens: int, seconds: float, now: float) -> None:
        if tokens >= LEAST_PROMPT:
            side.see(tokens, seconds, now)
        if _sane(seconds):
            self._prompt.see(1, tokens, now)


def _sane(x: float) -> bool:
    return math.isfinite(x) and x > 0


def _near(seen: float, estimate: float) -> float:
    return min(max(seen, estimate / OUTLIER), estimate * OUTLIER)
