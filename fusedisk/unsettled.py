"""A cutover whose outcome is not known, as `status` and `mount` tell of it."""

from pathlib import Path
from typing import Any

from fusedisk.errors import FuseDiskError
from fusedisk.fencing import read_fence
from fusedisk.state import MountRecord

Unsettled = dict[str, Any]


def unsettled(mount: MountRecord) -> Unsettled | None:
    """The cutover to resolve; its facts are None where the record of it cannot be read."""
    found: Unsettled = {"state": "unknown", "mountpoint": mount.mountpoint}
    try:
        record = read_fence(Path(disk.path) for disk in mount.disks)
    except FuseDiskError:
        return {**found, "replica": None, "address": None, "token": None}
    if record is None or record.state == "fenced":
        return None
    return {
        **found,
        "replica": record.replica,
        "address": record.address,
        "token": record.token,
    }


def unsettled_text(cutover: Unsettled) -> str:
    """The one line about it."""
    which = f" to {cutover['address']}" if cutover["address"] else ""
    return (
        f"the outcome of the cutover{which} is unknown, and writes may be refused: run "
        f"'replicator resolve {cutover['mountpoint']}'"
    )
