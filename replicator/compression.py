"""Compression of what is sent, which steps back where it does not pay.

It does not pay where the data does not shrink, or where compressing takes longer than sending
would: then the processor is the bottleneck and the link waits for it. Both are found out again and
again, at growing intervals, because a disk holds both kinds of data and links change.
"""

from typing import Literal

import zstandard

from replicator.messages import Data

Method = Literal["zstd", "none"]

_LEVEL = 1
# Saving less than this is not worth the receiver's work.
_SHRUNK_ENOUGH = 0.9
_SKIP_BYTES_MIN, _SKIP_BYTES_MAX = 1 << 20, 64 << 20
_BYTES_MIN = 512
# What was waited for data against what was waited for the link, over at least this much time.
_BOTTLENECK_RATIO = 2.0
_BOTTLENECK_SECONDS = 0.5


class Compressor:
    """Packs transfers of one sender; used by one thread at a time. Times are in seconds."""

    def __init__(self, method: Method) -> None:
        self._on = method == "zstd"
        self._zstd = zstandard.ZstdCompressor(level=_LEVEL)
        self._skip_bytes = 0
        self._interval = _SKIP_BYTES_MIN
        self._reading = self._sending = 0.0
        self.raw_bytes = self.packed_bytes = 0

    def pack(self, data: Data) -> Data:
        """The transfer, packed where that is on and pays; the digest is of the disk's bytes."""
        length = len(data.data)
        if not self._on or length < _BYTES_MIN:
            return data
        if self._skip_bytes >= length:
            self._skip_bytes -= length
            return data
        self._skip_bytes = 0
        packed = self._zstd.compress(data.data)
        if len(packed) > _SHRUNK_ENOUGH * length:
            self._step_back()
            return data
        self._interval = _SKIP_BYTES_MIN
        self.raw_bytes += length
        self.packed_bytes += len(packed)
        return Data(data.disk, data.offset, data.digest, memoryview(packed), length)

    def waited(self, for_data: float, for_link: float) -> None:
        """Say how long the sender waited for the next data, and how long the link took it."""
        self._reading += for_data
        self._sending += for_link
        if self._reading + self._sending < _BOTTLENECK_SECONDS:
            return
        if self._reading > _BOTTLENECK_RATIO * self._sending and self._skip_bytes <= 0:
            self._step_back()
        self._reading = self._sending = 0.0

    def _step_back(self) -> None:
        self._skip_bytes = self._interval
        self._interval = min(2 * self._interval, _SKIP_BYTES_MAX)
