"""Compression of what is sent, which steps back where it does not pay.

It does not pay where the data does not shrink, or where compressing takes longer than sending
would: then the processor is the bottleneck and the link waits for it. Both are found out again and
again, at growing intervals, because a disk holds both kinds of data and links change.
"""

from collections.abc import Sequence
from typing import Literal

import zstandard

from replicator.messages import Data, Zero

Method = Literal["zstd", "none"]

_LEVEL = 1
# Saving less than this is not worth the receiver's work.
_SHRUNK_ENOUGH = 0.9
_SKIP_BYTES_MIN, _SKIP_BYTES_MAX = 1 << 20, 64 << 20
_BYTES_MIN = 512
# So much of what is sent in one go is packed in any case: it costs little, and buffers that take it
# at once would hide how fast the link is.
_BEGIN_BYTES = 16 << 20
# What was waited for data against what was waited for the link, over at least this much time.
_BOTTLENECK_RATIO = 2.0
_BOTTLENECK_SECONDS = 0.5
_FASTER_RATIO = 1.1
_KEPT_SECONDS_MIN, _KEPT_SECONDS_MAX = 1.0, 60.0


class Compressor:
    """Packs transfers of one sender; one thread packs while another says what was waited for."""

    def __init__(self, method: Method) -> None:
        self._on = method == "zstd"
        self._zstd = zstandard.ZstdCompressor(level=_LEVEL)
        self._skip_bytes = 0
        self._interval = _SKIP_BYTES_MIN
        self._way = _Way()
        self._asked_bytes = self._sent_bytes = 0
        self.raw_bytes = self.packed_bytes = 0

    def begin(self) -> None:
        """What comes now follows no other transfers; to be called while nothing is packed."""
        self._asked_bytes = self._sent_bytes = 0

    def pack(self, data: Data) -> Data:
        """The transfer, packed where that is on and pays; the digest is of the disk's bytes."""
        length = len(data.data)
        if not self._on or length < _BYTES_MIN:
            return data
        self._asked_bytes += length
        if not self._way.packing and self._asked_bytes > _BEGIN_BYTES:
            return data
        if self._skip_bytes >= length:
            self._skip_bytes -= length
            return data
        self._skip_bytes = 0
        packed = self._zstd.compress(data.data)
        if len(packed) > _SHRUNK_ENOUGH * length:
            self._skip_bytes = self._interval
            self._interval = min(2 * self._interval, _SKIP_BYTES_MAX)
            return data
        self._interval = _SKIP_BYTES_MIN
        self.raw_bytes += length
        self.packed_bytes += len(packed)
        return Data(data.disk, data.offset, data.digest, memoryview(packed), length)

    def waited(self, transfers: Sequence[Data | Zero], for_data: float, for_link: float) -> None:
        """Say how many seconds the sender waited for transfers, and how many the link took them."""
        data = [one for one in transfers if isinstance(one, Data)]
        if not self._on or not data:
            return
        count = sum(one.length for one in data)
        self._sent_bytes += count
        packed = any(one.packed_from for one in data)
        # What does not shrink, or was prepared before the way was changed, says nothing of it.
        if self._sent_bytes > _BEGIN_BYTES and packed == self._way.packing:
            self._way.sent(count, for_data, for_link)


class _Way:
    """Whether to pack: the way that is faster is kept, and the other tried at growing intervals."""

    def __init__(self) -> None:
        self.packing = True
        self._trying = False
        self._other_rate = 0.0
        self._interval = _KEPT_SECONDS_MIN
        self._kept = 0.0
        self._count, self._reading, self._sending = 0, 0.0, 0.0

    def sent(self, count: int, for_data: float, for_link: float) -> None:
        """So many bytes of a disk went this way."""
        self._count += count
        self._reading += for_data
        self._sending += for_link
        seconds = self._reading + self._sending
        if seconds < _BOTTLENECK_SECONDS:
            return
        link_waits = self._reading > _BOTTLENECK_RATIO * self._sending
        rate = self._count / seconds
        self._count, self._reading, self._sending = 0, 0.0, 0.0
        self._kept -= seconds
        if self._trying:
            self._trying = False
            self._decide(rate)
        elif self._worth_a_try(rate, link_waits):
            self._trying = True
            self._turn(rate)

    def _worth_a_try(self, rate: float, link_waits: bool) -> bool:
        if self.packing:
            # A link that is busy with packed data has nothing to gain from more bytes.
            return link_waits and self._kept <= 0
        # Also where the link has become slower than packing was.
        return self._kept <= 0 or _FASTER_RATIO * rate < self._other_rate

    def _decide(self, rate: float) -> None:
        if rate > _FASTER_RATIO * self._other_rate:
            # Only a change of link, data or processor shows so.
            self._interval = _KEPT_SECONDS_MIN
        else:
            self._turn(rate)
            self._interval = min(2 * self._interval, _KEPT_SECONDS_MAX)
        self._kept = self._interval

    def _turn(self, rate: float) -> None:
        self.packing, self._other_rate = not self.packing, rate
