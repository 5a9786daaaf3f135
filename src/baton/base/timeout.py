"""How long a request may take, as it travels: the header `x-request-timeout`, the seconds that were left when it was
sent. Each hop counts on its own clock, and gives no more than it was given or is configured to give."""

from __future__ import annotations

from math import nan

from baton.base.errors import BadRequest

REQUEST_TIMEOUT = b"x-request-timeout"


def allowance(given: bytes | None, most: float) -> float:
    """The seconds a request with this header (None: without one) has here. Raises `BadRequest`."""
    if given is None:
        return most
    try:
        seconds = float(given)
    except ValueError:
        seconds = nan
    if not seconds > 0:
        name, value = REQUEST_TIMEOUT.decode(), given.decode("latin-1")
        raise BadRequest(f"{name} is {value!r}; it must be a number of seconds greater than 0", param=name)
    return min(seconds, most)


def header_line(left: float) -> bytes:
    """For the next hop."""
    return b"%b: %.3f\r\n" % (REQUEST_TIMEOUT, max(left, 0.001))
