"""Damaged and made-up conversations into both ends of the protocol.

Promises that are checked for every input, all of which come from a seed:

1. nothing but RemoteProtocolError comes out, and its text is one line;
2. what is buffered never exceeds what the bytes received so far allow;
3. before a byte that was changed takes effect, the events are those that were sent;
4. however the bytes are split, the events and the error are the same.

Blind spot: several changed bytes that match a 64-bit checksum, as a forger could make them.
"""

import random
from dataclasses import dataclass

from replicator import messages as m
from replicator.frames import HEADER_BYTES, MESSAGE_BYTES_BY_KIND
from replicator.messages import Data, Event, RemoteProtocolError, Zero
from replicator.wire import TRANSITIONS, Connection, Role, State

BUFFER_BYTES_MAX = max(m.DATA_BYTES_MAX, max(MESSAGE_BYTES_BY_KIND.values()), HEADER_BYTES)


@dataclass
class Outcome:
    """What one end made of its bytes."""

    events: list[Event]
    error: str | None


def conversation(noise: random.Random) -> list[tuple[Role, Event]]:
    """A legal conversation: a walk through the table of transitions."""
    state, said = State.IDLE, []
    offered = [1]
    for _ in range(noise.randrange(1, 24)):
        choices = sorted(TRANSITIONS[state].items(), key=lambda rule: rule[0].__name__)
        if not choices:
            break
        # Ending is always allowed; choosing it each time it is would make short walks.
        longer = [rule for rule in choices if rule[0] not in (m.Bye, m.Failed)]
        kind, (roles, following) = noise.choice(
            longer if longer and noise.random() < 0.95 else choices
        )
        said.append((noise.choice(sorted(roles)), _event(kind, noise, offered)))
        state = following
    return said


def _event(kind: type[Event], noise: random.Random, offered: list[int]) -> Event:
    offset, length = noise.randrange(1 << 40), noise.randrange(1, 1 << 24)
    name = "".join(noise.choices("abcdefgh-\u00e9\u20ac", k=noise.randrange(1, 20)))
    made: dict[type[Event], Event] = {
        m.Hello: m.Hello(offered, "replicate", noise.getrandbits(64)),
        m.Welcome: m.Welcome(offered[0]),
        m.Open: m.Open(name, name, name, name, 7, [m.DiskInfo(name, offset, 65536)]),
        m.Opened: m.Opened(
            *("following", name, 7, None, False, None, [m.Reached(name, 8, 0, offset)]),
            *(noise.randbytes(16), noise.randbytes(16)),
        ),
        m.Begin: m.Begin(7, "pass", offset, True, noise.choice((None, noise.randbytes(16)))),
        Data: Data.of(
            noise.randrange(m.DISKS_MAX), offset, noise.randbytes(noise.randrange(1, 3000))
        ),
        Zero: Zero(noise.randrange(m.DISKS_MAX), offset, length),
        m.HashRequest: m.HashRequest(0, offset, length),
        m.Hashes: m.Hashes(0, offset, length, [m.Segment(offset, length, True, b"")]),
        m.Commit: m.Commit(name, 7, 3, noise.randbytes(16)),
        m.Checkpoint: m.Checkpoint(m.Reached(name, 7, 0, offset), 3, noise.randbytes(16)),
        m.Committed: m.Committed(name, 7),
        m.Promote: m.Promote(name, 7, noise.choice((None, noise.randbytes(16)))),
        m.Promoted: m.Promoted(name, 7),
        m.Abort: m.Abort(name),
        m.Aborted: m.Aborted(name),
        m.Resolve: m.Resolve(name, name, name),
        m.Restore: m.Restore(name, noise.choice((None, 7))),
        m.Restorable: m.Restorable(3, name, 7, [m.DiskInfo(name, offset, 65536)]),
        m.ReadRequest: m.ReadRequest(0, offset, length),
        m.Ping: m.Ping(noise.getrandbits(64)),
        m.Pong: m.Pong(noise.getrandbits(64)),
        m.Failed: m.Failed("io", name),
        m.Bye: m.Bye(),
    }
    return made[kind]


