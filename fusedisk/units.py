"""Sizes as people write them."""

import re

from fusedisk.errors import UsageError

_FACTORS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
SIZE_MAX = 1 << 61


def parse_size(text: str) -> int:
    """Bytes from e.g. ``4096``, ``64KiB`` or ``1.5GiB``. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,20}(?:\.\d{1,6})?) ?([KMGT]iB|)", text, re.ASCII)
    if not match:
        raise UsageError(f"{text!r} is not a size; write bytes, or a number with KiB MiB GiB TiB")
    whole, _, fraction = match[1].partition(".")
    factor = _FACTORS[match[2]]
    size = int(whole) * factor + (int(fraction) * factor // 10 ** len(fraction) if fraction else 0)
    if size > SIZE_MAX:
        raise UsageError(f"{text!r} is larger than any disk can be")
    return size


def parse_rate(text: str) -> int | None:
    """Bytes a second from a size, with or without ``/s``; None for ``none`` or 0, no limit."""
    if text == "none":
        return None
    return parse_size(text.removesuffix("/s")) or None


def format_size(count: float) -> str:
    """Bytes for people, e.g. ``1.5 GiB``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
