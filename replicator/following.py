"""A sender's life: connect, synchronise, follow; and again after every loss of the link."""

import fcntl
import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import trio

from fusedisk.errors import FuseDiskError
from fusedisk.state import write_durably
from replicator.address import Address
from replicator.cutover import CutoverOptions, NotConverged, OutcomeUnknown, cut_over
from replicator.link import Link, LinkLost
from replicator.messages import RemoteProtocolError
from replicator.progress import Progress
from replicator.sender import Session
from replicator.source import Source
from replicator.transport.connecting import connected
from replicator.transport.settings import Settings

log = logging.getLogger("replicator.sender")

Outcome: TypeAlias = dict[str, Any] | FuseDiskError

_RETRY_SECONDS_MIN, _RETRY_SECONDS_MAX = 0.5, 30.0
_KEEPALIVE_SECONDS = 5.0


class ReplicaRecord(msgspec.Struct, forbid_unknown_fields=True):
    """What the source remembers of a replica; the target's own record decides."""

    name: str
    address: str
    generation: str | None = None
    epoch: int | None = None


def lock_replica(state: Path, name: str) -> int:
    """Make sure that one sender serves a replica. Raises FuseDiskError where one runs."""
    folder = state / "replicas"
    folder.mkdir(mode=0o700, exist_ok=True)
    fd = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise FuseDiskError(
            f"replica {name} has a running sender; stop it first, or choose another --name"
        ) from None
    return fd


class Follower:
    """Keeps one replica up to date until told to stop."""

    def __init__(
        self,
        source: Source,
        name: str,
        address: Address,
        settings: Settings,
        *,
        rpo_seconds: float,
        once: bool,
    ) -> None:
        self._source, self._name, self._address = source, name, address
        self._settings = settings
        self._rpo_seconds, self._once = rpo_seconds, once
        self._instance = str(uuid.uuid4())
        self._session: Session | None = None
        self._retry_seconds = _RETRY_SECONDS_MIN
        self.state = "connecting"
        self.error: str | None = None
        self.committed: int | None = None
        self._wake = trio.Event()
        self._cutover: tuple[CutoverOptions, trio.MemorySendChannel[Outcome]] | None = None
        self.on_change: Callable[[], None] = lambda: None

    async def run(self) -> None:
        """Replicate. Returns with ``once`` when nothing is left to send, or when unmounted.

        Raises FuseDiskError for what trying again would not mend.
        """
        while True:
            try:
                self._set_state("connecting")
                await self._one_link()
                return
            except (LinkLost, OSError, trio.TooSlowError) as error:
                self.error = str(error) or "the receiver does not answer"
            except RemoteProtocolError as error:
                raise FuseDiskError(f"the receiver at {self._address} is none: {error}") from None
            if not self._source.mounted:
                return
            self._set_state("waiting")
            log.warning("%s; trying again in %.1f s", self.error, self._retry_seconds)
            await trio.sleep(self._retry_seconds)
            self._retry_seconds = min(2 * self._retry_seconds, _RETRY_SECONDS_MAX)

    async def _one_link(self) -> None:
        async with connected(self._address, self._settings) as stream:
            await self._converse(Link(stream, "sender"))

    async def _converse(self, link: Link) -> None:
        session = self._session = Session(self._source, link, self._name, self._instance)
        try:
            opened = await session.open()
            self.error = None
            self._retry_seconds = _RETRY_SECONDS_MIN
            session.on_phase = self._set_state
            await session.synchronise(opened)
            if session.cause:
                log.info("compared the whole replica, because %s", session.cause)
            await self._note_commit(session)
            await self._follow(session, link)
        finally:
            await session.goodbye()
            await link.close()

    async def _follow(self, session: Session, link: Link) -> None:
        self._set_state("following")
        while self._source.mounted:
            assert session.committed is not None
            if self._cutover is not None:
                await self._do_cutover(session, link)
                return
            if self._source.changed_chunks(session.committed):
                await session.next_pass()
                await self._note_commit(session)
                if not self._once:
                    await self._rest(self._rpo_seconds / 2)
            elif self._once:
                return
            else:
                await session.ping()
                await self._rest(min(self._rpo_seconds / 2, _KEEPALIVE_SECONDS))

    async def _rest(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self._wake.wait()
        self._wake = trio.Event()

    async def cut_over(self, options: CutoverOptions) -> dict[str, Any]:
        """Cut over as soon as the replica follows; see replicator.cutover.cut_over for errors."""
        if self._cutover is not None:
            raise FuseDiskError("another cutover is under way")
        answer, answers = trio.open_memory_channel[Outcome](1)
        self._cutover = options, answer
        self._wake.set()
        try:
            outcome: Outcome | None = None
            with trio.move_on_after(options.timeout_seconds):
                outcome = await answers.receive()
            if outcome is None and self.state in ("cutover", "promoted"):
                # It has begun and keeps its own bounds; leaving now would lose the answer.
                outcome = await answers.receive()
            if outcome is None:
                raise NotConverged(
                    f"the replica is still {self.state} after {options.timeout_seconds:g} s; "
                    "the guest goes on at the source"
                )
        finally:
            self._cutover = None
        if isinstance(outcome, FuseDiskError):
            raise outcome
        return outcome

    async def _do_cutover(self, session: Session, link: Link) -> None:
        assert self._cutover is not None
        options, answer = self._cutover
        self._set_state("cutover")
        try:
            result = await cut_over(
                self._source, session, link, self._name, str(self._address), options
            )
        except OutcomeUnknown as error:
            answer.send_nowait(error)
            self._set_state("failed")
            # The one who asked has to hear it before this process ends.
            await trio.sleep(0.5)
            raise
        except (FuseDiskError, LinkLost, OSError, trio.TooSlowError) as error:
            told = (
                error
                if isinstance(error, FuseDiskError)
                else FuseDiskError(
                    f"{error or 'the receiver does not answer'}; the guest goes on at the source"
                )
            )
            answer.send_nowait(told)
            self._cutover = None
            # A pass may have been cut short: only a new link is in a known state.
            raise LinkLost(f"the cutover was rolled back: {told}") from None
        self.committed = session.committed
        self._set_state("promoted")
        answer.send_nowait(result)
        await trio.sleep(0.5)

    async def _note_commit(self, session: Session) -> None:
        self.committed = session.committed
        record = ReplicaRecord(
            self._name, str(self._address), self._source.record.generation, session.committed
        )
        path = self._source.state / "replicas" / f"{self._name}.json"
        await trio.to_thread.run_sync(write_durably, path, msgspec.json.encode(record))
        self.on_change()

    def _set_state(self, state: str) -> None:
        self.state = state
        log.info("%s", state)
        self.on_change()

    @property
    def progress(self) -> Progress:
        """Progress of the current phase."""
        return self._session.progress if self._session else Progress()

    def report(self) -> dict[str, Any]:
        """This replica's entry in ``replicator status --json``."""
        session = self._session
        lag = self._source.changed_chunks(self.committed or 0)
        return {
            "name": self._name,
            "address": str(self._address),
            "state": self.state,
            "progress": self.progress.report(),
            "lag": {"chunks": lag, "bytes": sum(self._source.changed_bytes(self.committed or 0))},
            "epoch": {"current": self._source.control.epoch, "committed": self.committed},
            "sent": {
                "data_bytes": session.data_bytes if session else 0,
                "zero_bytes": session.zero_bytes if session else 0,
            },
            "error": self.error,
            "sender": {"pid": os.getpid()},
        }
