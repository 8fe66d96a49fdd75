"""Crashes of a replica at every step of random passes, by a seed.

Before each file operation of a run the power is cut: what may be left is laid out elsewhere, opened
as a receiver does after a restart (which may be killed or lose power too), and has to be the point
last acknowledged, or the one whose commit was under way, whole and over all disks. Then a pass of
changes alone has to bring it to the next point: nothing is compared or filled again. Where a pass
was cut off that is kept, only what its claims leave out is sent. Some passes compare all with the
point, and go on from where they were.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from simulated_disk import Killed, SimulatedFiles, Tree

from replicator.manifest import Claim, ReplicaDisk
from replicator.pointview import PointView
from replicator.replica import Replica
from replicator.store import Store

GENERATION = "generation"
# No multiple of a sector, so that what is sent begins and ends within some.
BLOCK = 100
HASHED = 1024
Range = tuple[int, int, int]


class Wrong(AssertionError):
    """A crash left what may not be; the text has the seed and the way there."""


class Cut(Exception):
    """The link was lost in the midst of a pass."""


class Source:
    """What the guest's disks hold, and in which epoch each block was last written."""

    def __init__(self, rng: random.Random, sizes: list[int]) -> None:
        self._rng = rng
        self.content = [bytearray(size) for size in sizes]
        self._marks = [[0] * -(-size // BLOCK) for size in sizes]

    def copy(self, rng: random.Random) -> Source:
        """The same disks, on whose future something else decides."""
        copied = Source(rng, [])
        copied.content = [bytearray(content) for content in self.content]
        copied._marks = [list(marks) for marks in self._marks]
        return copied

    def scribble(self, epoch: int) -> None:
        """The guest writes data and zeros."""
        for _ in range(self._rng.randint(1, 5)):
            disk = self._rng.randrange(len(self.content))
            start = self._rng.randrange(len(self.content[disk]))
            end = min(len(self.content[disk]), start + self._rng.randint(1, 6000))
            zero = self._rng.random() < 0.25
            data = bytes(end - start) if zero else self._rng.randbytes(end - start)
            self.content[disk][start:end] = data
            for block in range(start // BLOCK, -(-end // BLOCK)):
                self._marks[disk][block] = epoch

    def changed(self, since: int, claims: Sequence[Claim] = ()) -> list[Range]:
        """What was written after an epoch and is not claimed to be there, in order."""
        found: list[Range] = []
        for disk, marks in enumerate(self._marks):
            for block, mark in enumerate(marks):
                start = block * BLOCK
                end = min(start + BLOCK, len(self.content[disk]))
                holding = [c.epoch for c in claims if (c.disk, c.offset) >= (disk, end)]
                if mark <= max([since, *holding]):
                    continue
                if found and found[-1][0] == disk and found[-1][2] == start:
                    start = found.pop()[1]
                found.append((disk, start, end))
        return found

    def send(self, replica: Replica, ranges: list[Range]) -> None:
        for disk, start, end in ranges:
            data = bytes(self.content[disk][start:end])
            if any(data):
                replica.write(disk, start, data)
            else:
                replica.zero(disk, start, end - start)

    def differing(self, points: Sequence[bytes], begin: tuple[int, int]) -> Iterator[Range]:
        """What is otherwise than at a point from a place on, by whole blocks that are hashed."""
        for disk, content in enumerate(self.content):
            for start in range(0, len(content), HASHED):
                end = min(start + HASHED, len(content))
                here = (disk, start) >= (begin[0], begin[1] // HASHED * HASHED)
                if here and content[start:end] != points[disk][start:end]:
                    yield disk, start, end

    def everything(self) -> list[Range]:
        return [(disk, 0, len(content)) for disk, content in enumerate(self.content)]

    def snapshot(self) -> list[bytes]:
        return [bytes(content) for content in self.content]


class Simulation:
    """One run over `seed`; `samples` power losses before each operation."""

    def __init__(self, scratch: Path, seed: int, samples: int = 1) -> None:
        self._scratch, self.seed, self._samples = scratch, seed, samples
        self._rng = random.Random(seed)
        # Its own, so that looking at more crashes of a seed does not change the run.
        self._chance = random.Random(seed + 1)
        sizes = [self._rng.choice((4608, 9000, 12288)), self._rng.choice((512, 4096, 8192))]
        self._disks = [ReplicaDisk(f"disk{n}", size, 4096) for n, size in enumerate(sizes)]
        self._source = Source(self._rng, sizes)
        self._keep = self._rng.choice(("1", "3", "2,3x10s", "2,2x20s"))
        self._now = 1e9
        self._points: dict[int, list[bytes]] = {}
        self._acknowledged: int | None = None
        self._under_way: int | None = None
        self._epoch = 0
        # A store may be moved to a filesystem of the other kind between two runs.
        self._clones = self._rng.choice((0.0, 1.0, 1.0, 0.5))
        self._files = SimulatedFiles(scratch / "run", {})
        self.crashes = self.continued = self.compared = 0

    def run(self) -> None:
        """Raises Wrong."""
        with mock.patch("replicator.checkpoints.HASH_BLOCK_BYTES", HASHED):
            self._run()

    def _run(self) -> None:
        self._files.before_each = self._crash
        for _ in range(self._rng.randint(2, 3)):
            killing = self._rng.random() < 0.5
            self._files.kill_at = len(self._files.trace) + self._rng.randint(1, 50)
            if not killing:
                self._files.kill_at = None
            self._files.clones = self._rng.random() < self._clones
            try:
                with self._opened(self._files) as replica:
                    self._settle(replica)
                    for _ in range(self._rng.randint(1, 6)):
                        self._pass(replica)
            except (Killed, Cut):
                continue
        self._files.kill_at = None
        with self._opened(self._files) as replica:
            self._settle(replica)
            self._check(replica, self._files)

    @contextmanager
    def _opened(self, files: SimulatedFiles) -> Iterator[Replica]:
        with (
            Store(files.root, files, self._keep) as store,
            Replica.open(store, "vm", "source", self._disks) as replica,
        ):
            yield replica

    def _settle(self, replica: Replica) -> None:
        """The sender learns from the handshake what the target holds."""
        epoch = replica.manifest.epoch
        self._acknowledged, self._under_way = epoch, None

    def _pass(self, replica: Replica) -> None:
        source, since = self._source, replica.manifest.committed[1]
        self._epoch += 1
        source.scribble(self._epoch)
        if since is not None and self._compares(replica, self._rng):
            begun = self._compare(replica, self._files, source, self._epoch, self._rng)
            self._epoch += 1
            source.scribble(self._epoch)
            self._send(replica, source, source.changed(*begun))
            self._commit(replica)
            return
        claims = self._begin(replica, self._epoch, self._rng)
        if since is not None and self._rng.random() < 0.2:
            self._send(replica, source, source.changed(since, claims)[:1])
            replica.begin(self._epoch, GENERATION, based=True)
            claims = []
        if self._rng.random() < 0.5:
            replica.apply()
        if since is None:
            source.send(replica, source.everything())
        else:
            self._send(replica, source, source.changed(since, claims))
            while self._rng.random() < 0.25:
                # The spill was full: what was sent is a base, and the pass goes on from there.
                replica.checkpoint(GENERATION, self._epoch, 1, self._disks[1].size)
                self._epoch += 1
                source.scribble(self._epoch)
                self._send(replica, source, source.changed(self._epoch - 1))
        self._commit(replica)

    def _commit(self, replica: Replica) -> None:
        self._points[self._epoch] = self._source.snapshot()
        replica_before_commit = self._rng.random() < 0.5
        if replica_before_commit:
            replica.apply()
        self._under_way = self._epoch
        self._now += self._rng.randint(1, 5)
        replica.commit(GENERATION, self._epoch, self._now)
        self._acknowledged, self._under_way = self._epoch, None
        if self._rng.random() < 0.5:
            replica.apply()

    def _compares(self, replica: Replica, rng: random.Random) -> bool:
        """Whether the next pass compares all with the point."""
        kept = replica.received
        return rng.random() < (0.15 if kept is None or not kept.compared else 0.9)

    def _compare(
        self,
        replica: Replica,
        files: SimulatedFiles,
        source: Source,
        epoch: int,
        rng: random.Random,
    ) -> tuple[int, Sequence[Claim]]:
        """Compare all, mostly by going on with what was cut off; what is to be captured then."""
        # All of the epoch is written, and nothing later.
        kept = replica.received
        claims: Sequence[Claim] = []
        begin = 0, 0
        if kept is not None and kept.compared and rng.random() < 0.8:
            claims = kept.claims
            epoch, begin = claims[0].epoch, (claims[0].disk, claims[0].offset)
            self.compared += 1
        replica.begin(epoch, GENERATION, continues=bool(claims))
        replica.apply()
        points = [(files.root / "vm" / disk.name).read_bytes() for disk in self._disks]
        for each in source.differing(points, begin):
            if rng is self._rng:
                self._send(replica, source, [each], epoch)
                if rng.random() < 0.1:
                    self._epoch += 1
                    source.scribble(self._epoch)
            else:
                source.send(replica, [each])
        if rng.random() < 0.7:
            # It may be let go, or not be noted any more.
            replica.checkpoint(GENERATION, epoch, 1, self._disks[1].size)
        return epoch, claims

    def _begin(self, replica: Replica, epoch: int, rng: random.Random) -> Sequence[Claim]:
        """Begin a pass, mostly by going on with one that was cut off; what it has."""
        received = replica.received
        continues = received is not None and not received.compared and rng.random() < 0.8
        replica.begin(epoch, GENERATION, continues=continues, based=True)
        if received is None or not continues:
            return []
        self.continued += 1
        return received.claims

    def _send(
        self, replica: Replica, source: Source, ranges: list[Range], epoch: int | None = None
    ) -> None:
        for each in ranges:
            if self._rng.random() < 0.05:
                raise Cut
            source.send(replica, [each])
            if self._rng.random() < 0.3:
                replica.checkpoint(GENERATION, epoch or self._epoch, each[0], each[2])

    def _crash(self) -> None:
        for _ in range(self._samples):
            self.crashes += 1
            trees = [self._files.crash(self._chance)]
            try:
                self._look_after(trees, may_crash=True)
            except Exception as error:
                raise self._wrong(str(error) or repr(error), trees) from error

    def _look_after(
        self, trees: list[Tree], source: Source | None = None, *, may_crash: bool
    ) -> None:
        files = SimulatedFiles(self._scratch / "after", trees[-1])
        files.clones = self._chance.random() < self._clones
        if may_crash and self._chance.random() < 0.5:
            files.kill_at = self._chance.randint(0, 25)
        state = self._acknowledged, self._under_way
        source = source or self._source.copy(self._chance)
        try:
            with self._opened(files) as replica:
                self._check(replica, files)
                if replica.manifest.epoch is not None:
                    # Found at its open, so nothing may bring it back to what was before.
                    self._acknowledged, self._under_way = replica.manifest.epoch, None
                    self._go_on(replica, files, source)
        except Killed:
            self.crashes += 1
            trees.append(files.crash(self._chance))
            self._look_after(trees, source, may_crash=False)
        finally:
            self._acknowledged, self._under_way = state

    def _check(self, replica: Replica, files: SimulatedFiles) -> None:
        manifest = replica.manifest
        if manifest.state == "filling":
            assert self._acknowledged is None, f"epoch {self._acknowledged} was lost"
            return
        assert manifest.epoch in (self._acknowledged, self._under_way), (
            f"holds epoch {manifest.epoch}, but {self._acknowledged} was acknowledged and "
            f"{self._under_way} under way"
        )
        assert not manifest.applying
        found = [(files.root / "vm" / disk.name).read_bytes() for disk in self._disks]
        assert found == self._points[manifest.epoch], f"is not as it was at epoch {manifest.epoch}"
        assert manifest.points[-1].epoch == manifest.epoch
        for point in manifest.points:
            view = PointView(files.root / "vm", manifest, point.id)
            try:
                found = [view.read(n, 0, disk.size) for n, disk in enumerate(view.disks)]
            finally:
                view.close()
            assert found == self._points[point.epoch], f"point of epoch {point.epoch} is wrong"

    def _go_on(self, replica: Replica, files: SimulatedFiles, source: Source) -> None:
        following = 1_000_000 + len(self._points)
        source.scribble(following)
        self._points[following] = source.snapshot()
        since = replica.manifest.epoch or 0
        if replica.received is not None and replica.received.compared:
            # Written before the epoch is closed that a comparison anew would begin with.
            left = self._compare(replica, files, source, following, self._chance)
        else:
            left = since, self._begin(replica, following, self._chance)
        for each in source.changed(*left):
            source.send(replica, [each])
            if self._chance.random() < 0.2:
                replica.checkpoint(GENERATION, following, each[0], each[2])
        self._under_way = following
        replica.commit(GENERATION, following, self._now + self._chance.randint(1, 5))
        self._acknowledged, self._under_way = following, None
        replica.apply()
        self._check(replica, files)

    def _wrong(self, problem: str, trees: list[Tree]) -> Wrong:
        lines = [
            f"seed {self.seed}: {problem}",
            f"after {len(self._files.trace)} operations, the last of them:",
            *(f"  {step}" for step in self._files.trace[-40:]),
        ]
        for tree in trees:
            lines += ["the power loss left:", *_describe(tree, "  ")]
        return Wrong("\n".join(lines))


def _describe(tree: Tree, indent: str) -> Iterator[str]:
    for name, node in tree.items():
        if isinstance(node, bytes):
            text = f": {node.decode(errors='replace')}" if name.startswith("manifest") else ""
            yield f"{indent}{name} {len(node)} bytes{text}"
        else:
            yield f"{indent}{name}/"
            yield from _describe(node, indent + "  ")
