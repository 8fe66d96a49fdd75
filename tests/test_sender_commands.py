"""The verbs for a running sender, with real mounts, processes, kills and a terminal."""

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from conftest import Mount, fusedisk, wait_for
from session_checks import Wrong
from simulated_process import Process, run
from simulated_world import World
from test_replication import CHUNK, REPLICATOR, Pair, guest_write

MIB = 1 << 20


@pytest.fixture
def pair(tmp_path: Path, fuse: Callable[..., Mount]) -> Iterator[Pair]:
    made = Pair(tmp_path, fuse)
    try:
        yield made
    finally:
        made.clean_up()


def replicator(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [REPLICATOR, *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def asked(pair: Pair, *words: str) -> None:
    result = replicator(*words, pair.mount.mountpoint)
    assert (result.returncode, result.stderr) == (0, "")


def state_of(pair: Pair) -> str:
    return str(pair.status()["state"])


FIELDS = {
    "name": str,
    "address": str,
    "state": str,
    "progress": dict,
    "disks": list,
    "lag": dict,
    "epoch": dict,
    "sent": dict,
}

NULLABLE = {
    "error",
    "sender",
    "cause",
    "forecast",
    "freeze",
    "rpo",
    "verify",
    "cutover",
    "capture",
    "given_up",
}


def check_entry(entry: dict[str, Any]) -> None:
    """All that the contract promises, in whatever state."""
    for field, kind in FIELDS.items():
        assert isinstance(entry[field], kind), field
    assert set(entry["progress"]) == {"phase", "total", "done", "percent", "rate", "eta"}
    assert set(entry["lag"]) == {"bytes", "chunks", "seconds"}
    assert set(entry["epoch"]) == {"current", "committed"}
    assert set(entry["sent"]) == {"bytes", "data_bytes", "zero_bytes"}
    assert 0 <= entry["progress"]["percent"] <= 100
    assert [set(d) for d in entry["disks"]] == [{"name", "total", "done", "percent"}] * 2
    assert set(entry) == FIELDS.keys() | NULLABLE


def test_status_has_every_field_in_every_state(pair: Pair) -> None:
    pair.receive()
    sender = pair.start()
    pair.wait_following(sender)
    entry = pair.status()
    check_entry(entry)
    assert entry["sender"] == {"pid": sender.popen.pid}
    assert entry["sent"]["bytes"] > entry["sent"]["data_bytes"] > 0
    pair.stop(sender)
    entry = pair.status()
    check_entry(entry)
    assert (entry["state"], entry["sender"], entry["error"]) == ("stopped", None, None)
    assert entry["lag"] == {"bytes": 0, "chunks": 0, "seconds": 0.0}
    assert entry["progress"]["percent"] == 100
    guest_write(pair.mount.disk(), b"x", 20 * CHUNK)
    entry = pair.status()
    assert entry["lag"]["bytes"] == CHUNK and entry["lag"]["chunks"] == 1
    assert entry["lag"]["seconds"] > 0
    assert entry["progress"]["percent"] == 0


def test_killed_and_silent_senders_are_told_apart(pair: Pair) -> None:
    pair.receive()
    sender = pair.start()
    note = pair.mount.state / "replicas" / "r.json"
    wait_for(lambda: note.exists() and b'"following"' in note.read_bytes(), "it is noted")
    sender.popen.send_signal(signal.SIGSTOP)
    try:
        entry = pair.status()
        check_entry(entry)
        assert entry["error"] == "the sender does not answer"
        assert (entry["state"], entry["sender"]) == ("following", {"pid": sender.popen.pid})
        (seen,) = pair.mount.status()["replicas"]
        assert seen["error"] == "the sender does not answer"
    finally:
        sender.popen.send_signal(signal.SIGCONT)
    sender.kill()
    assert (pair.mount.state / "replicas" / "r.sock").exists()
    entry = pair.status()
    assert (entry["state"], entry["error"], entry["sender"]) == ("stopped", None, None)


def test_mount_status_counts_what_the_furthest_behind_lacks(pair: Pair) -> None:
    guest_write(pair.mount.disk(), b"x", 0)
    assert pair.mount.changed() == [1, 0]
    pair.receive()
    pair.once()
    assert pair.mount.changed() == [0, 0]
    guest_write(pair.mount.disk(1), b"x", 0)
    assert pair.mount.changed() == [0, 1]
    (entry,) = pair.mount.status()["replicas"]
    check_entry(entry)


def test_paused_sends_nothing_and_stays_so_over_a_new_link(pair: Pair) -> None:
    receiver = pair.receive()
    sender = pair.start()
    pair.wait_following(sender)
    asked(pair, "pause")
    wait_for(lambda: state_of(pair) == "paused", "it is paused")
    before = pair.status()["sent"]["data_bytes"]
    guest_write(pair.mount.disk(), b"p" * CHUNK, 30 * CHUNK)
    receiver.kill()
    wait_for(lambda: state_of(pair) != "paused", "the link is lost")
    pair.receive()
    wait_for(lambda: state_of(pair) == "paused", "it is paused again")
    entry = pair.status()
    assert (entry["sent"]["data_bytes"], entry["lag"]["chunks"]) == (before, 1)
    refused = replicator("cutover", pair.mount.mountpoint)
    assert refused.returncode == 1 and "paused; resume it first" in refused.stderr
    asked(pair, "resume")
    pair.wait_identical()
    assert pair.status()["sent"]["data_bytes"] > before
    pair.stop(sender)


def test_settings_change_while_it_runs(pair: Pair) -> None:
    pair.receive()
    sender = pair.start("--bandwidth", "8KiB")
    wait_for(lambda: "INFO filling" in sender.said, "it fills slowly")
    assert pair.status()["progress"]["percent"] < 100
    asked(pair, "set", "--bandwidth", "none", "--max-downtime", "2500", "--rpo", "0.2")
    pair.wait_following(sender)
    pair.stop(sender)
    noted = json.loads((pair.mount.state / "replicas" / "r.json").read_bytes())
    assert noted["max_downtime_ms"] == 2500
    for words in (["--bandwidth", "1"], ["--bandwidth", "fast"], ["--rpo", "0"], []):
        assert replicator("set", *words, pair.mount.mountpoint).returncode == 2


def test_forget(pair: Pair) -> None:
    pair.receive()
    sender = pair.start()
    pair.wait_following(sender)
    where = pair.mount.mountpoint
    refused = replicator("forget", where, "--name", "r")
    assert refused.returncode == 1 and "has a running sender" in refused.stderr
    pair.stop(sender)
    assert replicator("forget", where, "--name", "../r").returncode == 2
    asked(pair, "forget", "--name", "r")
    assert json.loads(replicator("status", "--json", where).stdout)["replicas"] == []
    assert replicator("forget", where, "--name", "r").returncode == 2


def test_detached(pair: Pair) -> None:
    pair.receive()
    words = ("start", "--detach", "--name", "r", "--rpo", "0.1")
    result = replicator(*words, pair.mount.mountpoint, pair.address)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    pid = pair.status()["sender"]["pid"]
    try:
        for fd in (0, 1, 2):
            assert os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/null"
        second = replicator(*words, pair.mount.mountpoint, pair.address)
        assert second.returncode == 1 and "has a running sender" in second.stderr
        assert len(second.stderr.splitlines()) == 1
        assert replicator(*words, pair.mount.mountpoint, "nowhere").returncode == 2
        wait_for(lambda: state_of(pair) == "following", "it follows")
    finally:
        asked(pair, "stop")
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "it has ended")
    assert "INFO following" in (pair.mount.state / "replicas" / "r.log").read_text()


@pytest.mark.parametrize("when", ["waiting", "following", "filling"])
def test_unmount_ends_a_sender_at_any_point(pair: Pair, when: str) -> None:
    if when == "waiting":
        pair.address = f"unix://{pair.tmp_path}/nobody"
    else:
        pair.receive()
    options = ["--bandwidth", "8KiB"] if when == "filling" else []
    sender = pair.start(*options)
    wait_for(lambda: f"INFO {when}" in sender.said, f"it is {when}")
    result = fusedisk("unmount", pair.mount.mountpoint)
    assert result.returncode == 0
    if when == "following":
        assert result.stdout == ""
    else:
        assert "replica r has no complete copy" in result.stdout
    assert sender.wait() == 0, sender.said
    assert "the mount was unmounted" in sender.said


def test_unmount_ends_once_as_a_failure(pair: Pair) -> None:
    pair.receive()
    sender = pair.start("--once", "--bandwidth", "8KiB")
    wait_for(lambda: "INFO filling" in sender.said, "it fills")
    assert fusedisk("unmount", pair.mount.mountpoint).returncode == 0
    pair.refused(sender, "before a copy was committed")


def test_unmount_says_what_a_replica_lacks(pair: Pair) -> None:
    pair.receive()
    pair.once()
    guest_write(pair.mount.disk(), b"x", 20 * CHUNK)
    result = fusedisk("unmount", pair.mount.mountpoint)
    assert result.stdout == f"replica r lacks {CHUNK} bytes; the next start goes on from there\n"


def test_once_waits_for_a_target_that_cannot_be_reached(pair: Pair) -> None:
    pair.address = f"unix://{pair.tmp_path}/nobody"
    sender = pair.start("--once")
    wait_for(lambda: "trying again" in sender.said, "it tried")
    entry = pair.status()
    assert entry["state"] == "waiting" and "trying again in" in entry["error"]
    assert sender.popen.poll() is None


def test_once_gives_up_on_a_target_that_cannot_be_reached(tmp_path: Path) -> None:
    """Under the virtual clock: it takes half a minute."""
    world = World(tmp_path, 1)
    world.once = True

    async def gives_up() -> None:
        world.begin()
        began = trio.current_time()
        with pytest.raises(Wrong, match="tried for 30 s, is there a receiver at"):
            await Process("sender", world.threads).run(world._send)
        assert 30 <= trio.current_time() - began < 40

    run(1, gives_up)


def on_terminal(*words: str | Path) -> tuple[subprocess.Popen[bytes], Callable[[], str]]:
    """A command with a terminal for its standard streams, and what it has drawn so far."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [REPLICATOR, *map(str, words)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=dict(os.environ, TERM="xterm", COLUMNS="100"),
    )
    os.close(theirs)
    drawn = bytearray()

    def read() -> None:
        # A terminal whose last process has ended gives EIO.
        with contextlib.suppress(OSError):
            while data := os.read(ours, 65536):
                drawn.extend(data)
        os.close(ours)

    threading.Thread(target=read, daemon=True).start()
    return process, lambda: drawn.decode(errors="replace")


def test_a_bar_on_a_terminal(pair: Pair) -> None:
    pair.receive()
    where = pair.mount.mountpoint
    words = ("start", "--name", "r", "--once", "--bandwidth", "256KiB")
    process, drawn = on_terminal(*words, where, pair.address)
    try:
        wait_for(lambda: "left" in drawn(), "the bar says how long it takes")
        for part in ("filling", "disk0.img", "disk1.img", "all", "━", "iB/s", "\x1b["):
            assert part in drawn()
        assert process.wait(60) == 0
        wait_for(lambda: "up to date at epoch" in drawn(), "the end is shown")
    finally:
        process.kill()
        process.wait()


def test_watch_until_ctrl_c(pair: Pair) -> None:
    pair.receive()
    pair.once()
    process, drawn = on_terminal("status", "--watch", pair.mount.mountpoint)
    try:
        wait_for(lambda: "up to date at epoch" in drawn(), "the replica is shown")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert "Traceback" not in drawn()
    finally:
        process.kill()
        process.wait()


def test_control_socket_bounds_what_it_is_asked(pair: Pair) -> None:
    pair.receive()
    sender = pair.start()
    pair.wait_following(sender)
    where = pair.mount.state / "replicas" / "r.sock"
    assert where.stat().st_mode & 0o777 == 0o600
    for request in (
        b"\n",
        b"x" * 100_000,
        b"nonsense {}\n",
        b"set {\n",
        b'set {"rpo_seconds": -1}\n',
    ):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(str(where))
            try:
                sock.sendall(request)
                answer = json.loads(sock.makefile("rb").readline())
            except (BrokenPipeError, ConnectionResetError):
                continue
            assert answer["exit_code"] == 2 and answer["error"]
    assert state_of(pair) == "following"
    pair.stop(sender)
