"""What every transport owes: bytes where they belong, nothing after a tag is shut, the truth about what may come."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from baton.base.errors import ConfigError
from baton.base.messages import Codec
from baton.transports import tcp
from baton.transports.base import (
    TRANSPORTS,
    Grant,
    Peer,
    Transport,
    TransportError,
    Write,
    WriteState,
    coalesced,
    create,
)
from baton.transports.kernels import as_pieces, digest
from baton.transports.loopback import LoopbackTransport, Network
from baton.transports.region import Region
from baton.transports.shm import ShmDescription, host_id
from baton.transports.windows import Windows

SIZE = 1 << 20
TAG = 77


class Ends:
    """A source and a target with a transport each."""

    def __init__(self, name: str) -> None:
        self.woken = threading.Event()
        self.source, self.target = Region.create(SIZE), Region.create(SIZE)
        np.frombuffer(self.source.memory, np.uint8)[:] = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)
        network = Network()

        def make(region: Region) -> Transport:
            if name == "loopback":
                return LoopbackTransport(region, self.woken.set, network)
            return create(name, region, self.woken.set)

        self.sender, self.receiver = make(self.source), make(self.target)
        self.peers: list[Peer] = []

    def meet(self) -> tuple[Grant, Peer]:
        grant = self.receiver.grant("127.0.0.1")
        peer = self.sender.connect(grant.description)
        self.peers.append(peer)
        return grant, peer

    def settles(self, grant: Grant) -> bool:
        end = time.monotonic() + 5
        while not grant.settled and time.monotonic() < end:
            self.woken.wait(0.1)
            self.woken.clear()
        return grant.settled

    def close(self) -> None:
        for peer in self.peers:
            peer.close()
        self.sender.close()
        self.receiver.close()
        self.source.close()
        self.target.close()


@pytest.fixture(params=["loopback", *TRANSPORTS])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    made = Ends(request.param)
    yield made
    made.close()


def finished(peer: Peer, write: Write) -> WriteState:
    end = time.monotonic() + 10
    while write.state is WriteState.RUNNING and time.monotonic() < end:
        peer.poll(0.1)
    return write.state


@pytest.mark.parametrize("size", [1, 100, 1000, 4096, 30_000])
def test_bytes_arrive_where_they_belong(ends: Ends, size: int) -> None:
    grant, peer = ends.meet()
    draw = np.random.default_rng(size)
    count = min(SIZE // size // 2, 300)
    here, there = draw.permutation(SIZE // size)[:count] * size, draw.permutation(SIZE // size)[:count] * size
    pieces = as_pieces(np.stack([here, there, np.full(count, size)], 1))
    grant.admit(TAG, [(int(start), size) for start in there])
    write = peer.write(pieces, TAG)
    assert finished(peer, write) is WriteState.DONE
    assert write.bytes == count * size
    assert write.digests.tolist() == digest(ends.source.address, pieces).tolist()
    expected = bytearray(SIZE)
    for a, b, n in pieces.tolist():
        expected[b : b + n] = ends.source.memory[a : a + n]
    assert ends.target.memory == expected
    assert peer.quiesce(1.0)


def test_many_writes_under_way(ends: Ends) -> None:
    grant, peer = ends.meet()
    grant.admit(TAG, [(0, SIZE)])
    writes = [peer.write(as_pieces([(i * 4096, (255 - i) * 4096, 4096)]), TAG) for i in range(256)]
    assert all(finished(peer, write) is WriteState.DONE for write in writes)
    assert ends.target.memory[:4096] == ends.source.memory[255 * 4096 :]


@pytest.mark.parametrize("piece", [(0, SIZE - 10, 11), (SIZE - 10, 0, 11), (-1, 0, 5), (0, -1, 5), (0, 0, 0)])
def test_out_of_bounds_is_refused_before_a_byte_moves(ends: Ends, piece: tuple[int, int, int]) -> None:
    grant, peer = ends.meet()
    grant.admit(TAG, [(0, SIZE)])
    write = peer.write(as_pieces([(0, 0, 4), piece]), TAG)
    assert write.state is WriteState.FAILED_SETTLED
    assert not np.frombuffer(ends.target.memory, np.uint8).any()
    assert finished(peer, peer.write(as_pieces([(0, 0, 4)]), TAG)) is WriteState.DONE  # the peer lives


def test_what_is_not_admitted_does_not_arrive(ends: Ends) -> None:
    grant, peer = ends.meet()
    if not ends.receiver.capabilities.fenced_by_receiver:
        assert not grant.shut(TAG)  # it says so
        return
    grant.admit(TAG, [(4096, 4096)])
    for piece, tag in (((0, 0, 4096), TAG), ((0, 4095, 2), TAG), ((0, 8190, 4), TAG), ((0, 4096, 8), TAG + 1)):
        write = peer.write(as_pieces([piece]), tag)
        assert finished(peer, write) is WriteState.FAILED_SETTLED
        assert write.unwanted
    assert grant.shut(TAG)
    assert finished(peer, peer.write(as_pieces([(0, 4096, 8)]), TAG)) is WriteState.FAILED_SETTLED
    assert not np.frombuffer(ends.target.memory, np.uint8).any()
    grant.admit(TAG + 2, [(0, 8)])
    assert finished(peer, peer.write(as_pieces([(0, 0, 8)]), TAG + 2)) is WriteState.DONE


def test_a_grant_is_good_for_one_connection(ends: Ends) -> None:
    grant, peer = ends.meet()
    with pytest.raises(TransportError):
        ends.sender.connect(grant.description)
    assert not grant.settled
    peer.close()
    peer.close()
    assert ends.settles(grant)
    assert not peer.alive
    assert peer.write(as_pieces([(0, 0, 4)]), TAG).state is WriteState.FAILED_SETTLED


def test_a_revoked_grant(ends: Ends) -> None:
    unused = ends.receiver.grant("127.0.0.1")
    unused.revoke()
    assert ends.settles(unused)
    with pytest.raises(TransportError):
        ends.sender.connect(unused.description)
    used, peer = ends.meet()
    used.revoke()
    if not ends.receiver.capabilities.fenced_by_receiver:
        assert not used.settled  # P has the mapping: only its letting go settles
    peer.close()
    assert ends.settles(used)


def test_nonsense_descriptions(ends: Ends) -> None:
    for nonsense in (b"", b"\1", b"\1\xc1", b"x" * 100):
        with pytest.raises(TransportError):
            ends.sender.connect(nonsense)


def test_closing_while_the_wire_is_full() -> None:
    """A receiver that does not read: `close` from another thread ends the write, and nothing hangs."""
    region = Region.create(64 << 20)
    with socket.create_server(("127.0.0.1", 0)) as deaf:

        def answer() -> None:
            connection, _ = deaf.accept()
            connection.recv(32)
            connection.sendall(b"\1")
            kept.append(connection)

        kept: list[socket.socket] = []
        thread = threading.Thread(target=answer)
        thread.start()
        where = tcp.TcpDescription("127.0.0.1", deaf.getsockname()[1], b"t" * 16, region.size)
        peer = tcp.TcpPeer(region, where)
        thread.join()
        closer = threading.Timer(0.2, peer.close)
        closer.start()
        write = peer.write(as_pieces([(0, 0, region.size)]), TAG)
        assert write.state is WriteState.FAILED_SETTLED
        closer.join()
        kept[0].close()
    region.close()


@pytest.mark.parametrize(
    "noise",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 500,
        tcp.MAGIC + b"?" * 16 + b"\0" * 64,
    ],
)
def test_strangers_at_the_tcp_door(noise: bytes) -> None:
    ends = Ends("tcp")
    grant, peer = ends.meet()
    where = tcp._CODEC.decode(ends.receiver.grant("127.0.0.1").description)
    with socket.create_connection((where.host, where.port)) as stranger:
        stranger.sendall(noise)
        grant.admit(TAG, [(0, 8)])
        assert finished(peer, peer.write(as_pieces([(0, 0, 8)]), TAG)) is WriteState.DONE
    ends.close()


@pytest.mark.parametrize(
    "frame",
    [
        tcp.HEADER.pack(TAG, 1, 0),
        tcp.HEADER.pack(TAG, 1, 1 << 31),
        tcp.HEADER.pack(TAG, 1, 1) + (1 << 63).to_bytes(8, "little") + (8).to_bytes(8, "little"),
        tcp.HEADER.pack(TAG, 1, 1) + (0).to_bytes(8, "little") + (1 << 62).to_bytes(8, "little"),
        tcp.HEADER.pack(TAG, 1, 1) + (SIZE - 4).to_bytes(8, "little") + (8).to_bytes(8, "little") + b"x" * 8,
    ],
)
def test_a_guest_who_breaks_the_rules_writes_nowhere(frame: bytes) -> None:
    ends = Ends("tcp")
    grant = ends.receiver.grant("127.0.0.1")
    grant.admit(TAG, [(0, SIZE)])
    where = tcp._CODEC.decode(grant.description)
    with socket.create_connection((where.host, where.port)) as guest:
        guest.sendall(tcp.MAGIC + where.token + frame)
        guest.settimeout(5)
        answers = guest.recv(1)
        assert answers == b"\1"
        rest = guest.recv(100)
        assert rest == b"" or rest[-1] == tcp.UNWANTED
    assert not np.frombuffer(ends.target.memory, np.uint8).any()
    ends.close()


def test_a_tag_shut_in_the_middle_of_a_frame() -> None:
    """What the network still holds goes nowhere, even if its first half was welcome."""
    ends = Ends("tcp")
    grant = ends.receiver.grant("127.0.0.1")
    grant.admit(TAG, [(0, 1000)])
    where = tcp._CODEC.decode(grant.description)
    with socket.create_connection((where.host, where.port)) as late:
        late.settimeout(5)
        late.sendall(tcp.MAGIC + where.token)
        assert late.recv(1) == b"\1"
        late.sendall(tcp.HEADER.pack(TAG, 1, 1) + (0).to_bytes(8, "little") + (1000).to_bytes(8, "little") + b"a" * 500)
        end = time.monotonic() + 5
        while ends.target.memory[499] != ord("a"):
            assert time.monotonic() < end
        assert grant.shut(TAG)
        late.sendall(b"b" * 500)
        assert tcp.ACK.unpack(late.recv(tcp.ACK.size)) == (1, tcp.UNWANTED)
    assert bytes(ends.target.memory[:1000]) == b"a" * 500 + b"\0" * 500
    ends.close()


def test_shm_is_for_this_host_only() -> None:
    ends = Ends("shm")
    elsewhere = Codec(ShmDescription).encode(ShmDescription("another boot", b"\0nobody", b"t" * 16, SIZE))
    with pytest.raises(TransportError, match="another host"):
        ends.sender.connect(elsewhere)
    nobody = Codec(ShmDescription).encode(ShmDescription(host_id(), b"\0nobody", b"t" * 16, SIZE))
    with pytest.raises(TransportError, match="cannot reach"):
        ends.sender.connect(nobody)
    ends.close()


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="known: shm, tcp"):
        create("rdma", Region.__new__(Region), lambda: None)


def test_neighbours_become_one() -> None:
    pieces = as_pieces([(0, 100, 10), (10, 110, 10), (20, 130, 10), (30, 140, 5), (50, 145, 5)])
    assert coalesced(pieces).tolist() == [[0, 100, 20], [20, 130, 15], [50, 145, 5]]


def test_windows() -> None:
    windows = Windows()
    windows.admit(1, [(100, 10), (50, 10), (110, 10)])

    def inside(start: int, size: int) -> bool:
        return windows.covers(1, as_pieces([(0, start, size)]))

    assert inside(50, 10)
    assert inside(105, 5)
    assert not inside(49, 2)
    assert not inside(59, 2)
    assert not inside(0, 1)
    assert not inside(200, 1)
    windows.shut(1)
    assert not inside(50, 1)
