"""A sample of the simulated replications; `scripts/simulate --seeds N` runs more of them."""

import tempfile
from pathlib import Path

from session_simulation import SessionSimulation

SHARED_MEMORY = Path("/dev/shm")
SEEDS = 150


def test_promises_hold_through_faults() -> None:
    faults = checks = 0
    where = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    for seed in range(1, SEEDS + 1):
        with tempfile.TemporaryDirectory(dir=where) as scratch:
            simulation = SessionSimulation(Path(scratch), seed)
            simulation.run()
        faults += simulation.faults
        checks += simulation.checks
    assert faults > 3 * SEEDS and checks > 10 * SEEDS
