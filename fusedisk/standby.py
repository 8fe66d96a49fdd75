"""A mount of a replica's images that stands by: readable at once, writable from the promotion on.

So a QEMU that waits for a guest's memory can have its disks in a mount of ours before they are the
disk, and whatever the guest writes there is in the change map from its first write on: the way home
then sends only that.

While it stands by the gate is closed. A write that comes asks: if the replica's manifest says
*promoted* by now, the mount becomes one that was born from that promotion (fusedisk.lineage), which
mount.json says durably before the gate opens; if not, the write is refused, not held, since it
would land in the guest's disk later. While a promotion cannot be noted, for want of room perhaps,
writes are held: a guest that goes on here sees a pause, not an error. A crash before that record
leaves a mount that stood by and wrote nothing; the next mount finds the promotion by itself.
"""

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fusedisk.changemap import Control
from fusedisk.errors import FuseDiskError
from fusedisk.gate import open_gate, release_if_abandoned, take_lease
from fusedisk.image import Image
from fusedisk.lineage import promotion
from fusedisk.state import MountRecord, sync_directory, write_durably

log = logging.getLogger("fusedisk.standby")


class GateKeeper:
    """Who may open the gate of one mount; asked from the data path and now and then."""

    def __init__(
        self, state: Path, record: MountRecord, control: Control, fds: Sequence[int]
    ) -> None:
        self._state, self._record, self._control = state, record, control
        self._images = [
            Image(disk.name, Path(disk.path), fd, disk.size)
            for disk, fd in zip(record.disks, fds, strict=True)
        ]
        self._lock = threading.Lock()
        self._trouble = ""

    @property
    def standing_by(self) -> bool:
        """Whether nothing may be written yet."""
        return self._record.standby

    def check(self) -> bool:
        """Open the gate if that is due; whether what is held has to be refused instead."""
        with self._lock:
            if not self._record.standby:
                paths = [image.path for image in self._images]
                release_if_abandoned(self._state, self._control, paths)
                return False
            try:
                promoted, base = promotion(self._images)
            except (OSError, FuseDiskError):
                # Asked again with the next write.
                return True
            if promoted:
                self._try_to_end(base)
            return not promoted

    def _try_to_end(self, base: str | None) -> None:
        try:
            self._end(base)
            self._trouble = ""
        except OSError as error:
            # Asked again soon, and said once.
            if str(error) != self._trouble:
                self._trouble = str(error)
                log.error("promoted, but writes are held until that can be noted: %s", error)

    def _end(self, base: str | None) -> None:
        # Invariant: the promotion that writes rely on is durable; it was renamed into place.
        sync_directory(self._images[0].path.parent / ".fusedisk")
        # A cutover away from here may begin with that record, but not before the gate was opened.
        lease = take_lease(self._state)
        try:
            record = msgspec.structs.replace(self._record, standby=False, base=base)
            write_durably(self._state / "mount.json", msgspec.json.encode(record))
            self._record = record
            open_gate(self._control, [image.path for image in self._images])
        finally:
            os.close(lease)


def close_gate(state: Path) -> None:
    """Before the mount: let nothing be written until `GateKeeper.check` finds the promotion."""
    control = Control(state / "control", True)
    control.set_gate(True)
    control.close()
