import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.base.errors import ConfigError
from baton.controller.resources import assign_cores, available_cores, free_ports, is_free, require_free, visible_gpus


@pytest.mark.parametrize(
    ("workers", "cores", "shares"),
    [
        (1, [0, 1], [(0, 1)]),
        (2, [0, 1], [(0,), (1,)]),
        (2, [0, 1, 2, 3, 4], [(0, 1), (2, 3)]),
        (3, [4, 7], [(4,), (7,), (4,)]),
        (2, [5], [(5,), (5,)]),
    ],
)
def test_shares_of_cores(workers: int, cores: list[int], shares: list[tuple[int, ...]]) -> None:
    assert assign_cores(workers, cores) == shares


@given(st.integers(1, 20), st.sets(st.integers(0, 200), min_size=1))
def test_every_worker_has_as_many_cores_as_every_other(workers: int, available: set[int]) -> None:
    cores = sorted(available)
    shares = assign_cores(workers, cores)
    assert len(shares) == workers
    assert {len(share) for share in shares} == {max(1, len(cores) // workers)}
    used = [core for share in shares for core in share]
    assert set(used) <= available
    if workers <= len(cores):
        assert len(used) == len(set(used)), "nobody shares while there is enough"


def test_this_machine_has_a_core() -> None:
    assert available_cores()


@pytest.mark.parametrize(("value", "count"), [("", 0), ("-1", 0), ("0", 1), ("2,3", 2), ("GPU-1a, GPU-2b", 2)])
def test_gpus_that_the_environment_admits(monkeypatch: pytest.MonkeyPatch, value: str, count: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert visible_gpus() == count


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_a_port_in_use_is_not_free(taken: int) -> None:
    assert not is_free("127.0.0.1", taken)
    with pytest.raises(ConfigError, match=f"port {taken} on 127.0.0.1 is taken by another process; .* --port"):
        require_free("127.0.0.1", taken)
    assert is_free("127.0.0.1", require_free("127.0.0.1", 0))


def test_free_ports_pass_over_those_in_use_and_come_once(taken: int) -> None:
    ports = free_ports("127.0.0.1", taken, taken=[taken + 1])
    first, second = next(ports), next(ports)
    assert taken + 1 < first < second


def test_no_port_is_left() -> None:
    with pytest.raises(ConfigError, match=r"no free port on .* from 65535 upwards"):
        list(free_ports("127.0.0.1", 65535, taken=[65535]))
