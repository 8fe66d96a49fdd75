"""Freezing around an epoch, with a stand-in for the guest agent and processes killed."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from conftest import Mount, wait_for

from fusedisk.errors import UsageError
from replicator.freeze import Freezer, freeze_settings
from replicator.freezekeeper import FreezeKeeper
from replicator.guestagent import AgentError, AgentGone

REPLICATOR = str(Path(sys.executable).with_name("replicator"))


class Agent:
    """Answers like qemu-ga behind a channel; ``frozen`` tells how things stand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.frozen = False
        self.freezes = self.thaws = 0
        self.silent = False
        self.thaw_errors = 0
        self.greeting = b""
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.bind(str(path))
        self._sock.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._thread.join(60)

    def _serve(self) -> None:
        while True:
            try:
                connection = self._sock.accept()[0]
            except OSError:
                return
            with connection, connection.makefile("rwb") as lines:
                try:
                    lines.write(self.greeting)
                    lines.flush()
                    for line in lines:
                        if not self.silent:
                            lines.write(self._answer(line))
                            lines.flush()
                except OSError:
                    continue

    def _answer(self, line: bytes) -> bytes:
        request = json.loads(line.split(b"\xff")[-1])
        what = request["execute"]
        if what == "guest-sync-delimited":
            return b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n"
        if what == "guest-fsfreeze-freeze" and not self.frozen:
            self.frozen = True
            self.freezes += 1
            return b'{"return": 2}\n'
        if what == "guest-fsfreeze-thaw" and self.thaw_errors:
            self.thaw_errors -= 1
        elif what == "guest-fsfreeze-thaw":
            self.frozen = False
            self.thaws += 1
            return b'{"return": 2}\n'
        return b'{"error": {"class": "GenericError", "desc": "not now"}}\n'


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    made = Agent(tmp_path / "qga")
    yield made
    made.close()


def _freezer(tmp_path: Path, every: float = 0.0) -> Freezer:
    settings = freeze_settings(f"qga:{tmp_path / 'qga'}", None, None, every)
    assert settings is not None
    return Freezer(settings, tmp_path / "log")


@pytest.mark.trio
async def test_the_guest_is_frozen_for_the_block_and_no_longer(
    agent: Agent, tmp_path: Path
) -> None:
    agent.greeting = b'{"return": "left over"}\n\xff{"return": 1}\n'
    freezer = _freezer(tmp_path)
    for _ in range(3):
        async with freezer.frozen():
            assert agent.frozen
        assert not agent.frozen
    report = freezer.report()
    assert report is not None
    assert (report["count"], report["error"]) == (3, None)
    assert report["ms"] < 5000
    await freezer.close()


@pytest.mark.trio
async def test_it_is_not_frozen_more_often_than_asked(agent: Agent, tmp_path: Path) -> None:
    freezer = _freezer(tmp_path, every=3600)
    for _ in range(3):
        async with freezer.frozen():
            pass
    assert agent.freezes == 1
    await freezer.close()


@pytest.mark.trio
async def test_without_an_agent_the_epoch_is_closed_all_the_same(tmp_path: Path) -> None:
    freezer, entered = _freezer(tmp_path), False
    async with freezer.frozen():
        entered = True
    assert entered
    assert "cannot reach the guest agent" in str(freezer.error)
    await freezer.close()


@pytest.mark.trio
async def test_an_agent_that_refuses_to_thaw_is_asked_again(agent: Agent, tmp_path: Path) -> None:
    freezer = _freezer(tmp_path)
    agent.thaw_errors = 2
    async with freezer.frozen():
        pass
    assert not agent.frozen
    await freezer.close()


@pytest.mark.trio
async def test_a_silent_agent_costs_a_bounded_time(agent: Agent, tmp_path: Path) -> None:
    agent.silent = True
    freezer = _freezer(tmp_path)
    with trio.fail_after(100):
        threading.Timer(6, lambda: setattr(agent, "silent", False)).start()
        async with freezer.frozen():
            assert not agent.frozen
    assert "did not answer" in str(freezer.error)
    await freezer.close()


@pytest.mark.trio
async def test_a_failure_in_the_block_thaws(agent: Agent, tmp_path: Path) -> None:
    freezer = _freezer(tmp_path)
    with pytest.raises(ValueError, match="inside"):
        async with freezer.frozen():
            raise ValueError("inside")
    with trio.move_on_after(0.5):
        async with freezer.frozen():
            await trio.sleep_forever()
    assert (agent.freezes, agent.frozen) == (2, False)
    await freezer.close()


@pytest.mark.trio
async def test_a_killed_child_is_followed_by_one_that_thaws(agent: Agent, tmp_path: Path) -> None:
    freezer = _freezer(tmp_path)
    async with freezer.frozen():
        assert freezer.child_pid is not None
        os.kill(freezer.child_pid, signal.SIGKILL)
    assert (agent.freezes, agent.frozen) == (1, False)
    await freezer.close()


SENDER = """
import sys, trio
from pathlib import Path
from replicator.freeze import Freezer, freeze_settings
from replicator.freezekeeper import FreezeKeeper
from replicator.guestagent import AgentError, AgentGone
async def main():
    freezer = Freezer(freeze_settings(sys.argv[1] or None, *sys.argv[2:4], 0), Path(sys.argv[4]))
    async with freezer.frozen():
        print(freezer.child_pid, freezer.error, flush=True)
        await trio.sleep_forever()
sys.argv[2:4] = [word or None for word in sys.argv[2:4]]
trio.run(main)
"""


