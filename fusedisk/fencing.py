"""The fence: a record beside each image that outlives mounts and state directories.

``committing``  a promotion of the replica was begun and its outcome is not known yet
``fenced``      the replica is the disk now

Either makes every mount of the image refuse writes. The record lies beside the image, so that
another state directory cannot bypass it; for a device it lies below /var/lib/fusedisk, under a
name that follows the device: /dev/sdb may be another disk after a reboot, and loop0 at any time.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from fusedisk.errors import FuseDiskError
from fusedisk.image import stamp
from fusedisk.state import sync_directory, write_durably


class FenceRecord(msgspec.Struct, forbid_unknown_fields=True):
    """One cutover: its token, how far it came, and where to ask how it ended.

    ``stamp``: what the image was when *committing* was recorded, which is exactly the state that
    was promoted; None after a promotion that the source had no part in.
    """

    token: str
    state: Literal["committing", "fenced"]
    replica: str
    address: str
    epoch: int
    stamp: dict[str, str | int] | None = None


# What the kernel knows a device by that outlives a reboot, below its directory in /sys.
_IDENTITIES = ("dm/uuid", "md/uuid", "wwid", "device/wwid", "serial", "device/serial")


def _device_identity(system: Path, node: str) -> str:
    """The same for the same device, whatever its node is called; else the node's name."""

    def read(name: str) -> str:
        try:
            return (system / name).read_text().strip()
        except OSError:
            return ""

    if part := read("partition"):
        return f"{_device_identity(system.resolve().parent, node)} part {part}"
    if backing := read("loop/backing_file"):
        return f"loop {backing} {read('loop/offset')}"
    found = [f"{name} {value}" for name in _IDENTITIES if (value := read(name))]
    return found[0] if found else f"node {node}"


def fence_path(image: Path) -> Path:
    """Where the record of an image lies."""
    if image.is_block_device():
        number = image.stat().st_rdev
        system = Path("/sys/dev/block") / f"{os.major(number)}:{os.minor(number)}"
        identity = _device_identity(system, image.name)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:32]
        return Path("/var/lib/fusedisk") / f"{digest}.fusedisk-fence"
    return image.with_name(image.name + ".fusedisk-fence")


def record_fence(images: Iterable[Path], record: FenceRecord) -> None:
    """Make the record durable beside every image, each with its stamp. Raises OSError."""
    for image in images:
        path = fence_path(image)
        path.parent.mkdir(parents=True, exist_ok=True)
        known = msgspec.structs.replace(record, stamp=_stamp_to_record(image, record))
        write_durably(path, msgspec.json.encode(known))


def _stamp_to_record(image: Path, record: FenceRecord) -> dict[str, str | int] | None:
    if record.state == "committing":
        # The gate is closed and all is flushed: this is what is about to be promoted.
        try:
            fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            # The fence matters more; without a stamp a way home compares everything.
            return None
        try:
            return stamp(fd)
        finally:
            os.close(fd)
    try:
        before = msgspec.json.decode(fence_path(image).read_bytes(), type=FenceRecord)
    except (OSError, msgspec.MsgspecError):
        return None
    # Another token is a promotion at the target alone: it need not hold what is here.
    return before.stamp if before.token == record.token else None


def read_fences(images: Iterable[Path]) -> list[FenceRecord | None]:
    """The record beside each image. Raises FuseDiskError for a damaged one."""
    found: list[FenceRecord | None] = []
    for image in images:
        path = image
        try:
            path = fence_path(image)
            found.append(msgspec.json.decode(path.read_bytes(), type=FenceRecord))
        except FileNotFoundError:
            found.append(None)
        except (OSError, msgspec.MsgspecError) as error:
            raise FuseDiskError(
                f"{path} is damaged ({error}); find out which side is the disk before removing it"
            ) from None
    return found


def read_fence(images: Iterable[Path]) -> FenceRecord | None:
    """The gravest record beside the images. Raises FuseDiskError for a damaged one."""
    records = [record for record in read_fences(images) if record is not None]
    fenced = [record for record in records if record.state == "fenced"]
    found = fenced or records
    return found[-1] if found else None


def on_record(images: Iterable[Path]) -> bool:
    """Whether a promotion was begun; a record that cannot be read is a record."""
    try:
        return read_fence(images) is not None
    except FuseDiskError:
        return True


def clear_fence(images: Iterable[Path]) -> None:
    """Remove the records, durably. Only after a confirmed abort."""
    for image in images:
        path = fence_path(image)
        path.unlink(missing_ok=True)
        # Also where there was nothing to remove: a removal before a crash may not be durable yet.
        # A device's directory is made with its first record.
        if path.parent.is_dir():
            sync_directory(path.parent)
