from collections.abc import Callable, Sequence
from typing import Final

from fusedisk.disk import Disk
from fusedisk.relay import Relay

FIRST_DISK: Final[int]
DISKS_MAX: Final[int]
MAX_WRITE: Final[int]

class DataPath:
    def __init__(
        self,
        relay: Relay,
        disks: Sequence[Disk],
        *,
        writeback: int,
        check_lease: Callable[[], bool],
        may_rest: int,
    ) -> None: ...
    def serve(self, slot: int) -> bool: ...
    def work_off(self, slot: int) -> None: ...
    def release_parked(self, slot: int) -> None: ...
    @property
    def parked_bytes(self) -> int: ...
    def write_back(self) -> None: ...
    def forget_mapped(self) -> None: ...
    def stop(self) -> None: ...
