"""What the tests of transports share."""

from pathlib import Path

from conftest import wait_for
from test_replication import Pair, Process


def receive(pair: Pair, address: str, *options: str | Path) -> Process:
    receiver = pair.run("receive", "--store", pair.store, *options, address)

    def listening() -> bool:
        assert receiver.popen.poll() is None, receiver.said
        return receiver.out.read_text().endswith("\n")

    wait_for(listening, "the receiver listens")
    pair.address = receiver.out.read_text().removeprefix("listening on ").strip()
    return receiver


def copy(pair: Pair, *options: str | Path) -> Process:
    sender = pair.start("--once", *map(str, options))
    assert sender.wait() == 0, sender.said
    assert pair.identical()
    return sender


def said_one_line(process: Process, reason: str, status: int = 1) -> None:
    assert process.wait() == status, process.said
    lines = [line for line in process.said.splitlines() if line.startswith("replicator: ")]
    assert len(lines) == 1 and reason in lines[0], process.said
    assert "Traceback" not in process.said
