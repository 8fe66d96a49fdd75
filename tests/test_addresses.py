"""What an address may look like, and that no address can become something else."""

import pytest

from fusedisk.errors import UsageError
from replicator.address import (
    Address,
    ExecAddress,
    FdAddress,
    SshAddress,
    TcpAddress,
    TlsAddress,
    UnixAddress,
    parse_address,
)
from replicator.transport.ssh import command_line, remote_line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tcp://host:1", TcpAddress("host", 1)),
        ("tcp://127.0.0.1:65535", TcpAddress("127.0.0.1", 65535)),
        ("tcp://[::1]:0", TcpAddress("::1", 0)),
        ("tls://backup.example.org:7", TlsAddress("backup.example.org", 7)),
        ("tls://[fe80::1%eth0]:7", TlsAddress("fe80::1%eth0", 7)),
        ("unix:///run/r.sock", UnixAddress("/run/r.sock")),
        ("unix:///" + "a" * 106, UnixAddress("/" + "a" * 106)),
        ("ssh://host/srv/store", SshAddress("host", "/srv/store")),
        ("ssh://me@host:2222/a b'c", SshAddress("host", "/a b'c", "me", 2222)),
        ("ssh://me@[::1]:22/s", SshAddress("::1", "/s", "me", 22)),
        ("ssh://host/user@other:22", SshAddress("host", "/user@other:22")),
        ("exec:socat - TCP:host:1", ExecAddress("socat - TCP:host:1")),
        ("fd:0", FdAddress(0)),
        ("fd:17", FdAddress(17)),
    ],
)
def test_address(text: str, expected: Address) -> None:
    assert parse_address(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host:1",
        "tcp://host",
        "tcp://:1",
        "tcp://host:65536",
        "tcp://host:-1",
        "tcp://host:1/",
        "tcp://host:1\n",
        "tcp://host:\u0661",
        "tcp://::1:1",
        "tcp://[1.2.3.4]:1",
        "tcp://[::g]:1",
        "tcp://a b:1",
        "tls://-host:1",
        "tls://user@host:1",
        "unix://relative",
        "unix:///",
        "unix:///" + "a" * 107,
        "unix:///a\0b",
        "ssh://host",
        "ssh://host:0/s",
        "ssh://host:65536/s",
        "ssh://-oProxyCommand=id/s",
        "ssh://-l@host/s",
        "ssh://me@-host/s",
        "ssh://me@@host/s",
        "ssh://$(id)@host/s",
        "ssh://ho;st/s",
        "ssh://host/s\nt",
        "ssh://host/\x1b[2J",
        "ssh:///s",
        "exec:",
        "exec: ",
        "exec:a\nb",
        "exec:" + "a" * 5000,
        "fd:",
        "fd:-1",
        "fd:x",
        "fd:\u0663",
        "http://host:1",
    ],
)
def test_address_refused(text: str) -> None:
    with pytest.raises(UsageError, match="tcp://HOST:PORT") as refused:
        parse_address(text)
    assert str(refused.value).isprintable()


def test_ssh_gets_each_value_as_an_argument_of_its_own() -> None:
    address = parse_address("ssh://me@host:2222/a b;'$(id)")
    assert isinstance(address, SshAddress)
    command = command_line(address, "replicator", may_ask=False)
    separator = command.index("--")
    assert command[separator + 1] == "host" and len(command) == separator + 3
    assert command[command.index("-l") + 1] == "me" and command[command.index("-p") + 1] == "2222"
    assert "BatchMode=yes" in command
    assert "BatchMode=no" in command_line(address, "replicator", may_ask=True)


def test_remote_shell_gets_the_store_as_one_word() -> None:
    line = remote_line(SshAddress("host", "/a b;'$(id)"), "/opt/my venv/bin/x".replace(" ", r"\ "))
    assert line == r"""/opt/my\ venv/bin/x receive --store '/a b;'"'"'$(id)' fd:0"""
