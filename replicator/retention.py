"""Which recovery points are kept: by count and age, as `--keep` says.

A policy is one or more tiers. `12` keeps the newest 12 points; `24x1h` keeps, for each of the
newest 24 hours that have any, the newest point. Hours are counted in UTC from 1970, so that which
points stay does not depend on when it is looked at. The newest point is always kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from fusedisk.errors import UsageError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_TIER = re.compile(r"([1-9][0-9]{0,3})(?:x([1-9][0-9]{0,5})([smhd]))?", re.ASCII)
_TIERS_MAX = 8
POINTS_MAX = 2000


class Tier(NamedTuple):
    """`number` points, one for each interval of `seconds`; 0 for every point."""

    number: int
    seconds: int


Policy = tuple[Tier, ...]
NEWEST_ONLY: Policy = (Tier(1, 0),)


def parse_policy(text: str) -> Policy:
    """Return the policy of e.g. ``12`` or ``12x5m,24x1h,7x1d``. Raises UsageError."""
    tiers = []
    for part in text.split(","):
        match = _TIER.fullmatch(part)
        if match is None:
            raise UsageError(
                f"{part[:40]!r} in --keep is not COUNT or COUNTxTIME, such as 12 or 24x1h "
                "(s, m, h, d); separate them by commas"
            )
        tiers.append(Tier(int(match[1]), int(match[2]) * _UNITS[match[3]] if match[2] else 0))
    if len(tiers) > _TIERS_MAX or sum(tier.number for tier in tiers) > POINTS_MAX:
        raise UsageError(f"--keep takes up to {_TIERS_MAX} parts and {POINTS_MAX} points in all")
    return tuple(tiers)


def kept(policy: Policy, times: Sequence[float]) -> list[bool]:
    """Say of each point whether it is kept; `times` are their commits, oldest first.

    Once a point is not kept it never would be again, however many follow.
    """
    keep = [False] * len(times)
    if keep:
        keep[-1] = True
    for count, seconds in policy:
        taken: set[int] = set()
        for index in range(len(times) - 1, -1, -1):
            slot = int(times[index] // seconds) if seconds else index
            if slot not in taken:
                if len(taken) == count:
                    break
                taken.add(slot)
                keep[index] = True
    return keep
