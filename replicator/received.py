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
    """Add a claim, unless one that is there says as much; it takes the place of those it covers.

    One of an older epoch says more of what was not written after that only where it reaches
    farther. So the sequel of a comparison, which says again that all is compared, costs none of
    the newer claims. Where there are too many it is left out: each claim holds by itself.
    """
    if any(covers(each, claim) for each in claims):
        return list(claims)
    kept = [each for each in claims if not covers(claim, each)]
    if len(kept) == CLAIMS_MAX:
        return kept
    return sorted([*kept, claim], key=lambda each: (each.disk, each.offset), reverse=True)


def covers(claim: Claim, other: Claim) -> bool:
    """Whether a claim says all that another one does: it reaches as far, of as late an epoch."""
    place, of_other = (claim.disk, claim.offset), (other.disk, other.offset)
    return place >= of_other and claim.epoch >= other.epoch
