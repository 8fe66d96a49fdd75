"""What opening a backing image does to the page cache, on which the speed of small writes hangs."""

import os
import subprocess
from pathlib import Path

import pytest

from fusedisk.image import open_image


def cached_bytes(path: Path) -> int:
    words = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def test_an_opened_image_is_cached_page_by_page(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.write(os.urandom(4 << 20))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_bytes(path):
        pytest.skip("a file system that lives in the page cache")
    path.read_bytes()
    assert cached_bytes(path) == 4 << 20
    image = open_image(path, read_only=False)
    try:
        assert cached_bytes(path) == 0
        os.pread(image.fd, 4096, 1 << 20)
        assert cached_bytes(path) == 4096
    finally:
        os.close(image.fd)
