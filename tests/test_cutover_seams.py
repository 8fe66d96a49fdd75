"""A cutover of the real code, and its resolve, with a fault at each seam: one disk is left.

A sample; FUSEDISK_LONG_MODELS=1, as in scripts/soak, tries every fault at every seam.
"""

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from cutover_seams import FAULTS, SeamedCutover

SHARED_MEMORY = Path("/dev/shm")
WHOLE = "FUSEDISK_LONG_MODELS" in os.environ
# Of no common divisor with the number of faults, so that each of them is in a sample.
STRIDE_BEFORE, STRIDE = (1, 1) if WHOLE else (71, 13)
"""Until *committing* is on record, where every way leads back, and from then on."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What a sender says of each lost link would be megabytes."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def play(plan: Mapping[int, str]) -> SeamedCutover:
    where = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="fusedisk", dir=where) as scratch:
        cutover = SeamedCutover(Path(scratch), plan)
        cutover.run()
    return cutover


def strike_each(before: SeamedCutover, plan: Mapping[int, str], seams: range, stride: int) -> None:
    """One more fault than those of ``plan``, which ``before`` is the run of, at each seam."""
    cases = [(number, fault) for number in seams for fault in FAULTS]
    for number, fault in cases[::stride]:
        played = play({**plan, number: fault})
        # Else it would not be every seam.
        assert played.seams[:number] == before.seams[:number]
        assert played.struck == [*plan.values(), fault]


def test_one_side_is_the_disk_after_a_fault_at_any_seam_of_a_cutover() -> None:
    clean = play({})
    assert clean.outcome == "promoted"
    assert {"sender: sync the folder", "sender: open_gate"} <= set(clean.seams)
    begun = clean.seams.index("sender: begin_promotion") + 1
    strike_each(clean, {}, range(1, begun), STRIDE_BEFORE)
    strike_each(clean, {}, range(begun, len(clean.seams) + 1), STRIDE)


@pytest.mark.parametrize(
    ("dies_at", "settled"),
    [("sender: send Promote", "rolled-back"), ("sender: received Promoted", "promoted")],
)
def test_resolve_settles_after_a_fault_at_any_of_its_seams(dies_at: str, settled: str) -> None:
    plan = {play({}).seams.index(dies_at) + 1: "source killed"}
    killed = play(plan)
    assert killed.resolved == [settled]
    seams = range(next(iter(plan)) + 1, len(killed.seams) + 1)
    strike_each(killed, plan, seams, 2 * STRIDE - 1)
