"""The replicas of a mount, as the source knows them: notes of their senders, and how far each lags.

    replicas/NAME.json   what the sender of NAME noted last (ReplicaRecord)
    replicas/NAME.lock   flock held by the sender that runs
    replicas/NAME.sock   control socket of the sender that runs (fusedisk.controlclient)
    replicas/NAME.log    log of a sender in the background
    replicas/NAME.before a cutover's --before was begun (replicator.hooks)

The notes are for status and for people: what a replica really holds, its own record decides.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec

from fusedisk.changemap import ChangeMap, Control
from fusedisk.controlclient import SILENT, ask_sender
from fusedisk.errors import FuseDiskError
from fusedisk.state import MountRecord, read_mount_record, write_durably
from fusedisk.unsettled import unsettled

_RECORD_BYTES_MAX = 1 << 16
_STATUS_SECONDS_MAX = 2.0
_ASKED_AT_ONCE_MAX = 16


class Sent(msgspec.Struct, forbid_unknown_fields=True):
    """What one sender process sent: bytes on the wire, and bytes of disk as data and as zeros."""

    bytes: int = 0
    data_bytes: int = 0
    zero_bytes: int = 0


class Verified(msgspec.Struct, forbid_unknown_fields=True):
    """What the last comparison of a replica came to, and its time on the wall."""

    at: float
    outcome: str
    epoch: int
    compared_bytes: int
    differing_bytes: int
    repaired_bytes: int


class Root(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A digest over the passes up to ``epoch`` (replicator.chain); ``whole``: from a full copy."""

    value: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    epoch: int
    whole: bool


class ReplicaRecord(msgspec.Struct, forbid_unknown_fields=True):
    """Contents of NAME.json. ``closed_at`` is the wall clock when ``epoch`` was closed."""

    name: str
    address: str
    generation: str | None = None
    epoch: int | None = None
    closed_at: float | None = None
    state: str = "connecting"
    sent: Sent = msgspec.field(default_factory=Sent)
    max_downtime_ms: int | None = None
    verified: Verified | None = None
    root: Root | None = None


class Lag(NamedTuple):
    """What a replica lacks."""

    chunks: int
    bytes: int


def lag_since(maps: Sequence[ChangeMap], epoch: int) -> Lag:
    """What was written after ``epoch``; bytes are rounded up to chunks."""
    counts = [changes.count(epoch) for changes in maps]
    sizes = (min(n * m.chunk_size, m.size) for n, m in zip(counts, maps, strict=True))
    return Lag(sum(counts), sum(sizes))


def write_record(state: Path, record: ReplicaRecord) -> None:
    """Replace the note on a replica. Raises OSError."""
    write_durably(state / "replicas" / f"{record.name}.json", msgspec.json.encode(record))


def read_record(state: Path, name: str) -> ReplicaRecord | None:
    """The note on a replica, None where there is none. Raises FuseDiskError for a damaged one."""
    file = state / "replicas" / f"{name}.json"
    try:
        with file.open("rb") as stream:
            content = stream.read(_RECORD_BYTES_MAX)
        record = msgspec.json.decode(content, type=ReplicaRecord)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise FuseDiskError(f"{file} is damaged ({error}); remove it") from None
    if record.name != name:
        raise FuseDiskError(f"{file} is of another replica; remove it")
    return record


def replica_names(state: Path) -> list[str]:
    """The replicas that have a note or a sender."""
    folder = state / "replicas"
    return sorted({file.stem for kind in ("*.json", "*.sock") for file in folder.glob(kind)})


def committed_epoch(record: ReplicaRecord | None, mount: MountRecord) -> int | None:
    """The last epoch that the replica has, None where it has none of this generation."""
    if record is None or record.generation != mount.generation:
        return None
    return record.epoch


def reports(
    state: Path, mount: MountRecord, maps: Sequence[ChangeMap], epoch: int
) -> list[dict[str, Any]]:
    """An entry of ``status --json`` for each replica, from its sender or from its record."""
    names = replica_names(state)
    if not names:
        return []

    def ask(name: str) -> dict[str, Any] | None:
        return ask_sender(state, name, "status", _STATUS_SECONDS_MAX)

    with ThreadPoolExecutor(min(len(names), _ASKED_AT_ONCE_MAX)) as pool:
        answers = list(pool.map(ask, names))
    found = []
    cutover = unsettled(mount)
    for name, answer in zip(names, answers, strict=True):
        if answer is None or answer.get("error") == SILENT:
            answer = _noted(state, name, mount, maps, epoch, answer)
        if answer is not None:
            if not answer.get("cutover") and cutover and cutover["replica"] in (name, None):
                answer["cutover"] = cutover
            found.append(answer)
    return found


