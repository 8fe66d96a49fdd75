"""Whether a source may have a replica, and in which order its disks are there."""

from __future__ import annotations

from collections.abc import Sequence

from fusedisk.errors import FuseDiskError
from replicator.adoption import is_unclaimed
from replicator.manifest import Manifest, ReplicaDisk
from replicator.promotion import promoted_text


def compare_with_manifest(
    name: str, manifest: Manifest, source_id: str, disks: Sequence[ReplicaDisk]
) -> None:
    """Refuse a source that this replica is not a copy of."""
    if manifest.state == "promoted":
        raise FuseDiskError(promoted_text(name, manifest, ours=manifest.source_id == source_id))
    if manifest.source_id != source_id and not is_unclaimed(manifest):
        raise FuseDiskError(
            f"replica {name!r} belongs to source {manifest.source_id!r}, not to {source_id!r}; "
            "replicate under another name"
        )
    have = {disk.name: disk.size for disk in manifest.disks}
    want = {disk.name: disk.size for disk in disks}
    if have.keys() != want.keys():
        raise FuseDiskError(
            f"replica {name!r} has disks {', '.join(sorted(map(repr, have)))} but the source has "
            f"{', '.join(sorted(map(repr, want)))}; replicate under another name"
        )
    for disk, size in want.items():
        if have[disk] != size:
            raise FuseDiskError(
                f"disk {disk!r} of replica {name!r} has {have[disk]} bytes but the source's has "
                f"{size}; replicate under another name"
            )


def in_order(manifest: Manifest | None, disks: Sequence[ReplicaDisk]) -> list[ReplicaDisk]:
    """Return the source's disks in the order that the replica's records number them by."""
    if manifest is None:
        return list(disks)
    by_name = {disk.name: disk for disk in disks}
    return [by_name[disk.name] for disk in manifest.disks]
