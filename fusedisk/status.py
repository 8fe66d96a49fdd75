"""What a mount is doing, read from its state directory: the server need not answer."""

from pathlib import Path
from typing import Any

from fusedisk.changemap import ChangeMap, Control
from fusedisk.daemons import read_daemons
from fusedisk.errors import FuseDiskError
from fusedisk.mounting import find_state
from fusedisk.replicas import committed_epoch, open_maps, read_record, replica_names, reports
from fusedisk.slowing import slowed_to
from fusedisk.state import Disk, MountRecord, read_mount_record
from fusedisk.unsettled import unsettled


def status(mountpoint: Path) -> dict[str, Any]:
    """The object that ``fusedisk status --json`` prints (sizes in bytes). Raises FuseDiskError."""
    state = find_state(mountpoint)
    record = read_mount_record(state)
    maps = open_maps(state, record)
    try:
        control = Control(state / "control")
        epoch, fenced, slowed = control.epoch, control.fenced, slowed_to(control)
        control.close()
        behind = _furthest_behind(state, record)
        disks = [
            _disk(disk, changes, behind) for disk, changes in zip(record.disks, maps, strict=True)
        ]
        replicas = reports(state, record, maps, epoch)
    except (OSError, ValueError) as error:
        raise FuseDiskError(f"the state in {state} is damaged: {error}") from None
    finally:
        for changes in maps:
            changes.close()
    daemons = read_daemons(state)
    return {
        "mountpoint": record.mountpoint,
        "epoch": epoch,
        "fenced": fenced,
        "cutover": unsettled(record),
        "standby": record.standby,
        "slowed_to": slowed,
        "server": {"pid": daemons.server, "restarts": daemons.restarts},
        "keeper": {"pid": daemons.keeper},
        "disks": disks,
        "replicas": replicas,
    }


def _furthest_behind(state: Path, mount: MountRecord) -> int:
    """The epoch that every replica has; 0 where there is none, or one without any."""
    behind = []
    for name in replica_names(state):
        try:
            behind.append(committed_epoch(read_record(state, name), mount) or 0)
        except FuseDiskError:
            # The entry among the replicas says what is wrong with its note.
            behind.append(0)
    return min(behind, default=0)


def _disk(disk: Disk, changes: ChangeMap, behind: int) -> dict[str, Any]:
    path = Path(disk.path)
    return {
        "name": disk.name,
        "path": disk.path,
        "size": disk.size,
        "allocated": disk.size if path.is_block_device() else path.stat().st_blocks * 512,
        "chunk_size": disk.chunk_size,
        "chunks": changes.chunks,
        "changed_chunks": changes.count(behind),
    }
