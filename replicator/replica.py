"""One replica on the target: its manifest, its disk images, and what may be done to them when."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import msgspec
import xxhash

from fusedisk.errors import FuseDiskError
from fusedisk.extents import data_extents

if TYPE_CHECKING:
    from replicator.store import Store

PRIVATE_DIRECTORY = ".fusedisk"
MANIFEST_VERSION = 1
MAX_ABORTED_TOKENS = 16
MAX_EPOCH = 2**32 - 1
_MAX_DISK_SIZE = 2**63 - 1
_MAX_MANIFEST_BYTES = 16 << 20
_MIN_CHUNK, _MAX_CHUNK = 4096, 16 << 20
_IO_BYTES = 1 << 20
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2

State = Literal["filling", "following", "promoted"]
Status = Literal["new", "existing"]
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Epoch = Annotated[int, msgspec.Meta(ge=0, le=MAX_EPOCH)]


class ReplicaDisk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A disk of a replica: its name, and its size and its source's chunk size in bytes."""

    name: str
    size: int
    chunk_size: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is durably known about a replica.

    (generation, epoch) is the last point committed, or None twice if the history is unknown.
    While `applying` is true the images are on the way from that point to a later one.
    """

    version: int
    source_id: _Text
    generation: _Text | None
    epoch: _Epoch | None
    state: State
    applying: bool
    token: _Text | None
    aborted_tokens: Annotated[list[_Text], msgspec.Meta(max_length=MAX_ABORTED_TOKENS)]
    disks: Annotated[list[ReplicaDisk], msgspec.Meta(min_length=1)]


class HashSegment(NamedTuple):
    """A range of a disk in bytes: all zeros (a hole), or one 16-byte digest for each block."""

    offset: int
    length: int
    zero: bool
    digests: bytes


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


def _check_disks(disks: Sequence[ReplicaDisk]) -> None:
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
        _check_power_of_two(f"disk {disk.name!r}: chunk size", disk.chunk_size)


def _check_power_of_two(what: str, value: int) -> None:
    if not _MIN_CHUNK <= value <= _MAX_CHUNK or value & (value - 1):
        raise FuseDiskError(f"{what} {value} must be a power of two from 4096 to {_MAX_CHUNK}")


def _check_text(what: str, value: str) -> None:
    if not 1 <= len(value) <= 256 or not value.isprintable():
        raise FuseDiskError(f"{what} {value[:64]!r} must be 1 to 256 printable characters")


def _check_epoch(epoch: int) -> None:
    if not 0 <= epoch <= MAX_EPOCH:
        raise FuseDiskError(f"epoch {epoch} must be 0 to {MAX_EPOCH}")


@contextmanager
def _clear_errors(what: str) -> Iterator[None]:
    """Turn an OSError into a FuseDiskError of one line that begins with `what`."""
    try:
        yield
    except OSError as error:
        raise FuseDiskError(f"{what}: {error.strerror or error}") from error


def manifest_path(directory: Path) -> Path:
    """Return where the replica in `directory` keeps its manifest."""
    return directory / PRIVATE_DIRECTORY / "manifest.json"


def read_manifest(directory: Path) -> Manifest | None:
    """Read and check the manifest of the replica in `directory`; None if there is none.

    Raises FuseDiskError if it cannot be read, is damaged, or is of another version.
    """
    path = manifest_path(directory)
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FuseDiskError(f"cannot read manifest {path}: {error.strerror}") from error
    damaged = f"manifest {path} is damaged"
    remedy = "restore it, or remove it to adopt the images with unknown history"
    if len(raw) > _MAX_MANIFEST_BYTES:
        raise FuseDiskError(f"{damaged} (larger than {_MAX_MANIFEST_BYTES} bytes); {remedy}")
    try:
        # The version comes first: another version's fields mean nothing to this one's checks.
        version = msgspec.json.decode(raw, type=_VersionOnly).version
        if version == MANIFEST_VERSION:
            manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FuseDiskError(f"{damaged} ({error}); {remedy}") from error
    if version != MANIFEST_VERSION:
        raise FuseDiskError(
            f"manifest {path} has version {version}, only {MANIFEST_VERSION} is known here; "
            "use the release that wrote it"
        )
    try:
        _check_disks(manifest.disks)
    except FuseDiskError as error:
        raise FuseDiskError(f"{damaged} ({error}); {remedy}") from error
    contradiction = None
    if (manifest.generation is None) != (manifest.epoch is None):
        contradiction = "generation and epoch must be there together"
    elif manifest.state != "filling" and manifest.epoch is None:
        contradiction = f"state {manifest.state} without an epoch"
    elif (manifest.state == "promoted") != (manifest.token is not None):
        contradiction = "a token belongs to a promoted replica, and only to one"
    elif manifest.state == "promoted" and manifest.applying:
        contradiction = "promoted and applying at once"
    if contradiction is not None:
        raise FuseDiskError(f"{damaged} ({contradiction}); {remedy}")
    return manifest


class _VersionOnly(msgspec.Struct):
    version: int


def _fsync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_manifest(directory: Path, manifest: Manifest) -> None:
    """Replace the manifest; it is durable when this returns, and the old or new one at any time."""
    path = manifest_path(directory)
    temporary = path.with_name(path.name + ".new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        _write_all(fd, msgspec.json.format(msgspec.json.encode(manifest)) + b"\n", 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.replace(path)
    _fsync_path(path.parent)


def _write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        done = os.pwrite(fd, view, offset)
        view = view[done:]
        offset += done


_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate64 if hasattr(_libc, "fallocate64") else _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_fallocate.restype = ctypes.c_int


def _punch_hole(fd: int, offset: int, length: int) -> None:
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    while _fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def _zero_range(fd: int, offset: int, length: int) -> None:
    try:
        _punch_hole(fd, offset, length)
        return
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    zeros = memoryview(bytes(min(length, _IO_BYTES)))
    end = offset + length
    while offset < end:
        step = min(end - offset, len(zeros))
        _write_all(fd, zeros[:step], offset)
        offset += step


def _open_image(path: Path, size: int) -> int:
    try:
        # A symbolic link could lead writes out of the store; a FIFO could block the open.
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(path, flags)
    except FileNotFoundError:
        raise FuseDiskError(
            f"image {path} is missing; put it back, or replicate under another name"
        ) from None
    except OSError as error:
        raise FuseDiskError(f"cannot open image {path}: {error.strerror}") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise FuseDiskError(f"image {path} is not a regular file; move it away")
    if status.st_size != size:
        os.close(fd)
        raise FuseDiskError(
            f"image {path} has {status.st_size} bytes but the disk has {size}; restore the image, "
            "or replicate under another name"
        )
    return fd


def _open_images(directory: Path, disks: Sequence[ReplicaDisk]) -> list[int]:
    fds: list[int] = []
    try:
        for disk in disks:
            fds.append(_open_image(directory / disk.name, disk.size))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds


def _create(store: Store, directory: Path, manifest: Manifest) -> None:
    """Make a whole replica under a private name and rename it: a crash leaves none or all of it."""
    staging = store.path / f".new-{directory.name}"
    try:
        if staging.exists():
            shutil.rmtree(staging)
        (staging / PRIVATE_DIRECTORY).mkdir(parents=True)
        for disk in manifest.disks:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(staging / disk.name, flags, 0o600)
            try:
                os.ftruncate(fd, disk.size)
                os.fsync(fd)
            finally:
                os.close(fd)
        _write_manifest(staging, manifest)
        _fsync_path(staging)
        # Succeeds over an empty directory and over nothing, never over somebody's files.
        staging.rename(directory)
        _fsync_path(store.path)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise FuseDiskError(f"cannot create replica {directory}: {error.strerror}") from error


def _compare_with_manifest(
    name: str, manifest: Manifest, source_id: str, disks: Sequence[ReplicaDisk]
) -> None:
    """Refuse a source that this replica is not a copy of."""
    if manifest.source_id != source_id:
        raise FuseDiskError(
            f"replica {name!r} belongs to source {manifest.source_id!r}, not to {source_id!r}; "
            "replicate under another name"
        )
    if manifest.state == "promoted":
        raise FuseDiskError(
            f"replica {name!r} is promoted, its images are no longer a copy; "
            "replicate under another name"
        )
    have = {disk.name: disk.size for disk in manifest.disks}
    want = {disk.name: disk.size for disk in disks}
    if have.keys() != want.keys():
        raise FuseDiskError(
            f"replica {name!r} has disks {', '.join(sorted(map(repr, have)))} but the source has "
            f"{', '.join(sorted(map(repr, want)))}; replicate under another name"
        )
    for disk, size in want.items():
        if have[disk] != size:
            raise FuseDiskError(
                f"disk {disk!r} of replica {name!r} has {have[disk]} bytes but the source's has "
                f"{size}; replicate under another name"
            )


class Replica:
    """An open replica. All methods may be called from any thread.

    Reads and writes of images run side by side; a change of the manifest waits for those under way
    and keeps new ones out, so that a commit covers exactly the writes that returned before it, and
    no descriptor is closed (and its number reused) under a write.

    Every method raises FuseDiskError when it refuses, and when the filesystem reports an error.
    """

    def __init__(
        self, store: Store, directory: Path, manifest: Manifest, fds: list[int], status: Status
    ) -> None:
        """Use `Replica.open` or `Replica.load`; this takes over `fds` and the claimed name."""
        self._store = store
        self._directory = directory
        self._manifest = manifest
        self._fds = fds
        self._condition = threading.Condition()
        self._shared = 0
        self._exclusive = False
        self._closed = False
        self._unusable: str | None = None
        self.status: Status = status
        """"new" if `open` created the replica, else "existing"."""

    @classmethod
    def open(cls, store: Store, name: str, source_id: str, disks: Sequence[ReplicaDisk]) -> Replica:
        """Open the replica `name` of the source's `disks`, in the source's order of disks.

        Creates it if there is none; adopts images without a manifest, as of unknown history.
        Raises FuseDiskError, with nothing changed, if the name or a disk is invalid, the replica
        is in use, promoted, damaged or of another source, or if disks, sizes or images differ.
        """
        directory = store.replica_path(name)
        _check_text("source id", source_id)
        _check_disks(disks)
        fresh = Manifest(
            version=MANIFEST_VERSION,
            source_id=source_id,
            generation=None,
            epoch=None,
            state="filling",
            applying=False,
            token=None,
            aborted_tokens=[],
            disks=list(disks),
        )
        with store.claiming(name):
            status: Status = "existing"
            with _clear_errors(f"cannot open replica {directory}"):
                is_new = not os.path.lexists(directory) or not any(directory.iterdir())
            if is_new:
                _create(store, directory, fresh)
                status = "new"
            manifest = read_manifest(directory)
            if manifest is not None:
                _compare_with_manifest(name, manifest, source_id, disks)
            fds = _open_images(directory, disks)
            try:
                with _clear_errors(f"cannot open replica {directory}"):
                    if manifest is None:
                        (directory / PRIVATE_DIRECTORY).mkdir(exist_ok=True)
                        _write_manifest(directory, fresh)
                        _fsync_path(directory)
                        manifest = fresh
                    elif manifest.disks != list(disks):
                        # Only order or chunk sizes differ, and neither says anything of the data.
                        manifest = msgspec.structs.replace(manifest, disks=list(disks))
                        _write_manifest(directory, manifest)
                    else:
                        _settle_manifest(directory)
                return cls(store, directory, manifest, fds, status)
            except BaseException:
                for fd in fds:
                    os.close(fd)
                raise

    @classmethod
    def load(cls, store: Store, name: str) -> Replica:
        """Open an existing replica in whatever state, as resolving a lost cutover answer needs.

        The images of a promoted replica are left alone: nothing reads or writes them here.
        Raises FuseDiskError if it does not exist, is in use or damaged, or lacks an image.
        """
        directory = store.replica_path(name)
        with store.claiming(name):
            manifest = read_manifest(directory)
            if manifest is None:
                raise FuseDiskError(f"no replica {name!r} in store {store.path}; check the name")
            # Promoted images belong to their guest, who may have resized or moved them; that must
            # not stand in the way of telling the source that the cutover took place.
            promoted = manifest.state == "promoted"
            fds = [] if promoted else _open_images(directory, manifest.disks)
            try:
                with _clear_errors(f"cannot open replica {directory}"):
                    _settle_manifest(directory)
                return cls(store, directory, manifest, fds, "existing")
            except BaseException:
                for fd in fds:
                    os.close(fd)
                raise

    @property
    def name(self) -> str:
        """The replica's name in its store."""
        return self._directory.name

    @property
    def manifest(self) -> Manifest:
        """What is durably recorded; an immutable snapshot."""
        return self._manifest

    def write(self, disk: int, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at byte `offset` of disk number `disk`; durable with `commit`.

        Raises FuseDiskError outside the disk, outside a pass (see `begin`), or on an I/O error.
        """
        data = memoryview(data)
        with self._sharing():
            self._require_changeable()
            fd = self._range(disk, offset, data.nbytes)
            with _clear_errors(f"cannot write to image {self._image(disk)}"):
                _write_all(fd, data, offset)

    def zero(self, disk: int, offset: int, length: int) -> None:
        """Make `length` bytes at byte `offset` of disk number `disk` read as zeros.

        The room is given back where the filesystem can; what is a hole already is not touched.
        Raises FuseDiskError outside the disk, outside a pass (see `begin`), or on an I/O error.
        """
        with self._sharing():
            self._require_changeable()
            fd = self._range(disk, offset, length)
            with _clear_errors(f"cannot zero a range of image {self._image(disk)}"):
                for start, run in data_extents(fd, offset, offset + length):
                    _zero_range(fd, start, run)

    def hashes(
        self, disk: int, offset: int, length: int, seed: int, block: int = 65536
    ) -> list[HashSegment]:
        """Hash `length` bytes at byte `offset` with xxh3_128 and `seed`, per `block` bytes.

        The segments cover the range in order, without gaps, each beginning at a multiple of
        `block`. Only at the end of the disk may a length, and so the last block, fall short of it.
        Raises FuseDiskError outside the disk, for an unaligned range, if promoted, or on an I/O
        error.
        """
        _check_power_of_two("hash block size", block)
        if not 0 <= seed < 2**64:
            raise FuseDiskError(f"hash seed {seed} must be 0 to 2^64 - 1")
        with self._sharing():
            self._require_not_promoted()
            fd = self._range(disk, offset, length)
            end = offset + length
            if offset % block or (end % block and end != self._manifest.disks[disk].size):
                raise FuseDiskError(
                    f"hash range of {length} bytes at {offset} must begin and end at a multiple "
                    f"of {block}, or end with the disk"
                )
            segments = []
            position = offset
            with _clear_errors(f"cannot read image {self._image(disk)}"):
                for start, stop in _block_runs(fd, offset, end, block):
                    if start > position:
                        segments.append(HashSegment(position, start - position, True, b""))
                    digests = _digests(fd, start, stop, seed, block)
                    segments.append(HashSegment(start, stop - start, False, digests))
                    position = stop
            if end > position:
                segments.append(HashSegment(position, end - position, True, b""))
            return segments

    def begin(self, epoch: int) -> None:
        """Record durably that a pass towards `epoch` begins, before its first write.

        A pass that was cut off may be begun again. Raises FuseDiskError if the replica is promoted.
        """
        _check_epoch(epoch)
        with self._excluding():
            self._require_not_promoted()
            if not self._manifest.applying:
                self._record(msgspec.structs.replace(self._manifest, applying=True))

    def commit(self, generation: str, epoch: int) -> None:
        """Make all writes durable, then record that the images are the state at this point.

        Raises FuseDiskError if promoted, if the epoch goes back within its generation, or if the
        filesystem reports an error; after the last, the replica has to be opened again.
        """
        _check_text("generation", generation)
        _check_epoch(epoch)
        with self._excluding():
            self._require_not_promoted()
            last = self._manifest
            if last.generation == generation and last.epoch is not None and epoch < last.epoch:
                raise FuseDiskError(
                    f"replica {self.name!r} holds epoch {last.epoch} and cannot go back to "
                    f"{epoch}; compare the disks again"
                )
            self._sync_images()
            self._record(
                msgspec.structs.replace(
                    last, generation=generation, epoch=epoch, state="following", applying=False
                )
            )

    def promote(self, token: str, epoch: int) -> None:
        """Make the replica authoritative at `epoch` for the cutover `token`; durable on return.

        Repeating it with the same token and epoch changes nothing. Raises FuseDiskError if the
        replica is not at rest at that epoch, the token was aborted, or it is promoted otherwise.
        """
        _check_text("cutover token", token)
        _check_epoch(epoch)
        with self._excluding():
            manifest = self._manifest
            what = f"replica {self.name!r} cannot be promoted"
            if manifest.state == "promoted" and manifest.token != token:
                raise FuseDiskError(
                    f"{what}: another cutover ({manifest.token!r}) already did; "
                    "use the replica as it is"
                )
            if token in manifest.aborted_tokens:
                raise FuseDiskError(f"{what}: cutover {token!r} was aborted; start a new cutover")
            if manifest.epoch != epoch:
                raise FuseDiskError(
                    f"{what}: it holds epoch {manifest.epoch}, not {epoch}; "
                    "replicate once more, then start a new cutover"
                )
            if manifest.state == "promoted":
                return
            if manifest.state != "following":
                raise FuseDiskError(f"{what}: its first fill is not complete; let it finish")
            if manifest.applying:
                raise FuseDiskError(f"{what}: a pass is half applied; replicate until it commits")
            # Promoted implies synced: nothing of ours flushes these images afterwards.
            self._sync_images()
            self._record(msgspec.structs.replace(manifest, state="promoted", token=token))

    def abort(self, token: str) -> None:
        """Record durably that the cutover `token` never promotes this replica.

        The last 16 aborted tokens are kept. Raises FuseDiskError if it was promoted with `token`.
        """
        _check_text("cutover token", token)
        with self._excluding():
            manifest = self._manifest
            if manifest.token == token:
                raise FuseDiskError(
                    f"cutover {token!r} cannot be aborted: replica {self.name!r} is promoted "
                    "with it; go on at the target"
                )
            if token not in manifest.aborted_tokens:
                kept = [*manifest.aborted_tokens, token][-MAX_ABORTED_TOKENS:]
                self._record(msgspec.structs.replace(manifest, aborted_tokens=kept))

    def close(self) -> None:
        """Close the images after the calls under way; nothing is synced. Repeating it is fine."""
        with self._alone():
            if self._closed:
                return
            self._closed = True
            for fd in self._fds:
                # Errors of a write show in fsync, which decides; a close adds nothing.
                with suppress(OSError):
                    os.close(fd)
            self._fds = []
            self._unusable = "is closed"
            self._store.release(self.name)

    def __enter__(self) -> Replica:
        """Return the replica itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the replica."""
        self.close()

    def _image(self, disk: int) -> Path:
        return self._directory / self._manifest.disks[disk].name

    def _range(self, disk: int, offset: int, length: int) -> int:
        """Return the descriptor of `disk` if the range lies within it."""
        if not 0 <= disk < len(self._fds):
            raise FuseDiskError(f"replica {self.name!r} has no disk number {disk}")
        size = self._manifest.disks[disk].size
        if offset < 0 or length < 0 or offset + length > size:
            raise FuseDiskError(
                f"{length} bytes at {offset} are outside disk "
                f"{self._manifest.disks[disk].name!r} of {size} bytes"
            )
        return self._fds[disk]

    def _require_not_promoted(self) -> None:
        if self._manifest.state == "promoted":
            raise FuseDiskError(
                f"replica {self.name!r} is promoted and belongs to its guest; "
                "replicate under another name"
            )

    def _require_changeable(self) -> None:
        self._require_not_promoted()
        # A manifest that names a point must not lie about the images, not even for one write.
        if self._manifest.state == "following" and not self._manifest.applying:
            raise FuseDiskError(f"replica {self.name!r} is at rest; begin a pass before writing")

    def _sync_images(self) -> None:
        for disk, fd in enumerate(self._fds):
            try:
                os.fsync(fd)
            except OSError as error:
                # The kernel reports a lost write once, and may then call the page clean: a second
                # fsync would lie. Dropping the pages makes a later compare see what is on disk.
                self._unusable = "failed to sync; open it again and repeat the pass"
                for each in self._fds:
                    with suppress(OSError):
                        os.posix_fadvise(each, 0, 0, os.POSIX_FADV_DONTNEED)
                raise FuseDiskError(
                    f"cannot sync image {self._image(disk)}: {error.strerror}"
                ) from error

    def _record(self, manifest: Manifest) -> None:
        try:
            _write_manifest(self._directory, manifest)
        except OSError as error:
            # Old or new may be on disk now; only reading it again can tell.
            self._unusable = "failed to record its state; open it again"
            raise FuseDiskError(
                f"cannot write manifest {manifest_path(self._directory)}: {error.strerror}"
            ) from error
        self._manifest = manifest

    def _require_usable(self) -> None:
        if self._unusable is not None:
            raise FuseDiskError(f"replica {self.name!r} {self._unusable}")

    @contextmanager
    def _sharing(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._exclusive)
            self._require_usable()
            self._shared += 1
        try:
            yield
        finally:
            with self._condition:
                self._shared -= 1
                self._condition.notify_all()

    @contextmanager
    def _excluding(self) -> Iterator[None]:
        with self._alone():
            self._require_usable()
            yield

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._exclusive)
            # Set before waiting for the shared ones, so that a stream of them cannot starve this.
            self._exclusive = True
            self._condition.wait_for(lambda: self._shared == 0)
        try:
            yield
        finally:
            with self._condition:
                self._exclusive = False
                self._condition.notify_all()


def _settle_manifest(directory: Path) -> None:
    """Make the manifest just read durable.

    Its writer may have died between rename and sync, and answers are given from what was read.
    """
    path = manifest_path(directory)
    _fsync_path(path)
    _fsync_path(path.parent)


def _block_runs(fd: int, start: int, end: int, block: int) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) runs of whole blocks that hold any data, merged where they touch."""
    pending: tuple[int, int] | None = None
    for offset, length in data_extents(fd, start, end):
        first = offset // block * block
        stop = min(-(-(offset + length) // block) * block, end)
        if pending is not None and first <= pending[1]:
            pending = (pending[0], stop)
            continue
        if pending is not None:
            yield pending
        pending = (first, stop)
    if pending is not None:
        yield pending


def _digests(fd: int, start: int, stop: int, seed: int, block: int) -> bytes:
    digests = bytearray()
    for base in range(start, stop, max(block, _IO_BYTES)):
        data = memoryview(_read_all(fd, min(max(block, _IO_BYTES), stop - base), base))
        for at in range(0, len(data), block):
            digests += xxhash.xxh3_128_digest(data[at : at + block], seed)
    return bytes(digests)


def _read_all(fd: int, length: int, offset: int) -> bytes:
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            raise OSError(errno.EIO, "the image is shorter than the disk")
        data += more
    return data
