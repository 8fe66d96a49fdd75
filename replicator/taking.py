"""Taking a replica from the receiver that holds it, to promote it or to settle a cutover here."""

from __future__ import annotations

import time

from fusedisk.errors import FuseDiskError
from replicator.manifest import Manifest, read_manifest
from replicator.replica import Replica
from replicator.store import ReplicaBusy, Store
from replicator.turns import ask_for_turn

_WAIT_SECONDS_MAX = 15.0
_ASK_AGAIN_SECONDS = 4.0
# Less than the time after which a sender that was sent away is back.
_POLL_SECONDS = 0.05


def existing_manifest(store: Store, name: str) -> Manifest:
    """The manifest of a replica. Raises FuseDiskError where there is none."""
    manifest = read_manifest(store.replica_path(name))
    if manifest is None:
        raise FuseDiskError(
            f"{store.path / name} is no replica; 'replicator list {store.path}' has them"
        )
    return manifest


def take(store: Store, name: str, *, force: bool) -> Replica:
    """Open a replica; a receiver that holds it lets go, if its sender is gone or `force` is given.

    Raises FuseDiskError where the sender answers, and for what `Replica.load` refuses.
    """
    source_id = existing_manifest(store, name).source_id
    deadline = time.monotonic() + _WAIT_SECONDS_MAX
    ask_at = 0.0
    while True:
        try:
            return Replica.load(store, name)
        except ReplicaBusy:
            now = time.monotonic()
        if now > deadline:
            raise FuseDiskError(
                f"replica {name!r} is in use: its source is connected and answers. Move over by "
                "'replicator cutover' at the source, or stop the sender there; --force takes the "
                "replica from it"
            )
        if now >= ask_at:
            ask_for_turn(store.path, name, source_id, "force" if force else "promotion")
            ask_at = now + _ASK_AGAIN_SECONDS
        time.sleep(_POLL_SECONDS)
