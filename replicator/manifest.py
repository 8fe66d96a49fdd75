"""What is durably known about a replica, in `STORE/NAME/.fusedisk/manifest.json`.

It is replaced by rename, so that a crash leaves the old or the new one. A new one is the commit
record of a pass: see docs/crash-model.md for the order of steps around it. It carries a checksum
(fusedisk.sealed); version 2, which had none, is still read.

Which combinations there are:

state       epoch  journal  applying   the images are
filling     None   -        no         as created or adopted
filling     None   -        yes        on the way to the first point, or a mixture after damage
filling     E      -        no         a copy of no single instant, with everything written up to E
filling     E      -        yes        on the way from there to the first point
promoted    None   -        no         their guest's, who was given no whole point, by force
following   E      -        no         the state of the disks at E
following   E      yes      yes        on the way from E to the journal's point; the journal decides
promoted    E      -        no         their guest's, who began with the state at E
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from fusedisk.errors import FuseDiskError
from fusedisk.sealed import SealBroken, seal, unseal
from replicator.files import Files
from replicator.messages import RECEIVED_MAX
from replicator.retention import parse_policy

PRIVATE_DIRECTORY = ".fusedisk"
MANIFEST_VERSION = 3
_UNSEALED_VERSION = 2
MAX_ABORTED_TOKENS = 16
CLAIMS_MAX = RECEIVED_MAX
MAX_EPOCH = 2**32 - 1
_MAX_DISK_SIZE = 2**63 - 1
_MANIFEST_BYTES_MAX = 16 << 20
_MIN_CHUNK, _MAX_CHUNK = 4096, 16 << 20

State = Literal["filling", "following", "promoted"]
Hex = Annotated[str, msgspec.Meta(min_length=32, max_length=32, pattern="^[0-9a-f]*$")]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Epoch = Annotated[int, msgspec.Meta(ge=0, le=MAX_EPOCH)]


class ReplicaDisk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A disk of a replica: its name, and its size and its source's chunk size in bytes."""

    name: str
    size: int
    chunk_size: int


class JournalRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A committed pass: its journal's slot, the id in its header, and the point it leads to.

    With `clones` there is no journal, but the disks so numbered as the pass left them (clones.py).
    `root` is that of the point.
    """

    slot: Annotated[int, msgspec.Meta(ge=0, le=1)]
    id: Hex
    generation: Text
    epoch: Epoch
    time: float
    clones: list[Annotated[int, msgspec.Meta(ge=0)]] | None = None
    frozen: bool = False
    root: Hex | None = None


class Filled(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a pass of (generation, epoch) came that was to lead to the first point.

    All before byte `offset` of `order[disk]` is durable; `order` names the disks as sent, and
    `digest` is that of the pass by then. With `based` the pass sends what changed since the base
    that the manifest names, and it is a claim: see Claim.
    """

    generation: Text
    epoch: Epoch
    disk: Annotated[int, msgspec.Meta(ge=0, le=2**16)]
    offset: Annotated[int, msgspec.Meta(ge=0, le=_MAX_DISK_SIZE)]
    order: list[str]
    digest: Hex | None = None
    based: bool = False