def _frozen_sender(*words: str | Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SENDER, *words], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().endswith(" None\n")
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_sender_that_dies_or_hangs_leaves_nothing_frozen(
    agent: Agent, tmp_path: Path, number: signal.Signals
) -> None:
    with _frozen_sender(f"qga:{agent.path}", "", "", tmp_path / "log") as process:
        assert agent.frozen
        process.send_signal(number)
        wait_for(lambda: not agent.frozen, "the guest is thawed")
        process.kill()


@pytest.mark.parametrize("gone", [False, True])
def test_thawing_is_tried_for_as_long_as_there_is_a_guest(
    monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    """For hours, where the agent only fails; a QEMU that has ended has no guest any more."""
    clock = [0.0]

    class Failing:
        async def thaw(self) -> None:
            if clock[0] < 36000:
                raise AgentGone("nobody listens") if gone else AgentError("failed")

    async def sleep(seconds: float) -> None:
        clock[0] += seconds

    async def abandon() -> None:
        keeper = FreezeKeeper()
        keeper._means, keeper._frozen = Failing(), True
        await keeper.abandoned()
        assert not keeper._frozen

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(asyncio, "sleep", sleep)
    asyncio.run(abandon())
    assert 600 < clock[0] < 700 if gone else 36000 <= clock[0] < 36060


def test_commands_freeze_and_thaw(tmp_path: Path) -> None:
    frozen = tmp_path / "frozen"
    commands = (f"touch {frozen}", f"rm {frozen}")
    with _frozen_sender("", *commands, tmp_path / "log") as process:
        assert frozen.exists()
        process.kill()
        wait_for(lambda: not frozen.exists(), "the guest is thawed")


@pytest.mark.trio
async def test_a_command_that_fails_is_undone(tmp_path: Path) -> None:
    done = tmp_path / "done"
    settings = freeze_settings(None, "exit 3", f"touch {done}", 0)
    assert settings is not None
    freezer = Freezer(settings, tmp_path / "log")
    async with freezer.frozen():
        assert freezer.error == "--freeze-cmd ended with status 3"
    assert done.exists()
    await freezer.close()


def test_a_sender_freezes_as_it_closes_epochs(
    agent: Agent, tmp_path: Path, fuse: Callable[..., Mount]
) -> None:
    image, store = tmp_path / "disk.img", tmp_path / "store"
    mount = fuse(image)
    mount.mount("--create", "8MiB")
    store.mkdir()
    address = f"unix://{tmp_path / 's'}"
    with contextlib.ExitStack() as stack:

        def run(*words: str | Path) -> None:
            with (tmp_path / f"{words[0]}.log").open("wb") as log:
                process = subprocess.Popen(
                    [REPLICATOR, *words], stdout=subprocess.DEVNULL, stderr=log
                )
            stack.callback(process.wait)
            stack.callback(process.kill)

        def entry() -> dict[str, Any]:
            words = [REPLICATOR, "status", "--json", mount.mountpoint]
            shown = subprocess.run(words, check=True, capture_output=True)
            found: list[dict[str, Any]] = json.loads(shown.stdout)["replicas"]
            return found[0] if found else {"state": None}

        def points() -> list[dict[str, Any]]:
            words = [REPLICATOR, "points", "--json", store / "r"]
            shown = subprocess.run(words, check=True, capture_output=True)
            listed: list[dict[str, Any]] = json.loads(shown.stdout)["points"]
            return listed

        run("receive", "--store", store, address)
        wait_for((tmp_path / "s").exists, "the receiver listens")
        freeze = ("--freeze", f"qga:{agent.path}", "--freeze-every", "0")
        run("start", "--name", "r", "--rpo", "0.1", *freeze, mount.mountpoint, address)
        wait_for(lambda: entry()["state"] == "following", "it follows")
        before = entry()["freeze"]["count"]
        with mount.disk().open("r+b") as disk:
            disk.write(b"x" * (8 << 20))
        wait_for(lambda: entry()["freeze"]["count"] > before, "the guest was frozen")
        wait_for(lambda: (store / "r/disk.img").read_bytes() == image.read_bytes(), "it is sent")
        # While a pass is applied the point before it is gone, and there may be none.
        wait_for(lambda: [p["frozen"] for p in points()][-1:] == [True], "a point has the freeze")
        # A point of an agent that does not answer is none like that.
        agent.greeting, agent.silent = b"", True
        with mount.disk().open("r+b") as disk:
            disk.write(b"y" * 4096)
        wait_for(
            lambda: [p["frozen"] for p in points()][-1:] == [False], "a point has no freeze", 60
        )
        agent.silent = False
    assert "the guest was frozen for" in (tmp_path / "start.log").read_text()
    assert not agent.frozen


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("vss:/s", None, None), "qga:SOCKET"),
        (("qga:", None, None), "qga:SOCKET"),
        (("qga:/s", "a", "b"), "either"),
        ((None, "a", None), "go together"),
        ((None, None, "b"), "go together"),
    ],
)
def test_wrong_options_are_refused(words: tuple[str | None, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        freeze_settings(*words, 60)
