"""Sessions whose disk hangs take nothing from the others; the receiver may have all it lets in."""

import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from replicator import messages as m
from replicator import receiver
from replicator.address import parse_address
from replicator.link import Link
from replicator.serving import receive
from replicator.store import Store
from replicator.transport.settings import Settings

# More than trio has threads, unless it is told to have more.
HUNG = 60
SECONDS_MAX = 60


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    """A soft limit that is too low, as it usually is; gives the hard one."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (900, before[1]))
    yield before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.trio
async def test_hung_sessions_leave_threads_to_the_others(
    tmp_path: Path,
    few_descriptors: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    go_on, hanging, real = threading.Event(), threading.Semaphore(0), receiver._open

    def hang_or_open(store: Store, hello: m.Hello, opening: m.Open) -> Any:
        if opening.name.startswith("hung"):
            hanging.release()
            go_on.wait(2 * SECONDS_MAX)
        return real(store, hello, opening)

    async def opened(name: str) -> None:
        async with await trio.open_unix_socket(tmp_path / "sock") as stream:
            link = Link(stream, "sender")
            await link.send(m.Hello([1], "replicate", 0))
            await link.expect(m.Welcome)
            disks = [m.DiskInfo("disk", 1 << 20, 65536)]
            await link.send(m.Open(name, "source", name, "generation", 1, disks))
            await link.expect(m.Opened)

    monkeypatch.setattr(receiver, "_open", hang_or_open)
    (tmp_path / "store").mkdir()
    with Store(tmp_path / "store") as store:
        address = parse_address(f"unix://{tmp_path}/sock")
        async with trio.open_nursery() as serving:
            serving.start_soon(receive, store, [address], Settings())
            try:
                with trio.fail_after(SECONDS_MAX):
                    while "listening" not in capsys.readouterr().out:
                        await trio.sleep(0.01)
                    async with trio.open_nursery() as senders:
                        for number in range(HUNG):
                            senders.start_soon(opened, f"hung{number}")
                        for _ in range(HUNG):
                            while not hanging.acquire(blocking=False):
                                await trio.sleep(0.01)
                        await opened("lively")
                        go_on.set()
            finally:
                go_on.set()
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == few_descriptors
            serving.cancel_scope.cancel()
