"""Going into the background: the command returns once the work there has begun."""

import logging
import os
import sys
from collections.abc import Callable
from io import FileIO
from pathlib import Path

from fusedisk.errors import FuseDiskError
from replicator.showing import log_to_file

_ANSWER_BYTES_MAX = 4096


def detach(work: Callable[[Callable[[], None]], None], log: Path, *, leave: Path) -> None:
    """Run ``work(ready)`` in a process of its own; return once it has called ``ready``.

    That process does not stay in a directory below ``leave``, a mountpoint that may have to go.

    Locks held on open files go over to that process. Raises FuseDiskError with its reason where it
    fails before that; later errors are in the log. No thread may be running.
    """
    told, telling = os.pipe()
    if pid := os.fork():
        os.close(telling)
        with os.fdopen(told, "rb") as answers:
            answer = answers.read(_ANSWER_BYTES_MAX).decode(errors="replace")
        if answer == "ready":
            return
        os.waitpid(pid, 0)
        raise FuseDiskError(answer or f"it ended at once; see {log}")
    status = 1
    try:
        os.close(told)
        _leave_terminal(log, leave)

        status = _run(work, os.fdopen(telling, "wb", buffering=0))
    finally:
        logging.shutdown()
        # Nothing that the parent has set up to happen at its exit may happen here too.
        os._exit(status)


def _leave_terminal(log: Path, leave: Path) -> None:
    os.setsid()
    if Path.cwd().is_relative_to(leave.resolve()):
        os.chdir("/")
    sys.stdout.flush()
    sys.stderr.flush()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)
    log_to_file(log)


def _run(work: Callable[[Callable[[], None]], None], parent: FileIO) -> int:
    def ready() -> None:
        parent.write(b"ready")
        parent.close()

    try:
        work(ready)
    except FuseDiskError as error:
        logging.getLogger("replicator").error("%s", error)
        if not parent.closed:
            parent.write(str(error).encode()[:_ANSWER_BYTES_MAX])
        return error.exit_code
    except BaseException:
        logging.getLogger("replicator").exception("failed")
        return 1
    return 0
