"""The room that a journal needs is looked at before the pass is sent."""

import os

from conftest import wait_for
from test_clones import MakeFilesystem, filesystem
from test_replication import CHUNK, SIZES, Pair, guest_write, pair

__all__ = ["filesystem", "pair"]
MIB = 1 << 20


def test_a_pass_that_would_not_fit_is_not_sent(filesystem: MakeFilesystem, pair: Pair) -> None:
    pair.store = filesystem("ext4")
    receiver = pair.receive()
    sender = pair.start()
    pair.wait_following(sender)
    pair.wait_identical()
    before = [pair.replica(disk).read_bytes() for disk in range(2)]
    ballast = pair.store / "ballast"
    with ballast.open("wb") as file:
        room = os.statvfs(pair.store)
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - MIB)
    for at in range(0, SIZES[0], 16 * CHUNK):
        guest_write(pair.mount.disk(), os.urandom(min(16 * CHUNK, SIZES[0] - at)), at)

    def error() -> str:
        return pair.status()["error"] or ""

    wait_for(lambda: "for its journal and there are" in error(), "status says what is missing")
    assert "for its journal" in receiver.said and "for its journal" in sender.said
    assert [pair.replica(disk).read_bytes() for disk in range(2)] == before
    ballast.unlink()
    pair.wait_identical()
    assert sender.popen.poll() is None
