"""Signals that end a command: noted, never raised in the middle of a mount."""

import contextlib
import os
import signal
import subprocess
from types import FrameType

from fusedisk.errors import FuseDiskError

_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Takes SIGINT, SIGTERM and SIGHUP from its creation on, for the rest of the process.

    A KeyboardInterrupt between the start of the keeper and its answer would leave a mount that
    nobody was told of; so the signal is noted, and looked at where the mount can be taken back.
    Main thread only.
    """

    def __init__(self) -> None:
        self._told = 0
        self._keeper = -1
        for number in _STOP:
            # nohup: what is ignored stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)

    @property
    def told(self) -> bool:
        """Whether a signal came."""
        return self._told != 0

    def check(self) -> None:
        """Raises FuseDiskError where a signal came."""
        if self._told:
            name = signal.Signals(self._told).name
            raise FuseDiskError(f"interrupted by {name}; nothing is mounted")

    def pass_to(self, keeper: subprocess.Popen[bytes]) -> None:
        """From now on a signal means: unmount if nothing uses the disks."""
        # A descriptor, because the id may be another process once wait() has reaped this one.
        self._keeper = os.pidfd_open(keeper.pid)
        if self._told:
            self._send()

    def _note(self, number: int, _: FrameType | None) -> None:
        self._told = number
        if self._keeper >= 0:
            self._send()

    def _send(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._keeper, signal.SIGTERM)
