"""What a mount is doing, read from its state directory: the server need not answer."""

import os
from pathlib import Path
from typing import Any

import msgspec

from fusedisk.changemap import ChangeMap, Control
from fusedisk.errors import FuseDiskError
from fusedisk.mounting import find_state
from fusedisk.state import read_mount_record


def status(mountpoint: Path) -> dict[str, Any]:
    """The object that ``fusedisk status --json`` prints (sizes in bytes). Raises FuseDiskError."""
    state = find_state(mountpoint)
    record = read_mount_record(state)
    disks = []
    try:
        control = Control(state / "control")
        epoch, fenced = control.epoch, control.fenced
        control.close()
        for index, disk in enumerate(record.disks):
            changes = ChangeMap(state / f"{index}.map")
            info = Path(disk.path).stat()
            disks.append(
                {
                    "name": disk.name,
                    "path": disk.path,
                    "size": disk.size,
                    "allocated": disk.size if Path(disk.path).is_block_device() else _used(info),
                    "chunk_size": disk.chunk_size,
                    "chunks": changes.chunks,
                    "changed_chunks": changes.count(0),
                }
            )
            changes.close()
    except (OSError, ValueError) as error:
        raise FuseDiskError(f"the state in {state} is damaged: {error}") from None
    pids = _pids(state)
    return {
        "mountpoint": record.mountpoint,
        "epoch": epoch,
        "fenced": fenced,
        "server": {"pid": pids.get("server"), "restarts": 0},
        "keeper": {"pid": pids.get("keeper")},
        "disks": disks,
    }


def _pids(state: Path) -> dict[str, int]:
    """The daemons that live; empty while they start or where the record is damaged."""
    try:
        found = msgspec.json.decode((state / "pids.json").read_bytes(), type=dict[str, int])
    except (OSError, msgspec.MsgspecError):
        return {}
    return {role: pid for role, pid in found.items() if _is_ours(role, pid)}


def _is_ours(role: str, pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return f"fusedisk.{role}".encode() in command


def _used(info: os.stat_result) -> int:
    return info.st_blocks * 512
