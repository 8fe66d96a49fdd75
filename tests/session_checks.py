"""What has to hold at every step of a simulated replication: promises 1 to 3 of the design.

1. What was acknowledged to the guest is on the replica or marked as changed for it.
2. A replica at rest is what all disks were at the end of one epoch.
3. Never are both sides writable.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from simulated_disk import SimulatedFiles, Tree
from simulated_mount import CHUNK, SimulatedMount

from replicator.manifest import MAX_EPOCH, Manifest, Received, manifest_path, read_manifest
from replicator.received import towards
from replicator.replica import Replica
from replicator.store import Store

REPLICA = "vm"


class Wrong(AssertionError):
    """A promise was broken."""


class Acknowledged:
    """The last point of each generation that the target said to have."""

    def __init__(self) -> None:
        self._epochs: dict[str, int] = {}

    def note(self, generation: str, epoch: int) -> None:
        self._epochs[generation] = max(epoch, self._epochs.get(generation, 0))

    def get(self, generation: str) -> int | None:
        return self._epochs.get(generation)


def check_crash(
    mount: SimulatedMount, told: Acknowledged, tree: Tree, scratch: Path, *, clones: bool = False
) -> None:
    """What a power loss of the target now leaves, once it was opened again. Raises Wrong."""
    files = SimulatedFiles(scratch, tree)
    files.clones = clones
    if read_manifest(scratch / REPLICA) is None:
        if told.get(mount.record.generation) is not None:
            raise Wrong("an acknowledged replica is gone")
        return
    with Store(scratch, files) as store, Replica.load(store, REPLICA) as replica:
        manifest = replica.manifest
        images = [(scratch / REPLICA / disk.name).read_bytes() for disk in manifest.disks]
        check_replica(mount, told, manifest, images)
        if manifest.received is not None:
            _check_received(mount, replica, scratch, manifest.received)


def check_replica(
    mount: SimulatedMount, told: Acknowledged, manifest: Manifest, images: list[bytes]
) -> None:
    """A replica whose journal is applied. Raises Wrong."""
    generation, epoch = manifest.generation, manifest.epoch
    acknowledged = told.get(mount.record.generation)
    if acknowledged is not None and (
        generation != mount.record.generation or epoch is None or epoch < acknowledged
    ):
        raise Wrong(f"epoch {acknowledged} was acknowledged; the replica is at {epoch}")
    if manifest.state != "filling":
        if generation is None or epoch is None:
            raise Wrong(f"{manifest.state} without a point")
        if images != mount.histories[generation].at(epoch):
            raise Wrong(f"the replica is not as the disks were at the end of epoch {epoch}")
    elif generation == mount.record.generation and epoch is not None:
        _check_base(mount, images, epoch, [len(image) for image in images])
    reached = manifest.filled
    if reached is not None and reached.generation == mount.record.generation:
        sizes = [len(image) for image in images]
        ends = sizes[: reached.disk] + [reached.offset] + [0] * len(sizes)
        _check_base(mount, images, reached.epoch, ends[: len(sizes)])


def _check_base(mount: SimulatedMount, images: list[bytes], epoch: int, ends: list[int]) -> None:
    """Every chunk is the source's or is marked as written since."""
    for disk, (changes, end) in enumerate(zip(mount.maps, ends, strict=True)):
        for start in range(0, end, CHUNK):
            stop = min(start + CHUNK, end)
            same = images[disk][start:stop] == mount.content[disk][start:stop]
            if not same and changes.last(start // CHUNK) <= epoch:
                raise Wrong(
                    f"disk {disk} differs at {start}, which is not marked since epoch {epoch}"
                )


def _check_received(
    mount: SimulatedMount, replica: Replica, scratch: Path, received: Received
) -> None:
    """What is kept of a pass, with the images where it has nothing, is as its claims say."""
    if (generation := towards(received)) != mount.record.generation:
        return
    based = not received.compared
    replica.begin(MAX_EPOCH, generation, continues=True, based=based)
    replica.commit(generation, MAX_EPOCH)
    replica.apply()
    for disk, changes in enumerate(mount.maps):
        found = (scratch / REPLICA / replica.manifest.disks[disk].name).read_bytes()
        for start in range(0, len(found), CHUNK):
            stop = min(start + CHUNK, len(found))
            claimed = [
                claim.epoch
                for claim in received.claims
                if (claim.disk, claim.offset) >= (disk, stop)
            ]
            if based and received.generation == generation:
                claimed.append(received.epoch)
            if not claimed:
                # A comparison did not come so far.
                continue
            epoch = max(claimed)
            same = found[start:stop] == mount.content[disk][start:stop]
            if not same and changes.last(start // CHUNK) <= epoch:
                raise Wrong(
                    f"what is kept differs on disk {disk} at {start}, not marked since {epoch}"
                )


def promoted(store: Path) -> bool:
    """Whether somebody may use the replica as the disk."""
    try:
        # No need to take it apart for that, each time that the guest writes.
        content = manifest_path(store / REPLICA).read_bytes()
    except FileNotFoundError:
        return False
    if b'"promoted"' not in content:
        return False
    manifest = read_manifest(store / REPLICA)
    return manifest is not None and manifest.state == "promoted"


def check_one_side(mount: SimulatedMount, store: Path) -> None:
    """Raises Wrong where both sides are writable."""
    if promoted(store) and mount.writable:
        raise Wrong("the replica is promoted, and the source takes writes")


def describe(tree: Mapping[str, object], indent: str = "  ") -> list[str]:
    """What is in a tree, for a trace."""
    lines: list[str] = []
    for name, node in tree.items():
        if isinstance(node, bytes):
            text = f": {node.decode(errors='replace')}" if name.startswith("manifest") else ""
            lines.append(f"{indent}{name} {len(node)} bytes{text}")
        elif isinstance(node, Mapping):
            lines += [f"{indent}{name}/", *describe(node, indent + "  ")]
    return lines
