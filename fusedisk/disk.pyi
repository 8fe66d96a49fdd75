from collections.abc import Sequence

from fusedisk.activity import ActivityLog
from fusedisk.changemap import ChangeMap, Control

class Disk:
    def __init__(
        self,
        control: Control,
        changes: ChangeMap,
        fd: int,
        *,
        read_only: bool = False,
        writeback: int = -1,
        index: int = 0,
        spills: Sequence[int] = (),
        activity: ActivityLog | None = None,
        first_region: int = 0,
    ) -> None: ...
    @property
    def fd(self) -> int: ...
    @property
    def size(self) -> int: ...
    def write(self, data: bytes, offset: int) -> int: ...
    def zero(self, offset: int, length: int) -> None: ...
