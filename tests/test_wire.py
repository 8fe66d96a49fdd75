"""The replication protocol: every event whole, split anywhere, damaged, and out of turn."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replicator import messages as m
from replicator import wire
from replicator.messages import Data, Event, Zero
from replicator.wire import (
    TRANSITIONS,
    Connection,
    LocalProtocolError,
    RemoteProtocolError,
    State,
)

ident = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
count = st.integers(0, m.OFFSET_MAX)
u64, disk = st.integers(0, 2**64 - 1), st.integers(0, m.DISKS_MAX - 1)
offset = st.integers(0, 2**62)
digest = st.binary(min_size=16, max_size=16)


@st.composite
def hashes(draw: st.DrawFn) -> m.Hashes:
    start = position = draw(offset)
    segments = []
    for zero, length in draw(
        st.lists(st.tuples(st.booleans(), st.integers(1, 200_000)), min_size=1, max_size=4)
    ):
        blocks = 0 if zero else -(-length // m.HASH_BLOCK_BYTES)
        digests = draw(st.binary(min_size=16 * blocks, max_size=16 * blocks))
        segments.append(m.Segment(position, length, zero, digests))
        position += length
    return m.Hashes(draw(disk), start, position - start, segments)


reached = st.builds(m.Reached, ident, count, disk, count)
EVENTS: dict[type[Event], st.SearchStrategy[Any]] = {
    m.Hello: st.builds(
        m.Hello,
        st.lists(st.integers(2, 65535), max_size=4).map(lambda rest: [1, *rest]),
        st.sampled_from(["replicate", "verify", "resolve", "list", "restore"]),
        u64,
    ),
    m.Welcome: st.just(m.Welcome(1)),
    m.Open: st.builds(
        m.Open,
        *[ident] * 4,
        count,
        st.lists(
            st.builds(m.DiskInfo, ident, count, st.integers(1, m.OFFSET_MAX)),
            min_size=1,
            max_size=4,
        ),
    ),
    m.Opened: st.builds(
        m.Opened,
        st.sampled_from(["new", "existing", "filling", "following", "promoted"]),
        st.none() | ident,
        st.none() | count,
        st.none() | ident,
        st.booleans(),
        st.none() | reached,
        st.lists(reached, max_size=m.RECEIVED_MAX),
        st.none() | digest,
        st.none() | digest,
    ),
    m.Checkpoint: st.builds(m.Checkpoint, reached, count, st.binary(max_size=64)),
    m.Begin: st.builds(
        *(m.Begin, count, st.sampled_from(["fill", "compare", "pass"]), count, st.booleans()),
        st.none() | digest,
    ),
    Data: st.one_of(
        st.builds(Data.of, disk, offset, st.binary(min_size=1, max_size=300)),
        # Whether it can be unpacked is for whoever unpacks it; lengths are the wire's business.
        st.builds(
            Data,
            disk,
            offset,
            st.binary(min_size=16, max_size=16),
            st.binary(min_size=1, max_size=300).map(memoryview),
            st.integers(301, m.DATA_BYTES_MAX),
        ),
    ),
    Zero: st.builds(Zero, disk, offset, st.integers(1, 2**62 - 1)),
    m.HashRequest: st.builds(m.HashRequest, disk, offset, st.integers(1, m.HASH_LENGTH_MAX)),
    m.Hashes: hashes(),
    m.Commit: st.builds(m.Commit, ident, count, count, st.binary(max_size=64)),
    m.Committed: st.builds(m.Committed, ident, count),
    m.Promote: st.builds(m.Promote, ident, count, st.none() | digest),
    m.Promoted: st.builds(m.Promoted, ident, count),
    m.Abort: st.builds(m.Abort, ident),
    m.Aborted: st.builds(m.Aborted, ident),
    m.Resolve: st.builds(m.Resolve, ident, ident, ident),
    m.Restore: st.builds(m.Restore, ident, st.none() | count),
    m.Restorable: st.builds(
        m.Restorable,
        count,
        ident,
        count,
        st.lists(
            st.builds(m.DiskInfo, ident, count, st.integers(1, m.OFFSET_MAX)),
            min_size=1,
            max_size=4,
        ),
    ),
    m.ReadRequest: st.builds(m.ReadRequest, disk, offset, st.integers(1, m.HASH_LENGTH_MAX)),
    m.Ping: st.builds(m.Ping, u64),
    m.Pong: st.builds(m.Pong, u64),
    m.Failed: st.builds(m.Failed, ident, st.text(st.characters(codec="utf-8"), max_size=50)),
    m.Bye: st.just(m.Bye()),
}
ANY_KIND = sorted(EVENTS, key=lambda kind: kind.__name__)

TO_GREETED: list[tuple[wire.Role, Event]] = [
    ("sender", m.Hello([1, 2], "replicate", 7)),
    ("receiver", m.Welcome(1)),
]
TO_READY: list[tuple[wire.Role, Event]] = [
    *TO_GREETED,
    ("sender", m.Open("vm", "source", "instance", "gen", 3, [m.DiskInfo("vda", 1 << 30, 65536)])),
    ("receiver", m.Opened("new", None, None, None)),
]
TO_PASSING: list[tuple[wire.Role, Event]] = [*TO_READY, ("sender", m.Begin(3, "fill"))]
PATHS: dict[State, list[tuple[wire.Role, Event]]] = {
    State.IDLE: [],
    State.GREETING: TO_GREETED[:1],
    State.GREETED: TO_GREETED,
    State.OPENING: TO_READY[:-1],
    State.READY: TO_READY,
    State.PASSING: TO_PASSING,
    State.COMMITTING: [*TO_PASSING, ("sender", m.Commit("gen", 3, 0, b""))],
    State.PROMOTING: [*TO_READY, ("sender", m.Promote("t", 3))],
    State.PROMOTED: [
        *TO_READY,
        ("sender", m.Promote("t", 3)),
        ("receiver", m.Promoted("t", 3)),
    ],
    State.ABORTING: [*TO_READY, ("sender", m.Abort("t"))],
    State.RESOLVING: [*TO_GREETED, ("sender", m.Resolve("vm", "source", "t"))],
    State.LOCATING: [*TO_GREETED, ("sender", m.Restore("vm", None))],
    State.RESTORING: [
        *TO_GREETED,
        ("sender", m.Restore("vm", None)),
        ("receiver", m.Restorable(3, "gen", 7, [m.DiskInfo("vda", 1 << 30, 65536)])),
    ],
    State.CLOSED: [*TO_GREETED, ("receiver", m.Bye())],
}
ROLES: tuple[wire.Role, wire.Role] = ("sender", "receiver")


def pair(state: State) -> dict[wire.Role, Connection]:
    """Both ends of a conversation that has come to a state."""
    ends: dict[wire.Role, Connection] = {role: Connection(role) for role in ROLES}
    for role, event in PATHS[state]:
        stream = b"".join(ends[role].send(event))
        assert ends[other(role)].receive_data(stream) == [event]
    assert {end.state for end in ends.values()} == {state}
    return ends


def other(role: wire.Role) -> wire.Role:
    return "receiver" if role == "sender" else "sender"


def home(kind: type[Event]) -> tuple[State, wire.Role]:
    """A state and a side from which an event may be sent."""
    for state, rules in TRANSITIONS.items():
        if kind in rules:
            return state, min(rules[kind][0])
    raise AssertionError(kind)


def example(kind: type[Event]) -> Event:
    """One event of a kind, the same each time."""
    event: Event = {
        **{type(event): event for path in PATHS.values() for _, event in path},
        Data: Data.of(1, 4096, b"some bytes"),
        Zero: Zero(1, 65536, 1 << 20),
        m.HashRequest: m.HashRequest(0, 0, 65537),
        m.Hashes: m.Hashes(
            0,
            0,
            65538,
            [m.Segment(0, 65537, False, bytes(range(32))), m.Segment(65537, 1, True, b"")],
        ),
        m.Checkpoint: m.Checkpoint(m.Reached("gen", 3, 1, 1 << 20), 17, bytes(16)),
        m.Committed: m.Committed("gen", 3),
        m.ReadRequest: m.ReadRequest(0, 0, 65537),
        m.Aborted: m.Aborted("t"),
        m.Ping: m.Ping(2**64 - 1),
        m.Pong: m.Pong(0),
        m.Failed: m.Failed("disk-full", "no space left"),
    }[kind]
    return event


def test_every_state_can_be_reached_and_every_event_sent() -> None:
    assert set(PATHS) == set(State) == set(TRANSITIONS)
    assert {kind for rules in TRANSITIONS.values() for kind in rules} == set(EVENTS)


@given(st.sampled_from(ANY_KIND).flatmap(lambda kind: EVENTS[kind]))
def test_event_survives_the_wire(event: Event) -> None:
    state, role = home(type(event))
    ends = pair(state)
    [received] = ends[other(role)].receive_data(b"".join(ends[role].send(event)))
    assert received == event
    assert ends["sender"].state == ends["receiver"].state == TRANSITIONS[state][type(event)][1]
    if isinstance(received, Data) and not received.packed_from:
        received.content()


@given(
    st.lists(st.one_of(EVENTS[Data], EVENTS[Zero], EVENTS[m.Ping], EVENTS[m.HashRequest])),
    st.data(),
)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_any_split_gives_the_same_events(events: list[Event], data: st.DataObject) -> None:
    ends = pair(State.PASSING)
    stream = b"".join(b"".join(ends["sender"].send(event)) for event in events)
    cuts = data.draw(st.lists(st.integers(0, len(stream))).map(sorted))
    received: list[Event] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        received += ends["receiver"].receive_data(stream[start:end])
    assert received == events
    ends["receiver"].eof()


@pytest.mark.parametrize("kind", ANY_KIND)
def test_byte_by_byte(kind: type[Event]) -> None:
    state, role = home(kind)
    ends = pair(state)
    stream = b"".join(ends[role].send(example(kind)))
    peer = ends[other(role)]
    for i in range(len(stream) - 1):
        assert peer.receive_data(stream[i : i + 1]) == []
    assert peer.receive_data(stream[-1:]) == [example(kind)]


@pytest.mark.parametrize("kind", ANY_KIND)
def test_any_flipped_byte_is_detected(kind: type[Event]) -> None:
    state, role = home(kind)
    stream = b"".join(pair(state)[role].send(example(kind)))
    for i in range(len(stream)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(stream)
            damaged[i] ^= flip
            peer = pair(state)[other(role)]
            with pytest.raises(RemoteProtocolError):
                for event in peer.receive_data(damaged):
                    assert isinstance(event, Data)
                    event.content()
                # A greater length is noticed when the bytes do not come.
                peer.eof()


@pytest.mark.parametrize("kind", ANY_KIND)
def test_stream_cut_inside_a_frame(kind: type[Event]) -> None:
    state, role = home(kind)
    stream = b"".join(pair(state)[role].send(example(kind)))
    for end in range(1, len(stream)):
        peer = pair(state)[other(role)]
        assert peer.receive_data(stream[:end]) == []
        with pytest.raises(RemoteProtocolError, match="inside a frame"):
            peer.eof()


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("kind", ANY_KIND)
def test_only_the_table_says_what_may_be_sent(state: State, kind: type[Event]) -> None:
    event = example(kind)
    home_state, home_role = home(kind)
    stream = b"".join(pair(home_state)[home_role].send(event))
    for role in ROLES:
        allowed = kind in TRANSITIONS[state] and role in TRANSITIONS[state][kind][0]
        ends = pair(state)
        local, remote = ends[role], ends[other(role)]
        if allowed:
            local.send(event)
            assert remote.receive_data(stream) == [event]
            continue
        with pytest.raises(LocalProtocolError):
            local.send(event)
        assert local.state is state
        if state is State.CLOSED and other(role) == "receiver":
            # The side that said its last word lets pass what was on its way.
            assert remote.receive_data(stream) == ([event] if kind in (m.Failed, m.Bye) else [])
            continue
        with pytest.raises(RemoteProtocolError):
            remote.receive_data(stream)


def test_dead_after_an_error_of_the_peer() -> None:
    end = pair(State.PASSING)["receiver"]
    with pytest.raises(RemoteProtocolError) as first:
        end.receive_data(b"junk")
    for again in (end.get_buffer, end.eof, lambda: end.send(m.Bye()), lambda: end.received(1)):
        with pytest.raises(RemoteProtocolError) as later:
            again()
        assert str(later.value) == str(first.value)


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.0\r\n\r\n", b"SSH-2.0-x\r\n", b"\0", b"FDX"])
def test_foreign_protocol_is_named_at_once(junk: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="does not speak the fusedisk protocol"):
        Connection("receiver").receive_data(junk)


def test_another_framing_is_named() -> None:
    with pytest.raises(RemoteProtocolError, match="another version"):
        Connection("receiver").receive_data(b"FDW2")


@given(st.binary(max_size=200))
def test_garbage_never_makes_an_event(junk: bytes) -> None:
    end = Connection("receiver")
    try:
        assert end.receive_data(b"FDW1" + junk) == []
    except RemoteProtocolError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("number", "length"),
    [
        (6, 32),
        (6, 32 + m.DATA_BYTES_MAX + 1),
        (6, 2**32 - 1),
        (7, 15),
        (7, 17),
        (10, 0),
        (10, m.MESSAGE_BYTES_MAX + 1),
    ],
)
def test_length_is_refused_with_the_header_alone(number: int, length: int) -> None:
    header = struct.pack("<4sBBHIIQ", b"FDW1", number, 0, 0, length, 0, 0)
    with pytest.raises(RemoteProtocolError, match="length"):
        pair(State.PASSING)["receiver"].receive_data(header)


def test_frame_out_of_turn_is_refused_with_the_header_alone() -> None:
    header = struct.pack("<4sBBHIIQ", b"FDW1", 6, 0, 0, m.DATA_BYTES_MAX, 0, 0)
    with pytest.raises(RemoteProtocolError, match="may not send Data in state idle"):
        Connection("receiver").receive_data(header)


def test_bulk_data_is_neither_copied_nor_shared() -> None:
    ends = pair(State.PASSING)
    source = bytearray(b"a" * m.DATA_BYTES_MAX)
    _, bulk = ends["sender"].send(Data.of(0, 0, source))
    assert isinstance(bulk, memoryview) and bulk.obj is source
    receiver = ends["receiver"]
    first_frame = b"".join(ends["sender"].send(Data.of(0, 0, b"a" * m.DATA_BYTES_MAX)))
    [first] = receiver.receive_data(first_frame)
    head, bulk = ends["sender"].send(Data.of(0, 0, b"b" * m.DATA_BYTES_MAX))
    receiver.receive_data(head)
    # What is left of the frame is offered in one piece.
    buffer = receiver.get_buffer()
    assert len(buffer) == m.DATA_BYTES_MAX
    buffer[:] = bulk
    [second] = receiver.received(len(buffer))
    assert isinstance(second, Data) and second.data.obj is buffer.obj and second.data.readonly
    assert isinstance(first, Data)
    first.content()
    second.content()


@pytest.mark.parametrize(
    "event",
    [
        Data.of(0, 0, b""),
        Data.of(0, 0, bytes(m.DATA_BYTES_MAX + 1)),
        Data.of(m.DISKS_MAX, 0, b"x"),
        Data(0, 0, b"short", memoryview(b"x")),
        Data(0, 0, bytes(16), memoryview(b"xy"), 2),
        Data(0, 0, bytes(16), memoryview(b"xy"), m.DATA_BYTES_MAX + 1),
        Data(0, m.OFFSET_MAX - 9, bytes(16), memoryview(b"xy"), 10),
        Data.of(0, m.OFFSET_MAX, b"x"),
        Zero(0, -1, 1),
        Zero(0, 0, 0),
        m.Ping(2**64),
        m.Ping(-1),
        m.Ping("1"),  # type: ignore[arg-type]
        m.Commit("", 1, 1, b""),
        m.Commit("\ud800", 1, 1, b""),
        m.Failed("x", "y" * 1025),
    ],
)
def test_own_values_out_of_bounds_are_our_fault(event: Event) -> None:
    end = pair(State.PASSING)["sender"]
    with pytest.raises(LocalProtocolError):
        end.send(event)
    end.send(m.Bye())


@pytest.mark.parametrize(
    "segments",
    [
        [m.Segment(0, 5, True, b"")],
        [m.Segment(1, 10, True, b"")],
        [m.Segment(0, 5, True, b""), m.Segment(6, 5, True, b"")],
    ],
)
def test_hashes_must_cover_their_range(segments: list[m.Segment]) -> None:
    with pytest.raises(ValueError, match=r"gap|cover"):
        m.Hashes(0, 0, 10, segments)


def test_largest_hashes_fit() -> None:
    ends = pair(State.READY)
    block = m.HASH_BLOCK_BYTES
    base = m.OFFSET_MAX - m.HASH_LENGTH_MAX
    segments = [
        m.Segment(base + i * block, block, False, bytes(16)) for i in range(m.HASH_SEGMENTS_MAX)
    ]
    event = m.Hashes(m.DISKS_MAX - 1, base, m.HASH_LENGTH_MAX, segments)
    assert ends["sender"].receive_data(b"".join(ends["receiver"].send(event))) == [event]


def test_version_must_have_been_offered() -> None:
    ends = pair(State.GREETING)
    with pytest.raises(LocalProtocolError, match="not offered"):
        ends["receiver"].send(m.Welcome(3))
    liar = Connection("receiver")
    liar.receive_data(b"".join(Connection("sender").send(m.Hello([3], "verify", 0))))
    with pytest.raises(RemoteProtocolError, match="not offered"):
        ends["sender"].receive_data(b"".join(liar.send(m.Welcome(3))))


def test_last_words_may_cross() -> None:
    ends = pair(State.PASSING)
    late = b"".join(ends["sender"].send(Data.of(0, 0, b"late")))
    late += b"".join(ends["sender"].send(m.Bye()))
    failed = b"".join(ends["receiver"].send(m.Failed("full", "no space")))
    assert ends["receiver"].receive_data(late) == [m.Bye()]
    assert ends["sender"].receive_data(failed) == [m.Failed("full", "no space")]
    with pytest.raises(RemoteProtocolError, match="after its last word"):
        ends["receiver"].receive_data(b"F")


@pytest.mark.parametrize(
    ("event", "golden"),
    [
        (
            Data.of(1, 4096, b"some bytes"),
            "46445731 06 00 0100 2a000000 00000000 f528823c24074d8d"
            "0010000000000000 0000000000000000 99736577b441a1bbd3ec197fe371e984"
            "736f6d65206279746573",
        ),
        (
            Zero(1, 65536, 1 << 20),
            "46445731 07 00 0100 10000000 00000000 342621d2a43e300d"
            "0000010000000000 0000100000000000",
        ),
        (
            m.Ping(258),
            "46445731 11 00 0000 0a000000 00000000 614197299a8987ea 81a56e6f6e6365cd0102",
        ),
        (
            m.Begin(3, "pass", 0, False, bytes(range(16))),
            "46445731 05 00 0000 40000000 00000000 f27ce116d7d11ade"
            "85a565706f636803a46b696e64a470617373aa646174615f627974657300a963"
            "6f6e74696e756573c2a4726f6f74c410000102030405060708090a0b0c0d0e0f",
        ),
        (m.Bye(), "46445731 14 00 0000 01000000 00000000 84d0d8435d1f9730 80"),
    ],
)
def test_golden_bytes(event: Event, golden: str) -> None:
    assert b"".join(pair(State.PASSING)["sender"].send(event)) == bytes.fromhex(golden)
