"""The keeper: mounts, holds the ``/dev/fuse`` descriptor, and watches over the disk server.

Standard library only, and as little as possible: what isn't here cannot take the mount away.
"""

import argparse
import contextlib
import json
import logging
import logging.handlers
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from fusedisk.witness import open_witnesses

log = logging.getLogger("fusedisk.keeper")

# Exit status of a server that made room for another one (sysexits.h: EX_TEMPFAIL).
DRAINED = 75
# Exit status of a server whose images may lack what was written (EX_IOERR). Another server would
# not be told of it: the kernel reports a failed writeback once, and its clean mark would be wrong.
FLUSH_FAILED = 74

_RESTART_SECONDS_MAX = 10.0
_WORKED_SECONDS = 10.0
# A mount that is gone again by then never had use for a spare server. Where one server died, the
# next may soon: only its first answers come before the spare, which keeps a processor busy.
_SPARE_SECONDS = 1.0
_SPARE_AGAIN_SECONDS = 0.1
_SPARE_RETRY_SECONDS = 5.0
# Of servers that are to replace another: one that was killed says nothing about the installed code.
_REPLACE_TRIES = 3
_LONG_SECONDS = 3600.0
# After that many failures in a row, a server is not needed any more where the mount is gone.
_FAILURES_AFTER_UNMOUNT = 3

# SIGTERM and SIGINT: unmount. SIGUSR1: replace the server by one of the installed code, in order.
SIGNALS = frozenset({signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})


class MountFailed(Exception):
    """fusermount3 refused; the message is its own."""


def mount(mountpoint: str, options: list[str]) -> int:
    """Mount and return the ``/dev/fuse`` descriptor (libfuse's ``_FUSE_COMMFD`` protocol).

    fusermount3 opens and mounts with its own rights, so this works for every user, and passes the
    descriptor over the socket named in the environment (libfuse: lib/mount.c). Raises MountFailed.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        result = subprocess.run(
            ["fusermount3", "-o", ",".join(options), "--", mountpoint],
            env=dict(os.environ, _FUSE_COMMFD=str(theirs.fileno())),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        theirs.close()
        if result.returncode != 0:
            raise MountFailed(result.stderr.strip() or "fusermount3 failed")
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    if not fds:
        raise MountFailed("fusermount3 passed no descriptor")
    return fds[0]


def unmount(mountpoint: str, *, lazy: bool = False) -> str | None:
    """Unmount; return why it failed, or None."""
    result = subprocess.run(
        ["fusermount3", "-u", *(["-z"] if lazy else []), "--", mountpoint],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    return None if result.returncode == 0 else result.stderr.strip()


class Server:
    """A disk server, which has loaded its code and waits for a word before it does anything.

    It reports on a pipe: ``l`` loaded, ``a`` answered a first request.
    """

    def __init__(
        self, arguments: argparse.Namespace, device: int, ready: int, witnesses: list[int]
    ) -> None:
        self._reports, told = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        wait, self._go = os.pipe2(os.O_CLOEXEC)
        self._said = b""
        images = [int(x) for x in arguments.images.split(",")]
        try:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "fusedisk.server"),
                    *("--state", arguments.state, "--device", str(device), "--go", str(wait)),
                    *("--ready", str(ready), "--told", str(told), "--images", arguments.images),
                    *("--witnesses", ",".join(map(str, witnesses))),
                    *("--uid", arguments.uid, "--gid", arguments.gid, "--mode", arguments.mode),
                ],
                pass_fds=[device, ready, told, wait, arguments.lock, *images, *witnesses],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # A Ctrl-C at the terminal is for the keeper, which unmounts in order.
                start_new_session=True,
            )
        except BaseException:
            # It is tried again, maybe for hours, by a keeper that has only so many descriptors.
            os.close(self._reports)
            os.close(self._go)
            raise
        finally:
            os.close(told)
            os.close(wait)

    def begin(self, *, resume: bool) -> None:
        """Let it serve."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._go, b"resume" if resume else b"begin")

    def reported(self, letter: bytes) -> bool:
        """Whether it said this letter."""
        with contextlib.suppress(BlockingIOError):
            self._said += os.read(self._reports, 16)
        return letter in self._said

    @property
    def ended(self) -> bool:
        """Whether its process is gone."""
        return self.process.poll() is not None

    def close(self) -> None:
        """End one that has not begun, and forget one that has ended."""
        # Killed, not asked: while it loads its code it hears nothing, and the keeper would wait for
        # it. It holds no state yet.
        self.process.kill()
        self.process.wait()
        os.close(self._go)
        os.close(self._reports)