@dataclass
class Played:
    """A conversation up to somewhere, and what one side then sends in a row."""

    listener: Role
    before: list[tuple[Role, Event]]
    sent: list[Event]
    stream: bytes


def play(noise: random.Random) -> Played:
    """Choose a conversation and a moment in it from which one side only listens."""
    said = conversation(noise)
    start = noise.randrange(len(said))
    speaker = said[start][0]
    end = start
    while end < len(said) and said[end][0] == speaker:
        end += 1
    listener: Role = "receiver" if speaker == "sender" else "sender"
    talking = _brought_to(speaker, said[:start])
    stream = b"".join(b"".join(talking.send(event)) for _, event in said[start:end])
    return Played(listener, said[:start], [event for _, event in said[start:end]], stream)


def _brought_to(role: Role, said: list[tuple[Role, Event]]) -> Connection:
    ends: dict[Role, Connection] = {
        "sender": Connection("sender"),
        "receiver": Connection("receiver"),
    }
    for speaker, event in said:
        other: Role = "receiver" if speaker == "sender" else "sender"
        ends[other].receive_data(b"".join(ends[speaker].send(event)))
    return ends[role]


def hear(played: Played, stream: bytes, sizes: "list[int] | None" = None) -> Outcome:
    """Feed the listener piece by piece; promises 1 and 2 are checked on the way."""
    end = _brought_to(played.listener, played.before)
    heard = Outcome([], None)
    rest = memoryview(stream)
    turn = 0
    try:
        while rest:
            buffer = end.get_buffer()
            assert 1 <= len(buffer) <= BUFFER_BYTES_MAX
            size = sizes[turn % len(sizes)] if sizes else len(rest)
            turn += 1
            count = min(len(buffer), len(rest), size)
            buffer[:count] = rest[:count]
            rest = rest[count:]
            for event in end.received(count):
                if isinstance(event, Data):
                    event.content()
                heard.events.append(event)
        end.eof()
    except RemoteProtocolError as error:
        heard.error = str(error)
        assert heard.error.isprintable(), heard.error
    return heard


def check_input(seed: int) -> None:
    """Make one input of a seed, and check every promise. Raises AssertionError."""
    noise = random.Random(seed)
    played = play(noise)
    whole = hear(played, played.stream)
    assert whole == Outcome(played.sent, None)
    damaged, intact = _damage(noise, played.stream)
    first = hear(played, damaged)
    sizes = [noise.choice((1, 2, 7, 23, 24, 25, 100, 5000)) for _ in range(5)]
    assert hear(played, damaged, sizes) == first, "the split changed what was heard"
    assert hear(played, played.stream, sizes) == whole
    if intact is None:
        return
    # One byte was changed: an event may come only if all of its bytes came before that one.
    assert first.error is not None, "the damage went unnoticed"
    assert first.events == played.sent[: len(first.events)]
    lengths, position = _frame_lengths(played), 0
    for length in lengths[: len(first.events)]:
        position += length
    assert position <= intact, "an event came out of damaged bytes"


def _frame_lengths(played: Played) -> list[int]:
    speaker: Role = "receiver" if played.listener == "sender" else "sender"
    talking = _brought_to(speaker, played.before)
    return [sum(map(len, talking.send(event))) for event in played.sent]


def _damage(noise: random.Random, stream: bytes) -> tuple[bytes, int | None]:
    """A changed stream, and the place of the change where one byte was."""
    damaged = bytearray(stream)
    place = noise.randrange(len(damaged))
    match noise.randrange(6):
        case 0 | 1 | 2:
            damaged[place] ^= noise.randrange(1, 256)
            return bytes(damaged), place
        case 3:
            damaged[place:place] = noise.randbytes(noise.randrange(1, 40))
        case 4:
            del damaged[place : place + noise.randrange(1, 40)]
        case _:
            damaged = bytearray(
                b"FDW1" * noise.randrange(2) + noise.randbytes(noise.randrange(200))
            )
    return bytes(damaged), None
