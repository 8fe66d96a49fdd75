from collections.abc import Sequence

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
    ) -> None: ...
    @property
    def fd(self) -> int: ...
    @property
    def size(self) -> int: ...
    def write(self, data: bytes, offset: int) -> int: ...
    def zero(self, offset: int, length: int) -> None: ...
