"""What there is in the model of a cutover (tests/cutover_model.py): processes, mount, target."""

from typing import NamedTuple

IMAGES = 2


class Process(NamedTuple):
    """A sender or resolver: what it does next, about which token; how many images are done."""

    at: str = "off"
    token: int = 0
    done: int = 0
    stale: bool = False
    """Whether the mount that it knows is gone."""


class State(NamedTuple):
    """Everything, in memory and on disk."""

    mounted: bool = True
    mounting: str = ""
    """What a mount that takes the place of another has come to."""
    gate: bool = False
    fence: bool = False
    begun: bool = False
    written: bool = True
    records: tuple[tuple[str, int], ...] = (("none", 0),) * IMAGES
    lease: str = ""
    attempts: int = 0
    sender: Process = Process()
    resolver: Process = Process()
    thread: Process = Process()
    """What a sender left behind, which may be waiting for the next cutover by then."""
    network: frozenset[tuple[str, int]] = frozenset()
    session: int | None = None
    promoted: int | None = None
    void: frozenset[int] = frozenset()


Step = tuple[str, State]


def record_of(state: State) -> tuple[str, int]:
    """What `fusedisk.fencing.read_fence` finds: the gravest record."""
    for kind in ("fenced", "committing"):
        for record in state.records:
            if record[0] == kind:
                return record
    return "none", 0


def writable(state: State) -> bool:
    """Whether the source takes writes."""
    return state.mounted and not state.gate and not state.fence


def with_record(state: State, image: int, kind: str, token: int) -> State:
    records = list(state.records)
    records[image] = kind, token
    return state._replace(records=tuple(records))


def say(state: State, kind: str, token: int) -> State:
    return state._replace(network=state.network | {(kind, token)})
