"""The source burned down: the guest starts from the replica, and the old source stays out."""

import subprocess
from collections.abc import Callable
from pathlib import Path

from conftest import Mount, wait_for
from moving import REPLICATOR, Move
from recording_guest import check_disk

from fusedisk.fencing import read_fence


def test_a_guest_starts_from_the_promoted_replica(
    tmp_path: Path, fuse: Callable[..., Mount]
) -> None:
    move = Move(tmp_path, fuse(tmp_path / "disk0.img", tmp_path / "disk1.img"))
    try:
        move.target.close()
        before = move.source.numbers[-1]
        # An epoch that is closed from now on holds what was printed.
        closed = move.entry()["epoch"]["current"]
        wait_for(lambda: move.entry()["epoch"]["committed"] > closed, "it is at the target")
        # The host is gone, all at once.
        move.source.close()
        for process in (move.sender, move.receiver):
            process.kill()
            process.wait()
        move.mount.crash()
        lost_after = move.source.numbers[-1]

        done = run("promote", move.store / "r")
        assert done.returncode == 0, done.stderr
        away = fuse(*move.replicas, name="mnt-away")
        away.mount()
        guest = move.boot("away", [away.disk(0), away.disk(1)])
        guest.wait_for_records(3)
        first = guest.numbers[0]
        # A record may have been durable, and in the last epoch, that it did not come to print.
        assert before < first <= lost_after + 2, "more than the last moment is lost"
        guest.end()
        for disk, replica in enumerate(move.replicas):
            written = check_disk(replica)
            # The record under way at the instant is on the first disk, which is asked for the last
            # one, and may not have reached the second; nobody was told that it was durable.
            if disk and first - 1 > before and first - 1 not in written:
                written.insert(first - 2, first - 1)
            assert written == list(range(1, guest.numbers[-1] + 1))

        # The old source comes back, with a receiver that it reaches again.
        move.mount.mount()
        move.receiver = move.receive()
        refused = run("start", "--name", "r", move.mount.mountpoint, move.proxy.address)
        assert refused.returncode == 1 and "was promoted" in refused.stderr, refused.stderr
        settled = run("resolve", move.mount.mountpoint)
        assert (settled.returncode, settled.stdout) == (0, "promoted\n"), settled.stderr
        record = read_fence(move.mount.images)
        assert record is not None and record.state == "fenced"
    finally:
        move.close()


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [REPLICATOR, *words], check=False, capture_output=True, text=True, timeout=60
    )
