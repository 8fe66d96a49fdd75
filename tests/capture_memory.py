"""The memory of the capture's model: what lies in it, each atomic access to it, and its faults."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from interleaving import BLOCKED, DONE, Fault, Memory, Places, Thread, Violation

Write: TypeAlias = tuple[str, int, int]

CLOSING, CLOSED, GIVEN_UP = 1, 2, 3
SECTORS = 2
"""Of a chunk."""
NOBODY = 0
NO_EPOCH = 99
HOLE = "-"


@dataclass(frozen=True)
class Setup:
    """Who takes part. A write is (what, first sector, last sector); "zero" makes holes.

    ``disks`` has the chunks of each. All of them were written in epoch 1, which is open.
    """

    writes: tuple[Write, ...]
    disks: tuple[tuple[int, ...], ...] = ((0,),)
    passes: tuple[int, ...] = (1,)
    places: int = 1
    records: int = 3
    server_deaths: int = 0
    sender_deaths: int = 0
    janitor: bool = False
    other: bool = False
    old: tuple[int, ...] = ()
    """Chunks that the replica has already: last written in epoch 1, and epoch 2 is open."""


class Layout:
    """Where in the memory everything lies."""

    def __init__(self, setup: Setup) -> None:
        self.names: dict[Any, int] = {}
        self.memory: Memory = []
        chunks = [chunk for disk in setup.disks for chunk in disk]
        began = 2 if setup.old else 1
        content = tuple(f"{n}" for n in range(SECTORS * len(chunks)))
        self._add("word", began)
        self._add("bits", 0)
        for i in range(len(setup.writes)):
            self._add(("slot", i), 0)
        for i in range(setup.places):
            for name in ("state", "since", "cursor", "records", "sequence", "lease"):
                self._add((name, i), 0)
            self._add(("epoch", i), NO_EPOCH)
            self._add(("limit", i), setup.records)
            self._add(("spill", i), ((None, None),) * setup.records)
        for chunk in chunks:
            self._add(("stripe", chunk), NOBODY)
            self._add(("mark", chunk), 1 if chunk in setup.old or began == 1 else 2)
        for disk in range(len(setup.disks)):
            self._add(("summary", disk), began)
        for sector, value in enumerate(content):
            self._add(("sector", sector), value)
        # What no program sees: the newest state of each epoch, the last epoch found closed,
        # sequence numbers given out, deaths left.
        self._add("ghost", (content,) * 6)
        self._add("closed", 0)
        self._add("fresh", 0)
        self._add("server deaths", setup.server_deaths)
        self._add("sender deaths", setup.sender_deaths)
        self._add("seen", ())

    def _add(self, name: Any, value: Any) -> None:
        self.names[name] = len(self.memory)
        self.memory.append(value)


class SharedMemory:
    """The operations, named by what they do; a record of what was seen of captures."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.layout = setup, Layout(setup)
        self._names = self.layout.names
        self.chunks = [chunk for disk in setup.disks for chunk in disk]
        self.seen: set[str] = set()

    def load(self, memory: Memory, name: Any) -> Any:
        return memory[self._names[name]]

    def store(self, memory: Memory, name: Any, value: Any) -> None:
        memory[self._names[name]] = value

    def add(self, memory: Memory, name: Any) -> int:
        memory[self._names[name]] += 1
        return int(memory[self._names[name]]) - 1

    def swap(self, memory: Memory, name: Any, expected: Any, value: Any) -> None:
        if self.load(memory, name) == expected:
            self.store(memory, name, value)

    def most(self, memory: Memory, name: Any, value: int) -> None:
        self.store(memory, name, max(value, self.load(memory, name)))

    def bit(self, memory: Memory, place: int, on: bool) -> None:
        bits = self.load(memory, "bits")
        self.store(memory, "bits", bits | 1 << place if on else bits & ~(1 << place))

    def lock(self, memory: Memory, name: Any, who: int) -> object:
        if self.load(memory, name) != NOBODY:
            return BLOCKED
        return self.store(memory, name, who)

    def try_lock(self, memory: Memory, name: Any, who: int) -> bool:
        return self.lock(memory, name, who) is not BLOCKED

    def fresh(self, memory: Memory, name: Any) -> int:
        """Store a sequence number that nobody else has."""
        number = self.add(memory, "fresh") + 1
        self.store(memory, name, number)
        return number

    def spill(self, memory: Memory, place: int, record: int, part: int, value: Any) -> None:
        records = [list(one) for one in self.load(memory, ("spill", place))]
        records[record][part] = value
        self.store(memory, ("spill", place), tuple(tuple(one) for one in records))

    def truncate(self, memory: Memory, place: int) -> None:
        self.store(memory, ("spill", place), ((None, None),) * self.setup.records)

    def write(self, memory: Memory, sector: int, value: str, epoch: int) -> None:
        if epoch <= self.load(memory, "closed"):
            raise Violation(f"sector {sector} is written in epoch {epoch}, which was closed")
        self.store(memory, ("sector", sector), value)
        ghost = [list(state) for state in self.load(memory, "ghost")]
        for state in ghost[epoch:]:
            state[sector] = value
        self.store(memory, "ghost", tuple(tuple(state) for state in ghost))

    def found_closed(self, memory: Memory, epoch: int) -> None:
        self.most(memory, "closed", epoch)

    def believed(self, memory: Memory, epoch: int, copies: int, replica: Sequence[str]) -> None:
        """A sender takes what it read for the state at the end of an epoch."""
        truth = self.load(memory, "ghost")[epoch]
        if tuple(replica) != truth:
            raise Violation(f"epoch {epoch} was {truth}, and {tuple(replica)} is believed")
        self.seen.add("believed with copies" if copies else "believed")

    def given_up(self, memory: Memory) -> None:
        self.seen.add("given up")

    def faults(
        self, threads: Sequence[Thread], memory: tuple[Any, ...], places: Places
    ) -> Iterator[Fault]:
        writers = len(self.setup.writes)
        senders = range(writers, writers + len(self.setup.passes))
        if self.load(list(memory), "server deaths"):
            lost = list(memory)
            self.store(lost, "server deaths", self.load(lost, "server deaths") - 1)
            for n in range(writers):
                self.store(lost, ("slot", n), 0)
            for chunk in self.chunks:
                self.store(lost, ("stripe", chunk), NOBODY)
            again = [
                p if p == DONE or not n < writers else threads[n].start
                for n, p in enumerate(places)
            ]
            yield "the server is killed, and another goes on", (tuple(lost), tuple(again))
        for n in senders:
            if places[n] == DONE or not self.load(list(memory), "sender deaths"):
                continue
            lost = list(memory)
            self.store(lost, "sender deaths", self.load(lost, "sender deaths") - 1)
            for i in range(self.setup.places):
                self.swap(lost, ("lease", i), n - writers + 1, NOBODY)
            gone = (*places[:n], DONE, *places[n + 1 :])
            yield f"sender {n - writers} is killed", (tuple(lost), gone)

    def invariant(self, memory: Memory) -> str | None:
        """Nothing is lost: what differs from the end of an epoch bears a newer mark."""
        ghost = self.load(memory, "ghost")
        for epoch in range(1, self.load(memory, "closed") + 1):
            for sector in self._sectors():
                if self.load(memory, ("sector", sector)) != ghost[epoch][sector]:
                    mark = self.load(memory, ("mark", sector // SECTORS))
                    if mark <= epoch:
                        return f"sector {sector} changed after epoch {epoch}: marked {mark}"
        return None
