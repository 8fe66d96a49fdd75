"""Replication over a real sshd on the loopback, which is started here and knows nobody else."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import unavailable, wait_for
from test_replication import CHUNK, REPLICATOR, Pair, guest_write
from test_replication import pair as pair
from transport_helpers import copy, receive, said_one_line

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ["PATH"])


class SshServer:
    """An sshd of our own, on the loopback, and a wrapper that lets ssh know nothing else."""

    def __init__(self, directory: Path, port: int) -> None:
        assert SSHD is not None
        self.port = port
        directory.mkdir(mode=0o700)
        self.directory = directory
        for name in ("host", "user"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)]
            subprocess.run(command, check=True)
        shutil.copy(directory / "user.pub", directory / "authorized_keys")
        (directory / "sshd_config").write_text(
            f"ListenAddress 127.0.0.1:{self.port}\n"
            f"HostKey {directory}/host\n"
            f"PidFile none\n"
            f"AuthorizedKeysFile {directory}/authorized_keys\n"
            "StrictModes no\nUsePAM no\nPasswordAuthentication no\n"
            "KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
        )
        host_key = (directory / "host.pub").read_text()
        self.known_hosts = directory / "known_hosts"
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {host_key}")
        self.identity = directory / "user"
        wrapper = directory / "bin" / "ssh"
        wrapper.parent.mkdir()
        ssh = shutil.which("ssh")
        wrapper.write_text(
            f"#!/bin/sh\nexec {ssh} -F none -o IdentitiesOnly=yes -o StrictHostKeyChecking=yes "
            f'-o UserKnownHostsFile={self.known_hosts} -i {self.identity} "$@"\n'
        )
        wrapper.chmod(0o700)
        self.bin = wrapper.parent
        # Where sshd wants to go before it knows the user; packages make it at boot.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        command = [SSHD, "-D", "-e", "-f", str(directory / "sshd_config")]
        self.log = directory / "sshd.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
        wait_for(self._listens, "sshd listens")

    def _listens(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return "Server listening" in self.log.read_text()

    def sessions(self) -> list[int]:
        """The processes that serve connections."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def stop(self) -> None:
        if self.process.poll() is not None:
            return
        for pid in self.sessions():
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


@pytest.fixture
def sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshServer]:
    if SSHD is None or shutil.which("ssh") is None or os.getuid() != 0:
        unavailable("sshd is missing, or we are not root")
    with socket.socket() as reserved:
        # Bound and not listening, it keeps the port from everybody who asks for any.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        server = SshServer(tmp_path / "ssh", reserved.getsockname()[1])
        monkeypatch.setenv("PATH", f"{server.bin}:{os.environ['PATH']}")
        try:
            yield server
        finally:
            server.stop()


def use_ssh(pair: Pair, sshd: SshServer) -> tuple[str, str]:
    pair.address = f"ssh://root@127.0.0.1:{sshd.port}{pair.store}"
    return "--remote-command", shlex.quote(REPLICATOR)


def test_ssh(pair: Pair, sshd: SshServer) -> None:
    # Words that a remote shell would take for its own.
    pair.store = pair.store.rename(pair.tmp_path / "a store; touch 'x' $(id)")
    copy(pair, *use_ssh(pair, sshd))
    assert {p.name for p in pair.store.iterdir() if p.name[0] != "."} == {"r"}


def test_ssh_takes_over_from_a_session_that_a_broken_link_left(pair: Pair, sshd: SshServer) -> None:
    options = use_ssh(pair, sshd)
    sender = pair.start(*options)
    pair.wait_following(sender)
    before = sshd.sessions()
    # Stopped, both ends believe in the connection, as after a network that went away.
    for pid in before:
        os.kill(pid, signal.SIGSTOP)
    sender.kill()
    guest_write(pair.mount.disk(), b"d" * CHUNK, 25 * CHUNK)
    copy(pair, *options)


def test_ssh_beside_another_receiver(pair: Pair, sshd: SshServer) -> None:
    receive(pair, "tcp://127.0.0.1:0")
    pair.wait_following(pair.start())
    options = use_ssh(pair, sshd)
    second = pair.run(
        "start", "--name", "second", "--once", *options, pair.mount.mountpoint, pair.address
    )
    assert second.wait() == 0, second.said
    for image in pair.images:
        assert (pair.store / "second" / image.name).read_bytes() == image.read_bytes()


def test_ssh_errors_are_said(pair: Pair, sshd: SshServer) -> None:
    options = use_ssh(pair, sshd)
    said_one_line(pair.start("--once"), "--remote-command")
    said_one_line(pair.start("--once", "--remote-command", "/nonexistent/x"), "--remote-command")

    pair.address += "/missing"
    said_one_line(pair.start("--once", *options), "is not a directory")
    pair.address = pair.address.removesuffix("/missing")

    known = sshd.known_hosts.read_text()
    sshd.known_hosts.write_text("")
    said_one_line(pair.start("--once", *options), "Host key verification failed")
    sshd.known_hosts.write_text(known)
    (sshd.directory / "authorized_keys").write_text("")
    said_one_line(pair.start("--once", *options), "Permission denied")

    sshd.stop()
    sender = pair.start("--once", *options)
    wait_for(lambda: "refused; trying again" in sender.said, "it is said and tried again")
    assert sender.popen.poll() is None