class Claim(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What nobody wrote after `epoch`, of all before byte `offset` of a disk, is as at the source.

    Disks are counted as they are sent.
    """

    epoch: Epoch
    disk: Annotated[int, msgspec.Meta(ge=0, le=2**16)]
    offset: Annotated[int, msgspec.Meta(ge=0, le=_MAX_DISK_SIZE)]


class Received(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is durable of a pass that starts from the point (generation, epoch), to go on with.

    It is the first `length` bytes of the journal in `slot`, or with `clones` the disks so numbered
    (clones.py). `claims` hold of it and of the images where it has nothing; they are ordered from
    the farthest place and oldest epoch to the nearest and newest. Their epochs are those of the
    generation `towards`, by default that of the point. `order` names the disks as sent,
    and `digest` is that of the pass at the checkpoint that was noted last.

    With `compared` the pass compares all with the point: beyond the farthest claim nothing is
    known, whatever was written when.
    """

    id: Hex
    generation: Text
    epoch: Epoch
    order: list[str]
    claims: Annotated[list[Claim], msgspec.Meta(min_length=1, max_length=CLAIMS_MAX)]
    slot: Annotated[int, msgspec.Meta(ge=0, le=1)] = 0
    length: Annotated[int, msgspec.Meta(ge=0)] = 0
    clones: list[Annotated[int, msgspec.Meta(ge=0)]] | None = None
    digest: Hex | None = None
    towards: Text | None = None
    compared: bool = False


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A recovery point: the state at (generation, epoch), committed at `time` (Unix seconds).

    `undo_bytes` of its undo file are durable and whole; the newest point needs none. `clone` is
    the number in the names of the clones that its undo records lie over, if it has some; else they
    lie over the next point, or the images. `frozen`: the guest's file systems were frozen then.
    """

    id: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    generation: Text
    epoch: Epoch
    time: float
    undo_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0
    clone: Annotated[int, msgspec.Meta(ge=1, le=2**62)] | None = None
    frozen: bool = False


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is durably known about a replica.

    (generation, epoch) is the last point the images are known to have held, or None twice if the
    history is unknown. While `applying` is true the images are on the way from there to a later
    one; once there has been a point, that is the one of `journal`, which is committed. `points` are
    oldest first. The last is the state of the images, except while applying: then the images'
    own point is left out if it is not to be kept.

    `promoted_at` is the wall clock of the promotion, and `stamps` what each image was then
    (fusedisk.image.stamp): a mount of it finds out by them whether it is the promoted state.

    `root` is the digest over all passes that led to (generation, epoch), None where it is not known
    (chain.py).
    """

    version: int
    source_id: Text
    generation: Text | None
    epoch: Epoch | None
    state: State
    applying: bool
    journal: JournalRef | None
    keep: Text
    points: list[Point]
    next_point: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    token: Text | None
    aborted_tokens: Annotated[list[Text], msgspec.Meta(max_length=MAX_ABORTED_TOKENS)]
    disks: Annotated[list[ReplicaDisk], msgspec.Meta(min_length=1)]
    promoted_at: float | None = None
    stamps: list[dict[str, str | int]] = []
    filled: Filled | None = None
    received: Received | None = None
    root: Hex | None = None

    @property
    def committed(self) -> tuple[str | None, int | None]:
        """(generation, epoch) last acknowledged to the source, applied or not."""
        if self.journal is not None:
            return self.journal.generation, self.journal.epoch
        return self.generation, self.epoch


class _VersionOnly(msgspec.Struct):
    version: int


def new_manifest(source_id: str, disks: Sequence[ReplicaDisk]) -> Manifest:
    """Return the manifest of a replica without history."""
    return Manifest(
        version=MANIFEST_VERSION,
        source_id=source_id,
        generation=None,
        epoch=None,
        state="filling",
        applying=False,
        journal=None,
        keep="1",
        points=[],
        next_point=1,
        token=None,
        aborted_tokens=[],
        disks=list(disks),
    )


def manifest_path(directory: Path) -> Path:
    """Return where the replica in `directory` keeps its manifest."""
    return directory / PRIVATE_DIRECTORY / "manifest.json"


def read_manifest(directory: Path) -> Manifest | None:
    """Read and check the manifest of the replica in `directory`; None if there is none.

    Raises FuseDiskError if it cannot be read, is damaged, or is of another version.
    """
    path = manifest_path(directory)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FuseDiskError(f"cannot read manifest {path}: {error.strerror}") from error
    try:
        return load_manifest(fd, path)
    finally:
        os.close(fd)


def load_manifest(fd: int, path: Path) -> Manifest:
    """As `read_manifest`, of the open file of a manifest."""
    try:
        with open(fd, "rb", closefd=False) as file:
            raw = file.read(_MANIFEST_BYTES_MAX + 1)
    except OSError as error:
        raise FuseDiskError(f"cannot read manifest {path}: {error.strerror}") from error
    damaged = f"manifest {path} is damaged"
    # No older copy is taken in its place: it may not say yet that the replica was promoted.
    remedy = (
        "if the replica was promoted, move its images out of the store, they are its guest's disk; "
        "if not, remove the manifest, and the source compares them by hash (without older points)"
    )
    if len(raw) > _MANIFEST_BYTES_MAX:
        raise FuseDiskError(f"{damaged} (larger than {_MANIFEST_BYTES_MAX} bytes); {remedy}")
    try:
        content, sealed = unseal(raw)
        # The version comes first: another version's fields mean nothing to this one's checks.
        version = msgspec.json.decode(content, type=_VersionOnly).version
        if version == MANIFEST_VERSION and not sealed:
            raise SealBroken("it lacks its checksum")
        known = version == MANIFEST_VERSION or (version == _UNSEALED_VERSION and not sealed)
        if known:
            manifest = msgspec.json.decode(content, type=Manifest)
    except (SealBroken, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FuseDiskError(f"{damaged} ({error}); {remedy}") from error
    if not known:
        raise FuseDiskError(
            f"manifest {path} has version {version}, only {MANIFEST_VERSION} is known here; "
            "use the release that wrote it"
        )
    try:
        check_disks(manifest.disks)
        parse_policy(manifest.keep)
    except FuseDiskError as error:
        raise FuseDiskError(f"{damaged} ({error}); {remedy}") from error
    if (contradiction := _contradiction(manifest)) is not None:
        raise FuseDiskError(f"{damaged} ({contradiction}); {remedy}")
    # An older one is written again as what is written now.
    return msgspec.structs.replace(manifest, version=MANIFEST_VERSION)


def _contradiction(manifest: Manifest) -> str | None:
    if (manifest.generation is None) != (manifest.epoch is None):
        return "generation and epoch must be there together"
    if manifest.state == "following" and manifest.epoch is None:
        return f"state {manifest.state} with epoch {manifest.epoch}"
    if (manifest.state == "promoted") != (manifest.token is not None):
        return "a token belongs to a promoted replica, and only to one"
    if manifest.state == "promoted" and manifest.applying:
        return "promoted and applying at once"
    if manifest.state != "filling" and manifest.applying != (manifest.journal is not None):
        return "applying without a journal, or a journal that is not applied"
    if manifest.journal is not None and manifest.journal.clones is not None:
        clones = manifest.journal.clones
        if clones != sorted(set(clones)) or not clones or clones[-1] >= len(manifest.disks):
            return "a pass to disks that are not there"
    if (received := manifest.received) is not None:
        begun = received.generation, received.epoch
        if manifest.state != "following" or begun != manifest.committed:
            return "a pass that does not start from the point committed last"
        if any(disk >= len(manifest.disks) for disk in received.clones or ()):
            return "a pass to disks that are not there"
    ids = [point.id for point in manifest.points]
    if ids != sorted(set(ids)) or (ids and ids[-1] >= manifest.next_point):
        return "points are out of order"
    if manifest.state == "filling" and manifest.points:
        return "a recovery point before the first point"
    if manifest.filled is not None and not (manifest.state == "filling" and manifest.applying):
        return "how far a fill came, where none is under way"
    filled = manifest.filled
    if filled is not None and filled.based and filled.generation != manifest.generation:
        return "how far a pass came, where its base is not there"
    if manifest.state == "filling" and manifest.journal is not None:
        return "a journal before the first point"
    return None


def write_manifest(files: Files, directory: Path, manifest: Manifest) -> None:
    """Replace the manifest; it is durable when this returns, and the old or new one at any time.

    Raises OSError; old or new may then be the one on disk.
    """
    path = manifest_path(directory)
    content = seal(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
    if len(content) > _MANIFEST_BYTES_MAX:
        # Invariant: whatever is written can be read again.
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    scratch = path.with_name(path.name + ".new")
    with suppress(FileNotFoundError):
        files.unlink(scratch)
    fd = files.create(scratch)
    try:
        files.write(fd, [content], 0)
        # Invariant: content before name, else the name could lead to an empty file.
        files.sync(fd)
    finally:
        os.close(fd)
    files.rename(scratch, path)
    files.sync_directory(path.parent)


def settle_manifest(files: Files, directory: Path) -> None:
    """Make the manifest just read durable. Raises OSError.

    Its writer may have died between rename and sync. Answers are given from what was read, and a
    journal it no longer names is removed, so it must not go back after a power loss.
    """
    path = manifest_path(directory)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        files.sync(fd)
    finally:
        os.close(fd)
    # The names on the way to it too: their maker may have died before it synced them.
    for named in (path.parent, directory, directory.parent):
        files.sync_directory(named)


def check_disk_name(name: str) -> None:
    """Check that `name` can be a disk's file name in a replica; FuseDiskError if it cannot."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise FuseDiskError(f"disk name {name!r} is not valid UTF-8; rename the disk") from None
    if not 1 <= length <= 200:
        raise FuseDiskError(f"disk name {name!r} has {length} bytes; use 1 to 200")
    control = any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u2029" for c in name)
    if control or "/" in name or name in (".", "..") or name.startswith(PRIVATE_DIRECTORY):
        raise FuseDiskError(
            f"disk name {name!r} is not usable; it may not be '.' or '..', start with "
            f"{PRIVATE_DIRECTORY!r}, or contain '/' or control characters"
        )


def check_disks(disks: Sequence[ReplicaDisk]) -> None:
    """Check a replica's disks; FuseDiskError names the one that cannot be."""
    if not disks:
        raise FuseDiskError("a replica needs at least one disk; the source named none")
    seen = set()
    for disk in disks:
        check_disk_name(disk.name)
        if disk.name in seen:
            raise FuseDiskError(f"disk {disk.name!r} is named twice; give each disk its own name")
        seen.add(disk.name)
        if not 0 < disk.size <= _MAX_DISK_SIZE:
            raise FuseDiskError(
                f"disk {disk.name!r} has a size of {disk.size} bytes; it must be 1 to 2^63 - 1"
            )
        check_power_of_two(f"disk {disk.name!r}: chunk size", disk.chunk_size)


def check_power_of_two(what: str, value: int) -> None:
    """Check a chunk or block size in bytes; FuseDiskError if it is none."""
    if not _MIN_CHUNK <= value <= _MAX_CHUNK or value & (value - 1):
        raise FuseDiskError(f"{what} {value} must be a power of two from 4096 to {_MAX_CHUNK}")


def check_text(what: str, value: str) -> None:
    """Check an identifier given by the source; FuseDiskError if it is unfit for a manifest."""
    if not 1 <= len(value) <= 256 or not value.isprintable():
        raise FuseDiskError(f"{what} {value[:64]!r} must be 1 to 256 printable characters")


def check_epoch(epoch: int) -> None:
    """Check the bounds of an epoch; FuseDiskError outside."""
    if not 0 <= epoch <= MAX_EPOCH:
        raise FuseDiskError(f"epoch {epoch} must be 0 to {MAX_EPOCH}")


@contextmanager
def clear_errors(what: str) -> Iterator[None]:
    """Turn an OSError into a FuseDiskError of one line that begins with `what`."""
    try:
        yield
    except OSError as error:
        raise FuseDiskError(f"{what}: {error.strerror or error}") from error
