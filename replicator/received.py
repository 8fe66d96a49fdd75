"""A pass that is being received, as it is kept for the case that it is cut off.

Now and then a sender says how far it came. What the pass has by then is synced, and the manifest
notes it with what holds of it: the claims (`manifest.Received`). Whoever opens the replica finds
it, and the sender goes on from there with what no claim covers. Of a pass that compares all, as
from another history, only what it was compared up to is believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from replicator.clones import next_path
from replicator.journal import journal_directory
from replicator.manifest import CLAIMS_MAX, Claim, Manifest, Received


def towards(received: Received) -> str:
    """The generation whose epochs the claims of a pass count."""
    return received.towards or received.generation


def is_there(directory: Path, manifest: Manifest) -> bool:
    """Whether the pass that a manifest notes as received is still there. Raises OSError."""
    received = manifest.received
    if received is None:
        return False
    try:
        if received.clones is None:
            path = journal_directory(directory) / str(received.slot)
            return path.stat().st_size >= received.length
        return all(
            next_path(directory, disk).stat().st_size == manifest.disks[disk].size
            for disk in received.clones
        )
    except FileNotFoundError:
        # Removed to give its room back.
        return False


def with_claim(claims: Sequence[Claim], claim: Claim) -> list[Claim]:
    """Add a claim: it takes the place of the older ones that do not reach beyond it.

    Where there are too many it is left out: each claim holds by itself.
    """
    place = claim.disk, claim.offset
    return [*(c for c in claims if (c.disk, c.offset) > place), claim][:CLAIMS_MAX]
