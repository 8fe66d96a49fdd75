"""When a sender verifies its replica: on request, on a schedule, and only while it follows."""

import logging
import time
from collections.abc import Callable

import trio

from fusedisk.errors import FuseDiskError
from fusedisk.replicas import Verified
from replicator.progress import Progress
from replicator.sender import Session
from replicator.settings import SenderSettings
from replicator.source import Source
from replicator.verify import Findings, Verification, VerifyOptions

log = logging.getLogger("replicator.sender")

_POLL_SECONDS = 60.0


class Verifier:
    """One comparison at a time, done between passes by the task that converses."""

    def __init__(
        self,
        source: Source,
        settings: SenderSettings,
        last: Verified | None,
        *,
        refuse: Callable[[], None],
        changed: Callable[[], None],
    ) -> None:
        """``refuse`` raises FuseDiskError where the replica cannot be verified now.

        ``changed`` is told when there is something to do, and when it has ended.
        """
        self._source, self._settings = source, settings
        self._refuse, self._changed = refuse, changed
        self._verification: Verification | None = None
        self.last = last
        """The outcome of the last one that was finished."""

    @property
    def progress(self) -> Progress | None:
        """That of the comparison under way."""
        return None if self._verification is None else self._verification.progress

    async def verify(self, options: VerifyOptions) -> Findings:
        """Compare the replica by hash between passes, as soon as it follows.

        Raises FuseDiskError where that cannot be, or the link is lost.
        """
        if self._verification is not None:
            raise FuseDiskError("another verify of this replica is under way; let it finish")
        self._refuse()
        self._verification = Verification(self._source, options)
        self._changed()
        try:
            found = await self._verification.result()
            self.last = found.summary(time.time())
        finally:
            self._verification = None
            self._changed()
        return found

    async def work(self, session: Session, until: float, wake: trio.Event) -> None:
        """Take steps of the one under way; see Verification.work."""
        if self._verification is not None:
            await self._verification.work(session, until, wake)

    def fail(self, error: FuseDiskError) -> None:
        """End the one under way without an outcome."""
        if self._verification is not None:
            self._verification.fail(error)

    async def now_and_then(self, follows: Callable[[], bool]) -> None:
        """Verify on the schedule of the settings, until cancelled; return where there is none."""
        every = self._settings.verify_every
        while every is not None:
            await trio.sleep(min(_POLL_SECONDS, every))
            last = self.last.at if self.last is not None else 0.0
            # A clock that was set back does not put it off for longer than asked for.
            if not follows() or 0 <= time.time() - last < every:
                continue
            try:
                found = await self.verify(VerifyOptions(self._settings.verify_bandwidth))
            except FuseDiskError as error:
                log.warning("the replica was not verified: %s", error)
                continue
            if found.outcome == "differs":
                log.error(
                    "the replica differs in %d bytes; run 'replicator verify --repair'",
                    found.differing_bytes,
                )
