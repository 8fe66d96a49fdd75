"""A guest, the sender of its disks, a link and a target, as they are while nothing fails."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import trio
from session_checks import REPLICA, Acknowledged, Wrong, check_one_side, promoted
from simulated_mount import CHUNK, Fenced, SimulatedMount
from simulated_network import SimulatedNetwork
from simulated_process import Process, Threads
from simulated_target import SimulatedTarget

from fusedisk.errors import FuseDiskError
from fusedisk.fencing import read_fence
from replicator.address import UnixAddress
from replicator.following import Follower
from replicator.handover import OutcomeUnknown, asking, settle, settling
from replicator.link import LinkLost
from replicator.messages import RemoteProtocolError
from replicator.settings import SenderSettings
from replicator.source import Source


class World:
    """What there is, in the empty directory ``scratch``; all goes by ``seed``."""

    link_timeout_seconds = 10.0
    once = False

    def __init__(self, scratch: Path, seed: int) -> None:
        self.seed = seed
        self._rng = random.Random(seed)
        self.trace: list[str] = []
        self.scratch = scratch
        (scratch / "source").mkdir()
        self.mount = SimulatedMount(scratch / "source", self._rng)
        self.network = SimulatedNetwork(self._rng)
        self.threads = Threads(self._rng)
        self.told = Acknowledged()
        self.target = SimulatedTarget(scratch / "target", self._rng, self.network)
        self.follower: Follower | None = None
        self._sender: Process | None = None
        self._guest_runs = True

    def note(self, text: str) -> None:
        """Add a line to the trace."""
        self.trace.append(f"{trio.current_time() - self._began:9.3f} {text}")

    def begin(self) -> None:
        """Mount the disks, and choose how fast everything is. Called under the clock."""
        self._began = trio.current_time()
        self.note(f"mounted: {self.mount.mount()}")
        rng = self._rng
        self.network.delay_seconds_max = rng.choice((0.0, 0.002, 0.05, 0.3))
        self.threads.seconds_max = rng.choice((0.0, 0.001, 0.02))
        self.target.threads.seconds_max = rng.choice((0.0, 0.001, 0.02, 0.2))
        self._rpo = rng.choice((0.2, 1.0, 5.0))
        self._spill_bytes = rng.choice((1 << 14, 1 << 16, 1 << 20))
        self._pause_max = rng.choice((0.1, 1.0, 4.0))

    @contextlib.contextmanager
    def in_little_pieces(self) -> Iterator[None]:
        """The disks are small: what they have is sent in as many batches as of larger ones."""
        with (
            mock.patch("replicator.passing._CHECKPOINT_SECONDS", self._rng.choice((0.0, 0.1, 2.0))),
            mock.patch("replicator.transfers.DATA_BYTES_MAX", 2 * CHUNK),
            mock.patch("replicator.batches._PIECES_MAX", 1),
            contextlib.ExitStack() as stack,
        ):
            # Blocks larger than chunks, and several windows of them in a disk.
            for module in ("messages", "transfers", "verify", "proof", "lineage", "checkpoints"):
                stack.enter_context(mock.patch(f"replicator.{module}.HASH_BLOCK_BYTES", 2 * CHUNK))
            for module in ("messages", "verify"):
                stack.enter_context(mock.patch(f"replicator.{module}.HASH_LENGTH_MAX", 4 * CHUNK))
            yield

    async def _guest(self) -> None:
        rng = self._rng
        while True:
            await trio.sleep(rng.random() * self._pause_max)
            if not (self._guest_runs and self.mount.mounted):
                continue
            self.mount.tend()
            for _ in range(rng.choice((1, 1, 2, 6))):
                disk = rng.randrange(2)
                if rng.random() < 0.1:
                    self.mount.flush(disk)
                size = len(self.mount.content[disk])
                start = rng.choice((rng.randrange(size), rng.randrange(size) // 4096 * 4096))
                length = min(size - start, rng.choice((1, 512, 4096, 9000)))
                data = bytes(length) if rng.random() < 0.2 else rng.randbytes(length)
                try:
                    written = self.mount.write(disk, start, data)
                except Fenced:
                    break
                if written:
                    check_one_side(self.mount, self.target.root)

    async def _sending(self) -> None:
        """Start the sender whenever it is not there."""
        while True:
            await trio.sleep(0.1)
            fenced = self.mount.mounted and self.mount.control.fenced
            if not self.mount.mounted or (promoted(self.target.root) and fenced):
                continue
            process = Process("sender", self.threads)
            self._sender = process
            async with trio.open_nursery() as nursery:
                nursery.start_soon(process.run, self._send)
            self._sender = self.follower = None
            self.note("the sender is gone")

    async def _send(self) -> None:
        with mock.patch("replicator.source.find_state", lambda _: self.mount.state):
            source = Source(self.mount.mountpoint)
        settings = SenderSettings(
            rpo_seconds=self._rpo,
            once=self.once,
            spill_bytes=self._spill_bytes,
            silence_seconds_max=self.link_timeout_seconds,
        )
        try:
            if read_fence(self.mount.paths) is not None:
                # Whoever had begun a cutover is gone; somebody notices, sooner or later.
                await trio.sleep(self._rng.random() * 5)
                await self._resolve(source)
            follower = Follower(
                source, REPLICA, UnixAddress("/sim"), self.network.connect, settings
            )
            self.follower = follower

            def acknowledged() -> None:
                if follower.committed is not None:
                    self.told.note(source.record.generation, follower.committed)

            follower.on_change = acknowledged
            await follower.run()
        except OutcomeUnknown as error:
            self.note(f"unknown: {error}")
            await self._resolve(source)
        except FuseDiskError as error:
            self.note(f"the sender ended: {error}")
            if not promoted(self.target.root) and "the mount is gone" not in str(error):
                raise Wrong(f"the sender gave up: {error}") from error
        finally:
            source.close()

    async def _resolve(self, source: Source) -> None:
        """As `replicator resolve`, again and again."""
        while self.mount.mounted:
            try:
                with settling(source) as record:
                    if record is None:
                        return
                    if record.state == "fenced":
                        return
                    outcome = await asking(self.network.connect, source.record.source_id)(record)
                    settle(source, self.mount.paths, record, outcome)
                    self.note(f"resolved: {outcome}")
                    return
            except (
                *(LinkLost, OSError, trio.TooSlowError, trio.BrokenResourceError),
                *(FuseDiskError, RemoteProtocolError),
            ) as error:
                self.note(f"not resolved: {error}")
            await trio.sleep(1)
