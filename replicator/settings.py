"""What can be set on a sender while it runs."""

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from fusedisk.errors import UsageError
from replicator.captured import SPILL_BYTES
from replicator.compression import Method
from replicator.freeze import FreezeSettings
from replicator.link import SILENCE_SECONDS_MAX
from replicator.ratelimit import RATE_MIN

MAX_DOWNTIME_MS = 1000
"""The default bound on a cutover's downtime."""

# Fifteen chunks of the usual size.
SPILL_BYTES_MIN = 1 << 20

OnError: TypeAlias = Literal["wait", "stop"]
"""Whether a sender waits until a disk works again, or ends."""

Rpo = Annotated[float, Meta(ge=0.1, le=86400)]
Silence = Annotated[float, Meta(ge=2, le=3600)]
Downtime = Annotated[int, Meta(ge=1, le=3600_000)]
Spill = Annotated[int, Meta(ge=SPILL_BYTES_MIN, le=1 << 50)]
Every = Annotated[float, Meta(ge=1, le=366 * 86400)]
Compared = Annotated[int, Meta(ge=1, le=1 << 61)]
Bandwidth = Annotated[int, Meta(ge=RATE_MIN, le=1 << 61)]


class SenderSettings(msgspec.Struct, forbid_unknown_fields=True):
    """Seconds; bytes a second on the wire, None is no limit; milliseconds, None is the default."""

    rpo_seconds: Rpo = 5.0
    bandwidth: Bandwidth | None = None
    max_downtime_ms: Downtime | None = None
    compress: Method = "none"
    spill_bytes: Spill = SPILL_BYTES
    once: bool = False
    silence_seconds_max: Silence = SILENCE_SECONDS_MAX
    freeze: FreezeSettings | None = None
    verify_every: Every | None = None
    verify_bandwidth: Compared | None = None
    on_target_error: OnError = "wait"
    on_source_error: OnError = "wait"


class Changes(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A request to change settings; what is unset stays. A bandwidth of None lifts the limit."""

    rpo_seconds: Rpo | msgspec.UnsetType = msgspec.UNSET
    bandwidth: Bandwidth | msgspec.UnsetType | None = msgspec.UNSET
    max_downtime_ms: Downtime | msgspec.UnsetType = msgspec.UNSET

    def apply(self, settings: SenderSettings) -> None:
        """Change what is set."""
        for name in self.__struct_fields__:
            if (value := getattr(self, name)) is not msgspec.UNSET:
                setattr(settings, name, value)


def check_spill(size: int) -> int:
    """Raises UsageError for a spill in which hardly a chunk would fit."""
    if not SPILL_BYTES_MIN <= size <= 1 << 50:
        raise UsageError("--spill must be from 1MiB to 1024TiB")
    return size


def check_bandwidth(rate: int | None) -> int | None:
    """Raises UsageError for a rate at which nothing would get through."""
    if rate is not None and rate < RATE_MIN:
        raise UsageError(f"--bandwidth must be at least {RATE_MIN} bytes a second, or none")
    return rate
