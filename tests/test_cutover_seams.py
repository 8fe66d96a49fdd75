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
WHOLE = bool(os.environ.get("FUSEDISK_LONG_MODELS"))
# Of no common divisor with the number of faults, so that each of them is in a sample.
STRIDE = 1 if WHOLE else 37


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


def strike_each(before: SeamedCutover, plan: Mapping[int, str], first: int) -> None:
    """One more fault than those of ``plan``, which ``before`` is the run of, at each seam."""
    seams = range(first, len(before.seams) + 1)
    cases = [(number, fault) for number in seams for fault in FAULTS]
    for number, fault in cases[::STRIDE]:
        played = play({**plan, number: fault})
        # Else it would not be every seam.
        assert played.seams[:number] == before.seams[:number]
        assert played.struck == [*plan.values(), fault]


def test_one_side_is_the_disk_after_a_fault_at_any_seam_of_a_cutover() -> None:
    clean = play({})
    assert clean.outcome == "promoted"
    seams = " ".join(clean.seams)
    for each in ("fence.new", "sync the folder", "begin_promotion", "send Promote", "open_gate"):
        assert f"sender: {each}" in seams or each in seams
    strike_each(clean, {}, 1)


@pytest.mark.parametrize(
    ("dies_at", "settled"),
    [("sender: send Promote", "rolled-back"), ("sender: received Promoted", "promoted")],
)
def test_resolve_settles_after_a_fault_at_any_of_its_seams(dies_at: str, settled: str) -> None:
    plan = {play({}).seams.index(dies_at) + 1: "source killed"}
    killed = play(plan)
    assert killed.resolved == [settled]
    strike_each(killed, plan, next(iter(plan)) + 1)
