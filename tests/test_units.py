"""Sizes as people write them, and what is refused."""

import pytest

from fusedisk.errors import UsageError
from fusedisk.units import SIZE_MAX, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64KiB", 65536),
        ("64 KiB", 65536),
        ("1MiB", 1 << 20),
        ("1.5GiB", 3 << 29),
        ("0.5KiB", 512),
        ("2TiB", 2 << 40),
        (str(SIZE_MAX), SIZE_MAX),
    ],
)
def test_reads_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "x",
            "-1",
            "1KB",
            "1k",
            "1e9",
            "0x10",
            "1.KiB",
            ".5GiB",
            "1  KiB",
            "1KiB\n",
            "nan",
            "٣",
        ),
        *("9" * 21, str(SIZE_MAX + 1), "99999999TiB"),
    ],
)
def test_refuses_what_is_not_a_size(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)
