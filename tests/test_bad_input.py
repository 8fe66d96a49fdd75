"""Nonsense on the command line of replicator: one line, the right status, nothing changed."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Mount, wait_for
from test_replication import REPLICATOR

from fusedisk.commandline import fail
from replicator.cli import main

ADDRESSES = [
    *("", "nonsense", "tcp://", "tcp://host", "tcp://host:", "tcp://host:x", "tcp://host:65536"),
    *("tcp://h:-1", "tcp://:7000", "tcp://[::1:7000", "tcp://h:7000/x", "http://host:7000"),
    *("TCP://host:7000", "tls://host", "tls://a b:7000", "unix://relative", "unix:///"),
    *("unix:///" + "x" * 200, "ssh://host", "ssh://-oProxyCommand=x/store", "ssh://h:0/store"),
    *("exec:", "exec: ", "exec:a\nb", "fd:", "fd:x", "fd:-1", "fd:99999999", "fd:3 "),
    *("tcp://h:7000\n", "unix:///a\x1b[2J", "ssh://host/a\0b", "x" * 5000),
]
RATES = ["", "x", "-1", "1e9", "10XB", "1MiB/h", "1 000", "٣", "16777216TiB"]
SECONDS = ["", "x", "-1", "0", "1e9", "5s5", "nan"]
NAMES = ["", ".", "..", "a/b", ".hidden", "a\nb", "x" * 300]

USAGE: list[list[str]] = [
    ["moult"],
    ["--fast"],
    ["receive"],
    ["receive", "--store", "{store}"],
    ["receive", "unix:///{tmp}/r"],
    ["receive", "--store", "{file}", "unix:///{tmp}/r"],
    *(["receive", "--store", "{store}", address] for address in ADDRESSES if address != "fd:3 "),
    *(
        ["receive", "--store", "{store}", "--keep", spec, "unix:///{tmp}/r"]
        for spec in ("", "x", "0", "-1", "1x", "x5m", "12x5y", "1,,2", "9" * 30)
    ),
    ["receive", "--store", "{store}", "--remote-command", "x", "unix:///{tmp}/r"],
    ["start"],
    ["start", "{tmp}"],
    *(["start", "--name", "r", "{tmp}", address] for address in ADDRESSES),
    ["start", "--name", "r", "{tmp}", "tcp://127.0.0.1:0"],
    *(["start", "--name", "r", "--rpo", x, "{tmp}", "unix:///r"] for x in SECONDS),
    *(["start", "--name", "r", "--link-timeout", x, "{tmp}", "unix:///r"] for x in SECONDS),
    *(["start", "--name", "r", "--bandwidth", x, "{tmp}", "unix:///r"] for x in RATES),
    *(["start", "--name", x, "{tmp}", "unix:///r"] for x in NAMES if x),
    ["start", "--remote-command", "a\nb", "{tmp}", "ssh://host/store"],
    *([word] for word in ("status", "stop", "pause", "resume", "set", "verify", "cutover")),
    *([word] for word in ("resolve", "forget", "list", "points", "restore", "keys")),
    ["forget", "{tmp}"],
    ["set", "{tmp}"],
    *(["set", "--bandwidth", x, "{tmp}"] for x in RATES),
    *(["set", "--rpo", x, "{tmp}"] for x in SECONDS),
    *(["set", "--max-downtime", x, "{tmp}"] for x in ("", "x", "-1", "0", "1.5", "9" * 20)),
    *(["verify", "--bandwidth", x, "{tmp}"] for x in (*RATES, "0")),
    *(["cutover", "--max-downtime", x, "{tmp}"] for x in ("", "x", "-1", "0", "1s", "9" * 20)),
    *(["cutover", "--timeout", x, "{tmp}"] for x in SECONDS),
    ["list", "{file}"],
    *(["restore", "--point", x, "{store}/r", "{tmp}/to"] for x in ("", "x", "0", "-1")),
    ["restore", "{store}/r"],
    ["keys", "{tmp}/keys"],
]

FAILURES: list[list[str]] = [
    ["receive", "--store", "{tmp}/missing/deep", "unix:///{tmp}/r"],
    ["receive", "--store", "{store}", "unix:///{tmp}/missing/r"],
    ["receive", "--store", "{store}", "tcp://192.0.2.1:7000"],
    ["receive", "--store", "{store}", "--tls", "{tmp}/missing", "tls://127.0.0.1:0"],
    ["start", "--name", "r", "{tmp}", "unix:///r"],
    ["start", "--name", "r", "{tmp}/missing", "unix:///r"],
    ["start", "--name", "r", "/proc", "unix:///r"],
    *([word, "{tmp}"] for word in ("status", "stop", "pause", "resume", "verify", "cutover")),
    ["status", "{tmp}/a\nb"],
    ["resolve", "{tmp}"],
    ["forget", "--name", "r", "{tmp}"],
    ["set", "--rpo", "1", "{tmp}"],
    ["list", "{tmp}/missing"],
    ["points", "{store}/r"],
    ["restore", "{store}/r", "{tmp}/to"],
]


def content(directory: Path) -> dict[str, bytes | None]:
    return {
        str(path): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
        # Whether it can be made is how a receiver sees that it may write to its store.
        if path.name != ".locks"
    }


@pytest.fixture
def called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str]], tuple[object, str]]:
    """Run the command in this process: (status, what it said), after a check that it is one line
    and that nothing changed."""
    (tmp_path / "store").mkdir()
    (tmp_path / "file").write_bytes(b"something else")
    places = {"tmp": tmp_path, "store": tmp_path / "store", "file": tmp_path / "file"}

    def call(words: list[str]) -> tuple[object, str]:
        for key, value in places.items():
            words = [word.replace(f"{{{key}}}", str(value)) for word in words]
        before = content(tmp_path)
        monkeypatch.setattr(sys, "argv", ["replicator", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("replicator: ") and len(said.err.splitlines()) == 1, said.err
        assert said.err.endswith("\n") and said.err[:-1].isprintable()
        assert content(tmp_path) == before
        return ended.value.code, said.err

    return call


@pytest.mark.parametrize("words", USAGE, ids=lambda words: " ".join(words)[:60])
def test_usage_errors(called: Callable[[list[str]], tuple[object, str]], words: list[str]) -> None:
    assert called(words)[0] == 2


@pytest.mark.parametrize("words", FAILURES, ids=lambda words: " ".join(words)[:60])
def test_failures(called: Callable[[list[str]], tuple[object, str]], words: list[str]) -> None:
    assert called(words)[0] == 1


def replicator(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [REPLICATOR, *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_names_of_replicas_on_a_mount(fuse: Callable[..., Mount], tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    mount = fuse(image)
    mount.mount()
    before = {p: p.stat().st_mtime_ns for p in mount.state.rglob("*") if p.suffix != ".log"}
    for words in (
        *(["start", "--name", name, mount.mountpoint, "unix:///r"] for name in ("..", "a/b")),
        *([word, mount.mountpoint] for word in ("stop", "pause", "resume", "verify", "cutover")),
        *([word, "--name", "../x", mount.mountpoint] for word in ("stop", "forget", "cutover")),
    ):
        result = replicator(*words)
        assert result.returncode == 2, (words, result.stderr)
        assert len(result.stderr.splitlines()) == 1 and result.stdout == ""
    after = {p: p.stat().st_mtime_ns for p in mount.state.rglob("*") if p.suffix != ".log"}
    assert after == before


def test_a_target_that_is_not_there_is_said_in_words(
    fuse: Callable[..., Mount], tmp_path: Path
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    mount = fuse(image)
    mount.mount()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        log = tmp_path / "sender.log"
        for target, why in (
            (address, "connection refused"),
            (f"unix://{tmp_path}/none", "no such file or directory"),
        ):
            with log.open("wb") as file:
                sender = subprocess.Popen(
                    [REPLICATOR, "start", "--name", "r", mount.mountpoint, target], stderr=file
                )
            try:
                said = f"cannot reach {target}: {why}"
                wait_for(lambda said=said: said in log.read_text(), "it is said")
                wait_for(
                    lambda said=said: said in replicator("status", mount.mountpoint).stdout,
                    "status says it",
                )
            finally:
                sender.terminate()
                sender.wait()
            assert "Errno" not in log.read_text()


def test_output_that_nobody_reads_is_no_error(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        result = subprocess.run(
            [REPLICATOR, "--help"], stdout=writing, stderr=subprocess.PIPE, timeout=60, check=False
        )
    finally:
        os.close(writing)
    assert result.stderr == b""


def test_what_a_peer_says_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fail("replicator", "refused: \x1b[2J\nreplicator: all is well\udc80", 1)
    assert capsys.readouterr().err == "replicator: refused:  [2J replicator: all is well \n"
