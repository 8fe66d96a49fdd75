"""The guest during a cutover, as `replicator.cutover` sees it: paused, then gone on here or there.

Who brings the guest back when something dies between its pause and the end of the cutover:

the cutover command     nothing happens to the guest; the sender carries the cutover out
the sender              its child (`replicator.guestkeeper`), by the record beside the images
a sender that hangs     the same, once it misses the beats; `Guest.in_hand` is what it asks later
the child               the sender, by another child
QEMU                    nobody: the guest is gone, and the source is still the disk
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from fusedisk.errors import FuseDiskError, UsageError
from fusedisk.fencing import on_record
from replicator.attendant import Attendant, AttendantDied
from replicator.attending import SILENCE_SECONDS_MAX
from replicator.handover import NotRecorded
from replicator.running import one_error

_CONNECT_SECONDS_MAX = 15.0
_PAUSE_SECONDS_MAX = 35.0
_MOVE_SECONDS_MAX = 86400.0
_RESUME_SECONDS_MAX = 150.0
_SWITCH_SECONDS_MAX = 340.0
_REST_SECONDS = 0.2
# What is left of the memory goes over after the promotion, and is lost if the QEMU there dies then:
# as short as QEMU's own default, however long the guest may be down.
_MEMORY_SECONDS = 0.3
# How long it may take to notice that the guest stands still (replicator.migration polls).
_NOTICE_SECONDS = 0.1

_BEAT_SECONDS = 0.5
_SURE_SECONDS = SILENCE_SECONDS_MAX / 2

Memory = dict[str, Any]


class PausedTooLong(FuseDiskError):
    """The bound on the downtime could not be kept; the guest goes on at the source."""

    exit_code = 3


class Guest:
    """A guest that nobody but hooks pauses."""

    paused_at: float | None = None
    """When it stood still, by trio's clock; None while it runs, or where only hooks know."""
    memory: Memory | None = None
    """What became of its memory, in bytes: ``total``, ``done``, ``rate``."""

    @property
    def in_hand(self) -> bool:
        """Whether nobody lets it go on here because of a record that was not there yet."""
        return True

    def memory_seconds(self, downtime: float) -> float:
        """Of a downtime, what is kept for the memory that goes over after the promotion."""
        return 0.0

    def seconds(self, downtime: float) -> float:
        """What a guest adds to the time that its disks take, at most."""
        return 0.0

    async def pause(self, meanwhile: Callable[[], Awaitable[None]], downtime: float) -> None:
        """Return once the guest stands still.

        Memory that moves first takes its time: ``meanwhile`` is called again and again until then,
        and is cut short ``downtime`` seconds after the pause. Raises FuseDiskError.
        """

    async def resume(self) -> None:
        """Let it run here again, if it ran before. Raises FuseDiskError."""

    async def switch(self) -> None:
        """The replica is the disk: where its memory moves, let it go on there.

        Raises FuseDiskError.
        """


