"""Making a replica of images that were the disk: fenced ones of an old source, or promoted ones.

A cutover leaves two identical sets of images, and its token names that state: the promoted ones,
which may be mounted and then begin from there (fusedisk.lineage), and the fenced ones, which are
not written any more. Adopted as a replica, the fenced ones are at the point ("cutover TOKEN", 0),
and a source born from TOKEN sends only what changed since. The stamp in the fence shows whether
an image is still what it was; if not, or if the source had no part in the promotion, the history of
the replica is unknown and everything is compared by hash.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from fusedisk.errors import FuseDiskError
from fusedisk.fencing import FenceRecord, fence_path, read_fences
from fusedisk.image import open_image
from fusedisk.image import stamp as image_stamp
from fusedisk.state import sync_directory
from replicator.files import Files
from replicator.manifest import (
    PRIVATE_DIRECTORY,
    Manifest,
    Point,
    ReplicaDisk,
    check_disks,
    clear_errors,
    new_manifest,
    read_manifest,
    write_manifest,
)

_UNCLAIMED = "cutover "
_CHUNK_BYTES = 64 << 10


def cutover_point(token: str) -> tuple[str, int]:
    """(generation, epoch) of the state that was promoted under a token."""
    return f"{_UNCLAIMED}{token}", 0


def is_unclaimed(manifest: Manifest) -> bool:
    """Whether images were adopted that no source has replicated to since."""
    return manifest.source_id.startswith(_UNCLAIMED)


def adopt(directory: Path, images: Sequence[Path]) -> tuple[Manifest, str | None]:
    """Make a replica of fenced images, which move into `directory`; without any, of those there.

    The caller holds the replica's lock. Returns the manifest, and why everything will be compared
    by hash, or None where it need not. Raises FuseDiskError with nothing changed. After a crash
    it can be repeated.
    """
    in_place = not images
    before: Manifest | None = None
    if in_place:
        before = read_manifest(directory)
        if before is None or before.state != "promoted":
            raise FuseDiskError(
                f"{directory} is no promoted replica; name the images to adopt"
                if before is None
                else f"replica {directory.name!r} is {before.state}: it is a replica already"
            )
        images = [directory / disk.name for disk in before.disks]
    elif os.path.lexists(directory):
        return _finished(directory, images), None
    fences = _fences(images)
    opened = [open_image(_plain(image), read_only=False) for image in images]
    try:
        disks = [ReplicaDisk(image.name, image.size, _CHUNK_BYTES) for image in opened]
        check_disks(disks)
        problem = _why_unknown(fences, [image_stamp(image.fd) for image in opened])
        fresh = new_manifest(cutover_point(fences[0].token)[0], disks)
        if before is not None:
            # Invariant: no point gets the id, and so the undo file, of one before the promotion.
            fresh = msgspec.structs.replace(
                fresh,
                keep=before.keep,
                next_point=before.next_point,
                aborted_tokens=before.aborted_tokens,
            )
        manifest = fresh if problem else _at_cutover(fresh, fences[0].token)
        with clear_errors(f"cannot adopt images as {directory}"):
            if in_place:
                # The fences stay until it is promoted again.
                write_manifest(Files(), directory, manifest)
            else:
                _move(directory, images, fences, manifest)
    finally:
        for image in opened:
            os.close(image.fd)
    return manifest, problem


def _plain(image: Path) -> Path:
    if not os.path.lexists(image):
        raise FuseDiskError(f"image {image} is missing; check the path")
    if not stat.S_ISREG(image.lstat().st_mode):
        raise FuseDiskError(f"{image} is not a plain file; only image files can be adopted")
    return image


def _fences(images: Sequence[Path]) -> list[FenceRecord]:
    found = []
    for image, fence in zip(images, read_fences(images), strict=True):
        if fence is None or fence.state != "fenced":
            raise FuseDiskError(
                f"{image} is not fenced: it may still be the disk. Only the images that a cutover "
                "left behind can be adopted; settle one of unknown outcome by 'replicator resolve'"
            )
        found.append(fence)
    if len({fence.token for fence in found}) != 1:
        raise FuseDiskError("the images were fenced by different cutovers; adopt one mount's alone")
    return found


def _why_unknown(
    fences: Sequence[FenceRecord], stamps: Sequence[dict[str, str | int]]
) -> str | None:
    if any(fence.stamp is None for fence in fences):
        return "the replica was promoted without its source"
    if any(fence.stamp != stamp for fence, stamp in zip(fences, stamps, strict=True)):
        return "an image changed since the cutover"
    return None


def _at_cutover(manifest: Manifest, token: str) -> Manifest:
    generation, epoch = cutover_point(token)
    return msgspec.structs.replace(
        manifest,
        generation=generation,
        epoch=epoch,
        state="following",
        points=[Point(manifest.next_point, generation, epoch, time.time())],
        next_point=manifest.next_point + 1,
    )


def _move(
    directory: Path, images: Sequence[Path], fences: Sequence[FenceRecord], manifest: Manifest
) -> None:
    """Make the whole replica under a private name and rename it; only then old names go.

    Invariant: under every name there is a fence or a manifest that refuses mounts, at any time.
    """
    staging = directory.with_name(f".new-{directory.name}")
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    (staging / PRIVATE_DIRECTORY).mkdir()
    for image, fence in zip(images, fences, strict=True):
        fence_path(staging / image.name).write_bytes(msgspec.json.encode(fence))
        fd = os.open(fence_path(staging / image.name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        try:
            os.link(image, staging / image.name)
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise FuseDiskError(
                f"cannot move {image} into {directory.parent}: {error.strerror}; use a store on "
                "the same filesystem"
            ) from error
    write_manifest(Files(), staging, manifest)
    sync_directory(staging)
    staging.rename(directory)
    sync_directory(directory.parent)
    _remove_old_names(images)


def _remove_old_names(images: Sequence[Path]) -> None:
    for image in images:
        # Invariant: a fence outlives the name that it guards.
        with suppress(FileNotFoundError):
            image.unlink()
        sync_directory(image.parent)
        fence_path(image).unlink(missing_ok=True)


def _finished(directory: Path, images: Sequence[Path]) -> Manifest:
    """Finish an adoption that a crash interrupted after the rename."""
    manifest = read_manifest(directory)
    adopted = manifest is not None and is_unclaimed(manifest)
    left = [image for image in images if os.path.lexists(image)]
    same = all(
        (directory / image.name).exists() and image.samefile(directory / image.name)
        for image in left
    )
    if manifest is None or not adopted or not same:
        raise FuseDiskError(f"{directory} exists already; adopt the images under another name")
    with clear_errors(f"cannot adopt images as {directory}"):
        _remove_old_names(images)
    return manifest
