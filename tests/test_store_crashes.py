"""A sample of the crash simulation; `scripts/simulate-store --seeds N` runs more of it."""

import tempfile
from pathlib import Path

from store_simulation import Simulation

SHARED_MEMORY = Path("/dev/shm")


def test_crash_at_every_operation() -> None:
    crashes = continued = 0
    where = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="fusedisk", dir=where) as scratch:
        for seed in range(1, 13):
            simulation = Simulation(Path(scratch), seed)
            simulation.run()
            crashes += simulation.crashes
            continued += simulation.continued
    assert crashes > 2000 and continued > 200
