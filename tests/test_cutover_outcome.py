"""What `cutover --json` says of a cutover that was refused: never more than is known to be true."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_for
from test_cutover import BIN, Pair, run


@pytest.fixture
def pair(tmp_path: Path, fuse: None) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    made.close()


def refused(pair: Pair, *words: str) -> dict[str, Any]:
    """The object on the last line of a cutover that ends with status 1 and one line of error."""
    result = run("replicator", "cutover", "--json", *words, pair.mountpoint, check=False)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert found.keys() >= {"outcome", "downtime_ms", "phases", "epoch"}
    return found | {"said": result.stderr}


def test_without_a_sender_nothing_was_changed(pair: Pair) -> None:
    pair.sender.kill()
    pair.sender.wait()
    found = refused(pair)
    assert found["outcome"] == "rolled-back" and "no running sender" in found["said"]
    pair.write(b"the guest goes on")


def test_a_cutover_beside_another_one_knows_nothing_of_its_end(pair: Pair, tmp_path: Path) -> None:
    began, go_on = tmp_path / "began", tmp_path / "go_on"
    before = f"touch {began}; while [ ! -e {go_on} ]; do sleep 0.1; done; exit 1"
    words = (BIN / "replicator", "cutover", "--json", "--before", before, pair.mountpoint)
    first = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_for(began.exists, "the first cutover has begun")
        found = refused(pair)
        assert found["outcome"] == "unknown" and "another cutover is under way" in found["said"]
    finally:
        go_on.touch()
        said, _ = first.communicate(timeout=60)
    assert json.loads(said)["outcome"] == "rolled-back"
    pair.wait_for_state("following")
    pair.write(b"the guest goes on")


def test_a_source_that_was_left_is_nothing_to_go_back_to(pair: Pair) -> None:
    words = ("start", "--name", "s", "--rpo", "0.2", pair.mountpoint, pair.address)
    other = subprocess.Popen([BIN / "replicator", *words], stderr=subprocess.DEVNULL)
    try:
        copy = pair.store / "s" / ".fusedisk" / "manifest.json"
        wait_for(lambda: copy.exists() and b'"following"' in copy.read_bytes(), "both follow")
        run("replicator", "cutover", "--name", "r", "--max-downtime", "5000", pair.mountpoint)
        found = refused(pair, "--name", "s")
        assert found["outcome"] == "unknown"
        assert f"r at {pair.address} is the disk already" in found["said"]
        pause = ("replicator", "pause", "--name", "s", pair.mountpoint)
        # Refused for a moment, as the cutover that was refused ends.
        wait_for(lambda: run(*pause, check=False).returncode == 0, "it is paused")
        assert refused(pair, "--name", "s")["outcome"] == "unknown"
    finally:
        other.kill()
        other.wait()
    found = refused(pair, "--name", "s")
    assert found["outcome"] == "unknown" and "is the disk already" in found["said"]
    # Asked again, since the first answer may have been lost.
    result = run("replicator", "cutover", "--json", "--name", "r", pair.mountpoint)
    assert json.loads(result.stdout)["outcome"] == "promoted"