class QemuGuest(Guest):
    """A guest of QEMU; with ``uri`` its memory moves to the QEMU that waits there."""

    def __init__(self, qmp: str, uri: str | None, images: list[Path], log: Path) -> None:
        self._qmp, self._uri, self._images = qmp, uri, images
        self._child = Attendant("replicator.guestkeeper", log)
        self._ran: bool | None = None
        self._touched = False
        self._beaten_at: float | None = None
        self._late = False

    @property
    def child_pid(self) -> int | None:
        """The process that holds the monitor."""
        return self._child.pid

    async def connect(self) -> None:
        """Take hold of the monitor, with a child of ours. Raises FuseDiskError."""
        await self._child.start()
        answer = await self._child.ask(
            "connect",
            _CONNECT_SECONDS_MAX,
            qmp=self._qmp,
            images=[str(image) for image in self._images],
            moves=self._uri is not None,
            ran=self._ran,
        )
        self._ran = answer["ran"]

    @property
    def in_hand(self) -> bool:
        """See `Guest.in_hand`.

        Invariant: a child that misses the beats reads the record after `_SURE_SECONDS`, so it finds
        what was recorded before this was asked. Once late is late for good: it may have acted.
        """
        now = trio.current_time()
        if self._beaten_at is not None and now - self._beaten_at > _SURE_SECONDS:
            self._late = True
        return not self._late

    async def beat(self) -> None:
        """Tell the child again and again that this process lives, until cancelled."""
        while True:
            began = trio.current_time()
            try:
                await self._child.beat()
                if self.in_hand:
                    self._beaten_at = began
            except AttendantDied:
                # One that died in time has let nothing go, and will not.
                if self.in_hand:
                    self._beaten_at = None
            await trio.sleep(_BEAT_SECONDS)

    def memory_seconds(self, downtime: float) -> float:
        """See `Guest.memory_seconds`."""
        return 0.0 if self._uri is None else min(_MEMORY_SECONDS, downtime / 2)

    def seconds(self, downtime: float) -> float:
        """See `Guest.seconds`."""
        memory = self.memory_seconds(downtime)
        return _NOTICE_SECONDS + memory if memory else 0.0

    async def pause(self, meanwhile: Callable[[], Awaitable[None]], downtime: float) -> None:
        """See `Guest.pause`. Raises PausedTooLong when ``meanwhile`` was cut short."""
        self._touched = True
        if self._uri is None:
            self._note_paused(await self._child.ask("pause", _PAUSE_SECONDS_MAX))
            return
        paused, scope = trio.Event(), trio.CancelScope()
        failures: list[Exception] = []

        async def move() -> None:
            try:
                answer = await self._child.ask(
                    *("move", _MOVE_SECONDS_MAX, self._note_memory),
                    uri=self._uri,
                    downtime_ms=max(1, round(1000 * self.memory_seconds(downtime))),
                )
                self._note_paused(answer)
                assert self.paused_at is not None
                scope.deadline = self.paused_at + downtime - self.memory_seconds(downtime)
            except FuseDiskError as error:
                failures.append(error)
                # Nothing waits for a pass that nobody wants any more.
                scope.cancel()
            paused.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(move)
            try:
                with scope:
                    while not paused.is_set():
                        await meanwhile()
                        with trio.move_on_after(_REST_SECONDS):
                            await paused.wait()
            except Exception as error:
                failures.insert(0, error)
            nursery.cancel_scope.cancel()
        if failures:
            raise failures[0]
        if scope.cancelled_caught:
            raise PausedTooLong(
                f"the guest was paused for {downtime:.3f} s before its last writes were sent; "
                "it goes on at the source, try again with a larger --max-downtime"
            )

    async def resume(self) -> None:
        """See `Guest.resume`."""
        if self._touched:
            await self._insist("resume", _RESUME_SECONDS_MAX)

    async def switch(self) -> None:
        """See `Guest.switch`."""
        if self._uri is not None:
            await self._insist("switch", _SWITCH_SECONDS_MAX)

    async def let_go(self) -> None:
        """End the child; the guest stays as it is."""
        await self._child.dismiss()

    async def _insist(self, what: str, seconds: float) -> None:
        """Have it done, by another child if this one was killed."""
        try:
            await self._child.ask(what, seconds)
        except AttendantDied:
            await self._child.dismiss()
            await self.connect()
            await self._child.ask(what, seconds)

    def _note_paused(self, answer: dict[str, Any]) -> None:
        # CLOCK_MONOTONIC is the same in both processes; trio's clock starts anywhere.
        self.paused_at = trio.current_time() - (time.monotonic() - answer["paused_at"])
        if "memory" in answer:
            self._note_memory(answer["memory"])

    def _note_memory(self, memory: Memory) -> None:
        self.memory = memory


@asynccontextmanager
async def held_guest(
    qmp: str | None, uri: str | None, images: list[Path], log: Path
) -> AsyncIterator[Guest]:
    """The guest of a cutover, which goes on here if the block fails before anything is on record.

    Raises FuseDiskError if it cannot be reached, or not be resumed.
    """
    if qmp is None:
        yield Guest()
        return
    guest = QemuGuest(qmp, uri, images, log)
    try:
        beating = trio.CancelScope(shield=True)

        async def beat() -> None:
            with beating:
                await guest.beat()

        with one_error():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(beat)
                try:
                    await guest.connect()
                    try:
                        yield guest
                    except BaseException as error:
                        with trio.CancelScope(shield=True):
                            await _roll_back(guest, images, error)
                        raise
                finally:
                    beating.cancel()
    finally:
        await guest.let_go()


async def _roll_back(guest: Guest, images: list[Path], cause: BaseException) -> None:
    # Invariant: with *committing* or *fenced* on record the other side may be the disk, and a guest
    # that goes on there must not go on here. In a thread: the disk may be one that hangs.
    if not isinstance(cause, NotRecorded) and await trio.to_thread.run_sync(on_record, images):
        return
    try:
        await guest.resume()
    except FuseDiskError as error:
        raise FuseDiskError(
            f"{cause}; nothing was promoted, but the guest could not be resumed: {error}; "
            "resume it with 'cont' in QEMU's monitor"
        ) from None


def check_options(qmp: Path | None, uri: str | None) -> str | None:
    """The absolute path of a monitor's socket. Raises UsageError for what cannot work."""
    if uri is not None:
        if qmp is None:
            raise UsageError("--migrate-to needs --qmp SOCKET, the monitor of the running guest")
        kind, _, rest = uri.partition(":")
        if kind not in ("tcp", "unix") or not rest or not uri.isprintable():
            raise UsageError("--migrate-to takes tcp:HOST:PORT or unix:PATH, as QEMU does")
    return None if qmp is None else str(qmp.absolute())
