"""Images that lie in a replica: whose promotion they come from, and whether they may be written.

A replica's images belong to its receiver until it is promoted, which its manifest says
(`.fusedisk/manifest.json` beside them; replicator/manifest.py). The promotion notes what each image
was then (`fusedisk.image.stamp`). A mount of images that still are what they were promoted as is
born from that promotion: its empty change map says truly that nothing changed since. That is what
lets a disk go home without a comparison.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from fusedisk.errors import FuseDiskError
from fusedisk.image import Image, stamp
from fusedisk.sealed import SealBroken, unseal

_MANIFEST_BYTES_MAX = 16 << 20


class _Disk(msgspec.Struct):
    name: str


class _Manifest(msgspec.Struct):
    """What concerns a mount; the rest is the replicator's."""

    state: str
    disks: list[_Disk]
    token: str | None = None
    stamps: list[dict[str, str | int]] = []


def promotion(images: Sequence[Image]) -> tuple[bool, str | None]:
    """Whether the replica that these images are the disks of is promoted, and `read_base` of it.

    Raises FuseDiskError where they are not all the disks of one replica.
    """
    folder = images[0].path.parent
    manifest = _read_manifest(folder)
    if (
        manifest is None
        or any(image.path.parent != folder for image in images)
        or {image.name for image in images} != {disk.name for disk in manifest.disks}
    ):
        raise FuseDiskError(
            "only a replica stands by; name all of its images, as 'replicator list' has them, "
            "and no others"
        )
    if manifest.state != "promoted":
        return False, None
    return True, read_base(images, read_only=False)


def read_base(images: Sequence[Image], *, read_only: bool) -> str | None:
    """Token of the promotion that these images are the unchanged disks of; None without one.

    Raises FuseDiskError for images that a replica still writes to, unless ``read_only``.
    """
    folders = {image.path.parent for image in images}
    found = {folder: _read_manifest(folder) for folder in folders}
    for image in images:
        manifest = found[image.path.parent]
        if (
            manifest is not None
            and manifest.state != "promoted"
            and image.path.name in [disk.name for disk in manifest.disks]
            and not read_only
        ):
            raise FuseDiskError(
                f"{image.path} belongs to a replica, which is {manifest.state}; make it the disk "
                f"first: 'replicator promote {image.path.parent}', or a cutover at its source"
            )
    if len(folders) != 1:
        return None
    manifest = found[images[0].path.parent]
    if manifest is None or manifest.state != "promoted":
        return None
    stamps = {d.name: s for d, s in zip(manifest.disks, manifest.stamps, strict=False)}
    if {image.name for image in images} != {disk.name for disk in manifest.disks}:
        return None
    if any(stamps.get(image.name) != stamp(image.fd) for image in images):
        return None
    return manifest.token


def _read_manifest(folder: Path) -> _Manifest | None:
    path = folder / ".fusedisk" / "manifest.json"
    try:
        with path.open("rb") as file:
            content, _ = unseal(file.read(_MANIFEST_BYTES_MAX))
        return msgspec.json.decode(content, type=_Manifest)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, SealBroken, msgspec.MsgspecError) as error:
        raise FuseDiskError(
            f"{path} cannot be read ({error}); find out whether the images belong to a replica"
        ) from None
