"""A sample of the simulated replications; `scripts/simulate --seeds N` runs more of them."""

import gc
import tempfile
from pathlib import Path

import pytest
from session_simulation import SessionSimulation

SHARED_MEMORY = Path("/dev/shm")
# In parts for the workers to share.
PARTS = 2
SEEDS_PER_PART = 150


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_promises_hold_through_faults(part: int) -> None:
    faults = checks = 0
    where = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    first = 1 + part * SEEDS_PER_PART
    for seed in range(first, first + SEEDS_PER_PART):
        with tempfile.TemporaryDirectory(prefix="fusedisk", dir=where) as scratch:
            simulation = SessionSimulation(Path(scratch), seed)
            simulation.run()
        faults += simulation.faults
        checks += simulation.checks
        if seed % 10 == 0:
            # A world is much memory in few objects, of which the collector counts only these.
            gc.collect()
    assert faults > 3 * SEEDS_PER_PART and checks > 10 * SEEDS_PER_PART
