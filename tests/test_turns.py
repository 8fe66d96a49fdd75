"""Large writes that take turns: all of them end, and each changes its own range only."""

import random
import threading
from collections.abc import Callable
from pathlib import Path

from conftest import Mount
from direct import write_direct

PAGE = 4096
MIB = 1 << 20
WRITERS = 6
WRITES = 150
# Of a test that hangs, not of one that works, which takes a second.
SECONDS_AT_MOST = 60


class Writer(threading.Thread):
    """Writes into 2 MiB of its own, and knows what has to be there."""

    def __init__(self, disk: Path, number: int) -> None:
        super().__init__(daemon=True)
        self.disk, self.start_at = disk, 2 * MIB * number
        self.random = random.Random(number)
        self.content = bytearray(2 * MIB)

    def run(self) -> None:
        for _ in range(WRITES):
            # From one that takes no turn to the longest.
            length = self.random.randrange(PAGE, MIB + 1, PAGE)
            at = self.random.randrange(0, 2 * MIB - length + 1, PAGE)
            data = self.random.randbytes(PAGE) * (length // PAGE)
            write_direct(self.disk, data, self.start_at + at)
            self.content[at : at + length] = data


def test_writers_that_take_turns_all_end(fuse: Callable[..., Mount], tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(2 * MIB * WRITERS))
    mount = fuse(image)
    mount.mount()
    writers = [Writer(mount.disk(), number) for number in range(WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(SECONDS_AT_MOST)
        assert not writer.is_alive()
    assert image.read_bytes() == b"".join(writer.content for writer in writers)
