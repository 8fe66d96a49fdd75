"""Commands that a cutover runs around the switch, with what is known in their environment.

While a guest may be paused by ``--before`` there is a note of it, `replicas/NAME.before` in the
state directory, with the facts that the hooks are told. Its sender has it, and so has the hook,
locked; a sender that is killed leaves it to the command that waits for the cutover.
"""

import fcntl
import json
import logging
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio

from fusedisk.errors import FuseDiskError

log = logging.getLogger("replicator.hooks")

_OUTPUT_BYTES_MAX = 4096
_ENDING_SECONDS = 5.0
_LOCK_POLL_SECONDS = 0.05


class BeforeNote:
    """The note of one ``--before``, from before it runs until nothing of it has to be undone."""

    def __init__(self, state: Path, name: str) -> None:
        self._path = state / "replicas" / f"{name}.before"
        self.fd = -1

    def write(self, facts: Mapping[str, object]) -> None:
        """Note that the hook begins; `fd` is for it to inherit. Raises FuseDiskError."""
        fresh = self._path.with_name(self._path.name + ".new")
        try:
            self.fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            fcntl.flock(self.fd, fcntl.LOCK_EX)
            os.write(self.fd, json.dumps(facts).encode())
            # Nothing is synced: with the host the guest is gone as well.
            fresh.rename(self._path)
        except OSError as error:
            self.remove()
            raise FuseDiskError(f"cannot note that --before begins: {error}") from None

    def remove(self) -> None:
        """Nothing is to be undone any more."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            self._path.unlink(missing_ok=True)

    def read(self) -> dict[str, Any] | None:
        """The facts, where there is a note."""
        try:
            found: dict[str, Any] = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return None
        return found

    def take_over(self, seconds_max: float) -> None:
        """From a sender that died: wait for its hook, and remove the note. Raises OSError.

        What a hook left running may have the note locked for ever, so the wait is bounded.
        """
        until = time.monotonic() + seconds_max
        self.fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        while True:
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    break
                time.sleep(_LOCK_POLL_SECONDS)


async def run_hook(
    option: str,
    command: str,
    facts: Mapping[str, object],
    seconds_max: float,
    inherited: tuple[int, ...] = (),
) -> None:
    """Run a shell command; its output goes to the log.

    ``facts`` become FUSEDISK_NAME=value, ``inherited`` descriptors stay open in it. Raises
    FuseDiskError where it fails or takes longer.
    """
    environment = {**os.environ, **{f"FUSEDISK_{k.upper()}": str(v) for k, v in facts.items()}}
    what = f"{option} {shlex.quote(command)}"
    result: subprocess.CompletedProcess[bytes] | None = None
    # Not a pipe: what the hook leaves running, a guest perhaps, may keep its output open.
    with tempfile.TemporaryFile() as output:
        with trio.move_on_after(seconds_max):
            try:
                result = await trio.run_process(
                    ["sh", "-c", command],
                    check=False,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    pass_fds=inherited,
                    # What it leaves running, a guest perhaps, is not for a terminal to interrupt.
                    start_new_session=True,
                    deliver_cancel=_end,
                )
            except OSError as error:
                raise FuseDiskError(f"{what} cannot be run: {error}") from None
        output.seek(0)
        said = output.read(_OUTPUT_BYTES_MAX).decode(errors="replace")
    for line in said.splitlines():
        log.info("%s: %s", option, "".join(c if c.isprintable() else " " for c in line))
    if result is None:
        raise FuseDiskError(f"{what} did not end within {seconds_max:g} s")
    if result.returncode:
        raise FuseDiskError(f"{what} ended with status {result.returncode}")


async def _end(process: trio.Process) -> None:
    """End the hook with all that it started: the session is its own."""
    os.killpg(process.pid, signal.SIGTERM)
    with trio.move_on_after(_ENDING_SECONDS, shield=True):
        await process.wait()
        return
    os.killpg(process.pid, signal.SIGKILL)
