"""The proof that the target's disk still keeps what it is given, asked for by every Ping."""

from collections.abc import Callable

import trio

_PROOF_SECONDS = 4.0


class DiskProof:
    """Makes a small durable write, by ``prove`` on a thread, at most every few seconds."""

    def __init__(self, prove: Callable[[], None]) -> None:
        self._prove = prove
        self._proving = trio.Lock()
        self._proven_at = float("-inf")

    async def recent(self) -> None:
        """Return once the disk has answered a little while ago. Raises OSError."""
        async with self._proving:
            if trio.current_time() < self._proven_at + _PROOF_SECONDS:
                return
            await trio.to_thread.run_sync(self._prove)
            self._proven_at = trio.current_time()
