"""Commands that a cutover runs around the switch, with what is known in their environment."""

import logging
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Mapping

import trio

from fusedisk.errors import FuseDiskError

log = logging.getLogger("replicator.hooks")

_OUTPUT_BYTES_MAX = 4096
_ENDING_SECONDS = 5.0


async def run_hook(
    option: str, command: str, facts: Mapping[str, object], seconds_max: float
) -> None:
    """Run a shell command; its output goes to the log.

    ``facts`` become FUSEDISK_NAME=value. Raises FuseDiskError where it fails or takes longer.
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