class Keeper:
    """One mount and its server, which is followed by another when it dies.

    A spare server waits with its code loaded, so that the guest's pause is milliseconds.
    """

    def __init__(self, arguments: argparse.Namespace, device: int) -> None:
        self._arguments, self._device = arguments, device
        self._nowhere = os.open(os.devnull, os.O_WRONLY)
        self._witnesses = open_witnesses([int(x) for x in arguments.images.split(",")])
        self._spare: Server | None = None
        self._spare_due = 0.0
        self._restarts = self._failures = self._refused = 0
        # Tries that are left to replace the server; 0 while nobody asked for it.
        self._replace = 0

    def run(self) -> int:
        """Serve until the mount is gone; the exit status."""
        server = Server(self._arguments, self._device, self._arguments.ready, self._witnesses)
        os.close(self._arguments.ready)
        while True:
            begun = time.monotonic()
            server.begin(resume=self._restarts > 0)
            self._write_pids(server)
            status = self._watch(server)
            worked = server.reported(b"a") or time.monotonic() - begun > _WORKED_SECONDS
            server.close()
            if status == 0:
                break
            if status == FLUSH_FAILED:
                log.error("unmounted, but not all of it is in the images; see server.log")
                break
            if not survives_crashes() or (self._restarts == 0 and not worked):
                # Leaving the dead mount would only give every caller ENOTCONN or make it wait.
                log.error("the disk server ended with status %d", status)
                unmount(self._arguments.mountpoint, lazy=True)
                break
            self._wait_before_restart(status, worked)
            if self._failures >= _FAILURES_AFTER_UNMOUNT and self._mount_is_gone():
                log.error("unmounted, but no server could flush the images")
                break
            self._restarts += 1
            server = self._next_server()
        self._drop_spare()
        log.info("ended")
        return 0 if status == 0 else 1

    def _make_spare(self) -> Server:
        return Server(self._arguments, self._device, self._nowhere, self._witnesses)

    def _next_server(self) -> Server:
        """The spare server, or a fresh one where that is gone too."""
        if self._spare is not None and self._spare.ended:
            self._drop_spare()
        server, self._spare = self._spare, None
        while server is None:
            try:
                server = self._make_spare()
            except OSError as error:
                # Short of memory or processes. Giving up would take the disks away for good.
                log.error("cannot start a disk server, trying again: %s", error)
                time.sleep(1)
        return server

    def _mount_is_gone(self) -> bool:
        poller = select.poll()
        poller.register(self._device, 0)
        return any(events & select.POLLERR for _, events in poller.poll(0))

    def _tend_spare(self) -> None:
        """Have a spare server; one that ends by itself is not replaced in a tight loop."""
        if not survives_crashes():
            return
        now = time.monotonic()
        if self._spare is not None and self._spare.ended:
            status = self._spare.process.returncode
            log.warning("the spare server ended with status %d", status)
            self._drop_spare()
            self._spare_due = now + _SPARE_RETRY_SECONDS
            if self._replace:
                self._replace = self._replace - 1 if status < 0 else 0
                if self._replace:
                    self._spare_due = now
                else:
                    self._refused += 1
                    log.error("the server is not replaced: the installed code does not load")
        if self._spare is None and now >= self._spare_due:
            try:
                self._spare = self._make_spare()
            except OSError as error:
                log.warning("cannot start a spare server: %s", error)
                self._spare_due = now + _SPARE_RETRY_SECONDS

    def _drop_spare(self) -> None:
        if self._spare is not None:
            self._spare.close()
            self._spare = None

    def _watch(self, server: Server) -> int:
        """Wait for the server's end, meanwhile keeping a spare; its status."""
        seconds = _SPARE_AGAIN_SECONDS if self._restarts else _SPARE_SECONDS
        self._spare_due = time.monotonic() + seconds
        while (status := server.process.poll()) is None:
            caught = signal.sigtimedwait(SIGNALS, seconds)
            if caught is not None and caught.si_signo in (signal.SIGTERM, signal.SIGINT):
                self._stop()
            elif caught is not None and caught.si_signo == signal.SIGUSR1:
                # The installed code may be newer than what the spare has loaded.
                self._drop_spare()
                self._replace, self._spare_due = _REPLACE_TRIES if survives_crashes() else 0, 0.0
            refused = self._refused
            self._tend_spare()
            if self._refused != refused:
                self._write_pids(server)
            if self._replace and self._spare is not None and self._spare.reported(b"l"):
                self._replace = 0
                server.process.send_signal(signal.SIGUSR1)
            seconds = _LONG_SECONDS
            if self._replace:
                seconds = 0.02
            elif self._spare is None and survives_crashes():
                seconds = max(self._spare_due - time.monotonic(), 0.0)
        return status

    def _wait_before_restart(self, status: int, worked: bool) -> None:
        if status == DRAINED:
            log.info("the disk server made room for another one")
            return
        # Back-off: a server that cannot start is not started in a tight loop.
        self._failures = 0 if worked else self._failures + 1
        delay = 0.0
        if self._failures > 1:
            # Bounded before the power is taken: in days of failures it outgrows what is a float.
            delay = min(0.05 * 2 ** min(self._failures, 10), _RESTART_SECONDS_MAX)
        how = f"signal {-status}" if status < 0 else f"status {status}"
        log.warning("the disk server ended with %s; starting another in %.1f s", how, delay)
        time.sleep(delay)

    def _write_pids(self, server: Server) -> None:
        """For `fusedisk status` and `upgrade`, which therefore need no answer from anybody."""
        pids = {"keeper": os.getpid(), "server": server.process.pid, "restarts": self._restarts}
        pids["refused"] = self._refused
        file = Path(self._arguments.state) / "pids.json"
        scratch = file.with_name("pids.json.new")
        try:
            scratch.write_text(json.dumps(pids))
            scratch.rename(file)
        except OSError as error:
            # A full file system, most likely: no reason to give up the mount.
            log.warning("cannot tell who serves: %s", error)

    def _stop(self) -> None:
        """Unmount, as far as nobody uses the disks."""
        failure = unmount(self._arguments.mountpoint)
        if failure:
            log.warning("told to stop, but not unmounted: %s", failure)


