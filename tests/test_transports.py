"""Plain transports with real processes: a copy that is identical, and refusals that say why."""

import os
import shlex
import socket
import subprocess

import pytest
from conftest import wait_for
from test_replication import REPLICATOR, Pair
from test_replication import pair as pair
from transport_helpers import copy, receive, said_one_line

# unix and tcp


def test_unix_socket_is_for_its_owner_alone(pair: Pair) -> None:
    path = pair.tmp_path / "r.sock"
    receive(pair, f"unix://{path}")
    assert path.stat().st_mode & 0o777 == 0o600
    copy(pair)


def test_unix_socket_of_a_running_receiver_is_not_taken_away(pair: Pair) -> None:
    address = f"unix://{pair.tmp_path}/r.sock"
    first = receive(pair, address)
    said_one_line(pair.run("receive", "--store", pair.store, address), "in use")
    copy(pair)
    first.kill()
    # What a kill leaves behind is.
    receive(pair, address)
    copy(pair)


def test_plain_tcp_beyond_the_loopback_needs_to_be_asked_for(pair: Pair) -> None:
    for address in ("tcp://0.0.0.0:0", "tcp://[::]:0"):
        refused = pair.run("receive", "--store", pair.store, address)
        said_one_line(refused, "use tls://")
        assert "--insecure" in refused.said and "ssh://" in refused.said
    receive(pair, "tcp://0.0.0.0:0", "--insecure")
    pair.address = pair.address.replace("0.0.0.0", "127.0.0.1")
    copy(pair)
    # From a block for documentation (RFC 5737): nobody is there.
    pair.address = "tcp://192.0.2.1:9"
    said_one_line(pair.start("--once"), "use tls://")


# exec and fd


def receive_command(pair: Pair) -> str:
    return shlex.join([REPLICATOR, "receive", "--store", str(pair.store), "fd:0"])


def test_exec(pair: Pair) -> None:
    pair.address = f"exec:{receive_command(pair)}"
    sender = copy(pair)
    # The receiver's log is in ours.
    assert "exec: " in sender.said and "replica r: filling" in sender.said


def test_exec_through_other_commands(pair: Pair) -> None:
    pair.address = f"exec:cat | {receive_command(pair)} | cat"
    copy(pair)


def test_exec_failures_are_said(pair: Pair) -> None:
    pair.address = "exec:/nonexistent/command"
    said_one_line(pair.start("--once"), "not found")
    pair.address = "exec:echo the disk is on fire >&2; exit 3"
    sender = pair.start("--once")
    wait_for(lambda: "ended: the disk is on fire; trying again" in sender.said, "it is said")
    assert sender.popen.poll() is None


def test_exec_command_ends_with_the_sender(pair: Pair) -> None:
    pidfile = pair.tmp_path / "pid"
    pair.address = f"exec:echo $$ >{pidfile}; sleep 1000 & {receive_command(pair)}"
    copy(pair)
    pid = int(pidfile.read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_fd_of_a_connected_socket_at_both_ends(pair: Pair) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with (pair.tmp_path / "inherited.log").open("wb") as log:
            receiver = subprocess.Popen(
                [REPLICATOR, "receive", "--store", str(pair.store), f"fd:{theirs.fileno()}"],
                pass_fds=[theirs.fileno()],
                stdout=subprocess.PIPE,
                stderr=log,
            )
        try:
            mountpoint = str(pair.mount.mountpoint)
            address = f"fd:{ours.fileno()}"
            command = [REPLICATOR, "start", "--name", "r", "--once", mountpoint, address]
            sender = subprocess.run(
                command, pass_fds=[ours.fileno()], capture_output=True, timeout=60, check=False
            )
            assert sender.returncode == 0, sender.stderr
            theirs.close()
            ours.close()
            assert receiver.wait(timeout=60) == 0
            assert receiver.stdout is not None and receiver.stdout.read() == b""
        finally:
            receiver.kill()
            receiver.communicate()
    assert pair.identical()


def test_fd_that_is_none(pair: Pair) -> None:
    said_one_line(pair.run("receive", "--store", pair.store, "fd:77"), "fd:77", 2)
    pair.address = "fd:77"
    said_one_line(pair.start("--once"), "fd:77", 2)
    # The tests' standard input is /dev/null.
    said_one_line(pair.run("receive", "--store", pair.store, "fd:0"), "not a connected", 2)


def test_fd_of_a_listening_socket(pair: Pair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.fileno()
        receiver = subprocess.Popen(
            [REPLICATOR, "receive", "--store", str(pair.store), f"fd:{number}"],
            pass_fds=[number],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            pair.address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
            copy(pair)
        finally:
            receiver.kill()
            receiver.wait()