def read_reports(state: Path) -> list[dict[str, Any]]:
    """The same, of a mount's state directory. Raises FuseDiskError where it is damaged."""
    mount = read_mount_record(state)
    maps = open_maps(state, mount)
    try:
        control = Control(state / "control")
        epoch = control.epoch
        control.close()
        return reports(state, mount, maps, epoch)
    except (OSError, ValueError) as error:
        raise FuseDiskError(f"the state in {state} is damaged: {error}") from None
    finally:
        for changes in maps:
            changes.close()


def _noted(
    state: Path,
    name: str,
    mount: MountRecord,
    maps: Sequence[ChangeMap],
    epoch: int,
    silent: dict[str, Any] | None,
) -> dict[str, Any] | None:
    error: str | None = None
    try:
        record = read_record(state, name)
    except FuseDiskError as damage:
        record, error = ReplicaRecord(name, ""), str(damage)
    if record is None:
        # A socket left behind by a sender that was killed before it noted anything.
        if silent is None:
            return None
        record = ReplicaRecord(name, "")
    committed = committed_epoch(record, mount)
    lag = lag_since(maps, committed or 0)
    seconds: float | None = 0.0
    if lag.chunks or committed is None:
        seconds = max(0.0, time.time() - record.closed_at) if record.closed_at else None
    todo = [
        min(changes.count(committed) * changes.chunk_size, changes.size)
        if committed is not None
        else changes.size
        for changes in maps
    ]
    return {
        "name": name,
        "address": record.address,
        "state": "stopped" if silent is None else record.state,
        "progress": {
            "phase": None,
            **progress_entry(sum(todo), 0, 0.0, finished=not any(todo)),
        },
        "disks": [
            {"name": disk.name, **disk_entry(left, 0, finished=not left)}
            for disk, left in zip(mount.disks, todo, strict=True)
        ],
        "lag": {"bytes": lag.bytes, "chunks": lag.chunks, "seconds": seconds},
        "epoch": {"current": epoch, "committed": committed},
        "sent": msgspec.to_builtins(record.sent),
        "rpo": None,
        "verify": {"every": None, "last": msgspec.to_builtins(record.verified)},
        "cause": None,
        "forecast": None,
        "cutover": None,
        "freeze": None,
        "capture": None,
        "given_up": None,
        "error": error or (SILENT if silent else None),
        "sender": silent["sender"] if silent else None,
    }


def lagging(state: Path) -> list[tuple[str, Lag | None]]:
    """The replicas that are behind, by their notes; None for one without a committed epoch."""
    names = replica_names(state)
    if not names:
        return []
    mount = read_mount_record(state)
    maps = open_maps(state, mount)
    found: list[tuple[str, Lag | None]] = []
    for name in names:
        try:
            committed = committed_epoch(read_record(state, name), mount)
        except FuseDiskError:
            committed = None
        lag = None if committed is None else lag_since(maps, committed)
        if lag is None or lag.chunks:
            found.append((name, lag))
    for changes in maps:
        changes.close()
    return found


def disk_entry(total: int, done: int, *, finished: bool) -> dict[str, int | float]:
    """Bytes to do and done, and percent: cut, never rounded up, and 100 only when finished."""
    done = min(done, total)
    part = min(1000 * done // total / 10, 99.9) if total else 0.0
    return {"total": total, "done": done, "percent": 100.0 if finished else part}


def progress_entry(
    total: int, done: int, rate: float, *, finished: bool
) -> dict[str, int | float | None]:
    """A ``progress`` object: bytes, percent, bytes a second, seconds left or null."""
    eta: float | None = 0.0 if finished else None
    if not finished and rate > 0:
        eta = max(0, total - done) / rate
    return {**disk_entry(total, done, finished=finished), "rate": rate, "eta": eta}


def total_entry(entries: Sequence[dict[str, Any]]) -> dict[str, int | float | None]:
    """The progress of all replicas together."""
    parts = [entry["progress"] for entry in entries]
    return progress_entry(
        sum(p["total"] for p in parts),
        sum(p["done"] for p in parts),
        sum(p["rate"] for p in parts),
        finished=all(p["percent"] >= 100 for p in parts),
    )


def open_maps(state: Path, mount: MountRecord) -> list[ChangeMap]:
    """The change maps of a mount, to look at. Raises FuseDiskError where one cannot be read."""
    maps: list[ChangeMap] = []
    try:
        for index in range(len(mount.disks)):
            maps.append(ChangeMap(state / f"{index}.map"))
    except (OSError, ValueError) as error:
        for changes in maps:
            changes.close()
        raise FuseDiskError(f"the state in {state} is damaged: {error}") from None
    return maps