def survives_crashes() -> bool:
    """Whether this kernel hands out unanswered requests again (FUSE_NOTIFY_RESEND, Linux 6.9)."""
    version = tuple(int(x) for x in re.findall(r"\d+", os.uname().release)[:2])
    return version >= (6, 9)


def run(arguments: argparse.Namespace) -> int:
    """Mount, serve until the mount is gone, and say over ``arguments.ready`` how it began."""
    try:
        device = mount(arguments.mountpoint, arguments.options.split("\n"))
    except (MountFailed, OSError) as error:
        os.write(arguments.ready, f"{error}\n".encode())
        return 1
    log.info("mounted %s", arguments.mountpoint)
    # The end of fusermount3 is no news to the keeper.
    signal.sigtimedwait({signal.SIGCHLD}, 0)
    return Keeper(arguments, device).run()


def _spare_from_oom() -> None:
    """Take this process and the servers out of the OOM killer's choice, where we may.

    It counts the page cache that a server has mapped as if killing it freed that. Needs
    CAP_SYS_RESOURCE; without it a server that was killed is followed by another.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-1000")


def main() -> int:
    """Entry point of the background keeper; see fusedisk.mounting for who starts it."""
    # Taken one by one where the keeper waits, so that none interrupts it in the middle of a step:
    # a keeper that died between fusermount3 and its answer would leave a mount without a server.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    parser = argparse.ArgumentParser(prog="fusedisk.keeper")
    for name in ("--state", "--mountpoint", "--options", "--images", "--uid", "--gid", "--mode"):
        parser.add_argument(name, required=True)
    parser.add_argument("--ready", type=int, required=True)
    parser.add_argument("--lock", type=int, required=True)
    arguments = parser.parse_args()
    handler = logging.handlers.RotatingFileHandler(
        Path(arguments.state) / "keeper.log", maxBytes=1 << 20, backupCount=3
    )
    logging.basicConfig(
        level=logging.INFO, handlers=[handler], format="%(asctime)s %(levelname)s %(message)s"
    )
    _spare_from_oom()
    try:
        return run(arguments)
    except Exception:
        log.exception("the keeper failed")
        return 1


if __name__ == "__main__":
    sys.exit(main())
