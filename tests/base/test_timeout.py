"""The seconds a request may take, from hop to hop."""

from __future__ import annotations

import pytest

from baton.base.config import GatewayConfig, WorkerConfig
from baton.base.errors import BadRequest, ConfigError
from baton.base.timeout import REQUEST_TIMEOUT, allowance, header_line


@pytest.mark.parametrize(
    ("given", "seconds"), [(None, 600.0), (b"5", 5.0), (b" 0.25 ", 0.25), (b"1e3", 600.0), (b"inf", 600.0)]
)
def test_no_more_than_given_and_no_more_than_configured(given: bytes | None, seconds: float) -> None:
    assert allowance(given, 600.0) == seconds


@pytest.mark.parametrize("given", [b"", b"0", b"-1", b"nan", b"-inf", b"5s", b"\xff"])
def test_what_is_no_time(given: bytes) -> None:
    with pytest.raises(BadRequest, match=r"x-request-timeout is .* number of seconds") as caught:
        allowance(given, 600.0)
    assert caught.value.param == "x-request-timeout"


@pytest.mark.parametrize("left", [599.9996, 1.0, 0.0004, 0.0, -3.0])
def test_what_is_sent_is_understood(left: float) -> None:
    """Also when nothing is left: the next hop says so, not that the header is wrong."""
    name, _, value = header_line(left).removesuffix(b"\r\n").partition(b": ")
    assert name == REQUEST_TIMEOUT
    assert allowance(value, 600.0) == pytest.approx(max(left, 0.001), abs=0.0006)


@pytest.mark.parametrize("config", [WorkerConfig, GatewayConfig])
@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_time_out_that_is_none(config: type, seconds: float) -> None:
    with pytest.raises(ConfigError, match="request_timeout"):
        config(request_timeout=seconds)
