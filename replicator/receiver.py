"""The receiving end: one session for each connection, one ordered worker for each session.

The reader task only queues; the worker does everything in the order of the wire, so that an answer
(Committed, Pong, Hashes) means that all before it was done. A committed pass is applied to the
images by a thread, while the worker receives the next one.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeAlias, TypeVar, TypeVarTuple

import trio

from fusedisk.errors import FuseDiskError
from replicator import messages as m
from replicator.active import Active
from replicator.admission import Admission
from replicator.beating import Beat, saying_that_it_lives
from replicator.eventqueue import EventQueue
from replicator.failures import failure_code
from replicator.link import Link, LinkLost, say_last
from replicator.manifest import ReplicaDisk, read_manifest
from replicator.proving import DiskProof
from replicator.reaching import Reached
from replicator.reading import serve_reads
from replicator.records import Piece
from replicator.replica import Replica
from replicator.running import one_error
from replicator.store import ReplicaBusy, Store, check_replica_name
from replicator.transfers import TransferDigest
from replicator.transport.tls import NOT_TLS_ALERT
from replicator.turns import Turn, ask_for_turn, read_turn

log = logging.getLogger("replicator.receiver")

_TURN_SECONDS_MAX = 20.0
_TURN_POLL_SECONDS = 0.5
# Questions that a session may have waiting for the disk; an honest sender waits for each answer.
_PINGS_MAX = 16
# Of data that is written in one go.
_PIECES_BYTES_MAX = 4 << 20

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")
Authenticate: TypeAlias = Callable[[], Awaitable[str | None]]
"""Finds out who the peer is: what to refuse it with, or None. Raises trio.BrokenResourceError."""


class Receiver:
    """Sessions over one store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._active: dict[str, Active] = {}
        self._admission = Admission()

    async def serve(
        self, stream: trio.abc.Stream, authenticate: Authenticate | None = None
    ) -> None:
        """Run one session to its end; errors of the peer end the session, never the receiver."""
        link = Link(stream, "receiver")
        try:
            with self._admission.connection():
                await self._session(link, authenticate)
        except LinkLost as error:
            log.info("session ended: %s", error)
        except m.PeerSpeaksTls as error:
            log.warning("session refused: %s", error)
            await link.send_alert(NOT_TLS_ALERT)
        except (m.RemoteProtocolError, FuseDiskError, OSError) as error:
            log.warning("session ended: %s", error)
            await say_last(link, m.Failed(failure_code(error), str(error)[:1000]))
            await link.drain()
        except m.LocalProtocolError as error:
            # The peer said goodbye while an answer to it was made.
            log.info("session ended: %s", error)
        except trio.Cancelled:
            await say_last(link, m.Bye())
            raise
        finally:
            await link.close()

    async def _session(self, link: Link, authenticate: Authenticate | None) -> None:
        with self._admission.opening():
            refusal = await _authenticated(authenticate)
            hello = await link.expect(m.Hello)
            if refusal is not None:
                raise FuseDiskError(refusal)
            if 1 not in hello.versions:
                raise FuseDiskError("no protocol version in common; upgrade the older side")
            await link.send(m.Welcome(1))
            opening = await link.receive()
        if isinstance(opening, m.Resolve):
            await self._resolve(link, opening)
            return
        if isinstance(opening, m.Restore):
            await serve_reads(link, self._store, opening, hello.seed)
            return
        if not isinstance(opening, m.Open):
            raise LinkLost("the sender asked for nothing")
        active = await self._claim(link, opening)
        try:
            with active.scope:
                await self._run(link, hello, opening, active)
            if active.scope.cancelled_caught:
                raise LinkLost("a newer session of the same source took over")
        finally:
            del self._active[opening.name]
            active.ended.set()

    async def _resolve(self, link: Link, asked: m.Resolve) -> None:
        """Say how a cutover ended; where it had not happened, it now never will.

        Without a token it only says whether there was a promotion, and disturbs nobody.
        """
        if asked.token is None:
            await link.send(await trio.to_thread.run_sync(_promotion, self._store, asked))
            return
        active = await self._claim(link, asked)
        try:
            async with saying_that_it_lives(link):
                answer, _ = await self._taking_turns(asked, _settle, self._store, asked)
            await link.send(answer)
        finally:
            del self._active[asked.name]
            active.ended.set()

    async def _claim(self, link: Link, opening: m.Open | m.Resolve) -> Active:
        while (older := self._active.get(opening.name)) is not None:
            async with saying_that_it_lives(link):
                await older.give_way(opening)
        active = Active(link, opening)
        self._active[opening.name] = active
        return active

    async def _run(self, link: Link, hello: m.Hello, opening: m.Open, active: Active) -> None:
        replica: Replica | None = None
        try:
            async with saying_that_it_lives(link):
                replica, turn = await self._taking_turns(
                    opening, _open, self._store, hello, opening
                )
            assert replica is not None
            manifest = replica.manifest
            await link.send(await trio.to_thread.run_sync(_opened, replica))
            at = "" if manifest.epoch is None else f" at epoch {manifest.epoch}"
            log.info("replica %s: %s%s", opening.name, manifest.state, at)
            queue, work = EventQueue(), Work(link, replica)
            with one_error():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._give_way, opening, turn, active)
                    nursery.start_soon(_read, link, queue, active.pong, work.store)
                    await _work(work, queue, hello.seed, opening.generation, nursery)
                    nursery.cancel_scope.cancel()
        finally:
            if replica is not None:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(replica.close)

    async def _taking_turns(
        self,
        opening: m.Open | m.Resolve,
        work: Callable[[*Arguments], Result],
        *arguments: *Arguments,
    ) -> tuple[Result, Turn | None]:
        """Run ``work`` on a thread, asking another process of the same source to end for it.

        Returns its result and the turn it was done under. Raises ReplicaBusy, and what it raises.
        """
        store, name = self._store.path, opening.name
        check_replica_name(name)
        # Before the lock: a request that comes after this is for us to heed.
        turn = await trio.to_thread.run_sync(read_turn, store, name)
        asked = False
        deadline = trio.current_time() + _TURN_SECONDS_MAX
        while True:
            try:
                return await trio.to_thread.run_sync(work, *arguments), turn
            except ReplicaBusy:
                if trio.current_time() > deadline:
                    raise
            if not asked:
                await trio.to_thread.run_sync(_require_source, self._store, opening)
                turn = await trio.to_thread.run_sync(ask_for_turn, store, name, opening.source_id)
                asked = True
            await trio.sleep(_TURN_POLL_SECONDS / 2)

    async def _give_way(self, opening: m.Open, turn: Turn | None, active: Active) -> None:
        while True:
            await trio.sleep(_TURN_POLL_SECONDS)
            last = await trio.to_thread.run_sync(read_turn, self._store.path, opening.name)
            if last is None or last == turn or last.source_id != opening.source_id:
                continue
            if last.by == "session":
                raise LinkLost("a newer session of the same source took over")
            if last.by == "force" or not await active.alive():
                raise LinkLost("the replica is being promoted")
            # A sender that answers is a source that is not gone: it keeps the replica.
            turn = last


def _require_source(store: Store, opening: m.Open | m.Resolve) -> None:
    manifest = read_manifest(store.replica_path(opening.name))
    if manifest is not None and manifest.source_id != opening.source_id:
        raise FuseDiskError(
            f"replica {opening.name} is receiving from another source; choose another name"
        )


async def _authenticated(authenticate: Authenticate | None) -> str | None:
    if authenticate is None:
        return None
    try:
        return await authenticate()
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise LinkLost(str(error) or "the connection was lost") from None


class Work:
    """What a session does with its transfers, one thread at a time."""

    def __init__(self, link: Link, replica: Replica) -> None:
        self.link, self.replica = link, replica
        self.beat = Beat(link)
        self.digest = TransferDigest()
        """Over the transfers of the pass."""

    def store(self, transfers: Sequence[m.Data | m.Zero]) -> None:
        """Take transfers in; a thread's work. Raises RemoteProtocolError, FuseDiskError."""
        with self.beat.working():
            for transfer in transfers:
                self.digest.add(transfer)
            _store(self.replica, transfers)


async def _read(
    link: Link,
    queue: EventQueue,
    on_pong: Callable[[], None],
    store: Callable[[Sequence[m.Data | m.Zero]], None],
) -> None:
    event: m.Event | None = None
    while True:
        if event is None:
            event = await link.receive()
        with link.unread():
            if isinstance(event, m.Data | m.Zero) and link.on_threads and queue.transfers_only:
                # One thread that receives and stores many wakes nobody between the two.
                await queue.idle()
                event = await link.take_transfers(event, store)
                continue
            if isinstance(event, m.Pong):
                on_pong()
            else:
                await queue.put(event)
            if isinstance(event, m.Bye | m.Failed):
                return
            event = None


async def _work(
    work: Work, queue: EventQueue, seed: int, generation: str, nursery: trio.Nursery
) -> None:
    link, replica = work.link, work.replica
    reached = Reached(replica, nursery)
    proof = DiskProof(replica.prove)
    answering = trio.Semaphore(_PINGS_MAX)
    nursery.start_soon(work.beat.keep)
    while True:
        with work.beat.resting():
            event = await queue.take()
        match event:
            case list():
                await trio.to_thread.run_sync(work.store, event)
                for transfer in event:
                    if isinstance(transfer, m.Data):
                        link.recycle(transfer.data)
            case m.HashRequest():
                hashes = await trio.to_thread.run_sync(_hash, replica, event, seed)
                await link.send(hashes)
            case m.Checkpoint():
                _require_equal(event, work.digest)
                reached.note(event.reached)
            case m.Begin():
                work.digest = TransferDigest(replica.kept if event.continues else b"")
                begin = partial(
                    replica.begin,
                    *(event.epoch, generation, event.data_bytes),
                    continues=event.continues,
                    based=event.kind == "pass",
                    root=event.root,
                )
                await trio.to_thread.run_sync(begin)
            case m.Commit():
                _require_equal(event, work.digest)
                await trio.to_thread.run_sync(_commit, replica, event)
                await link.send(m.Committed(event.generation, event.epoch))
                # Beside the next pass; commit, promote and hashes wait for it.
                nursery.start_soon(trio.to_thread.run_sync, replica.apply)
            case m.Promote():
                promised = event.token, event.epoch, event.root
                await trio.to_thread.run_sync(replica.promote, *promised)
                await link.send(m.Promoted(event.token, event.epoch))
            case m.Abort():
                await trio.to_thread.run_sync(replica.abort, event.token)
                await link.send(m.Aborted(event.token))
            case m.Ping():
                # In its turn, so that it says that all before is written; but a disk that is slow
                # to answer holds up nothing else, unless the peer asks without waiting.
                await answering.acquire()
                nursery.start_soon(_answer, link, proof, event.nonce, answering)
            case m.Bye() | m.Failed():
                # What was committed last may not have begun to be applied.
                await trio.to_thread.run_sync(replica.apply)
                return


def _open(store: Store, hello: m.Hello, opening: m.Open) -> Replica:
    if hello.purpose == "verify" and read_manifest(store.replica_path(opening.name)) is None:
        raise FuseDiskError(f"there is no replica {opening.name} in the store; start it first")
    disks = [ReplicaDisk(d.name, d.size, d.chunk_size) for d in opening.disks]
    return Replica.open(store, opening.name, opening.source_id, disks)


def _promotion(store: Store, asked: m.Resolve) -> m.Promoted | m.Aborted:
    """Whether a replica of the source is promoted. Raises FuseDiskError where there is none."""
    manifest = read_manifest(store.replica_path(asked.name))
    if manifest is None:
        raise FuseDiskError(f"there is no replica {asked.name} in the store")
    if manifest.source_id != asked.source_id:
        raise FuseDiskError(f"replica {asked.name} is of another source")
    if manifest.state == "promoted":
        return m.Promoted(manifest.token or "", manifest.epoch or 0)
    return m.Aborted(None)


def _settle(store: Store, asked: m.Resolve) -> m.Promoted | m.Aborted:
    assert asked.token is not None
    with Replica.load(store, asked.name) as replica:
        manifest = replica.manifest
        if manifest.source_id != asked.source_id:
            raise FuseDiskError(f"replica {asked.name} is of another source")
        if manifest.state == "promoted":
            # Also by another decision than the one asked about: the source must not write again.
            return m.Promoted(manifest.token or asked.token, manifest.epoch or 0)
        # Invariant: the token is void durably before the source may write again.
        replica.abort(asked.token)
        return m.Aborted(asked.token)


def _commit(replica: Replica, pass_: m.Commit) -> None:
    replica.commit(pass_.generation, pass_.epoch, consistent=pass_.consistent, frozen=pass_.frozen)


def _store(replica: Replica, transfers: Sequence[m.Data | m.Zero]) -> None:
    pieces: list[Piece] = []
    held = 0
    for transfer in transfers:
        if isinstance(transfer, m.Data):
            # Invariant: nothing is written that is not what the sender read.
            content = memoryview(transfer.content())
            pieces.append(Piece(transfer.disk, transfer.offset, content, transfer.digest))
            # What was compressed may be more than the queue holds.
            held += content.nbytes
        if pieces and (held >= _PIECES_BYTES_MAX or isinstance(transfer, m.Zero)):
            replica.write_many(pieces)
            pieces, held = [], 0
        if isinstance(transfer, m.Zero):
            replica.zero(transfer.disk, transfer.offset, transfer.length)
    if pieces:
        replica.write_many(pieces)


async def _answer(link: Link, proof: DiskProof, nonce: int, answering: trio.Semaphore) -> None:
    try:
        await proof.recent()
        # An answer that is cut short would leave half a frame behind.
        with trio.CancelScope(shield=True):
            await link.send(m.Pong(nonce))
    finally:
        answering.release()


def _opened(replica: Replica) -> m.Opened:
    manifest, filled = replica.manifest, replica.filled
    state = "new" if replica.status == "new" else manifest.state
    point = manifest.generation, manifest.epoch
    reached, received = None, []
    if filled is not None and not filled.based:
        reached = m.Reached(filled.generation, filled.epoch, filled.disk, filled.offset)
    if (of := replica.towards) is not None:
        received = [m.Reached(of, c.epoch, c.disk, c.offset) for c in replica.claims]
    if replica.received is not None and replica.received.compared:
        reached = received[0]
    return m.Opened(
        *(state, *point, manifest.token, manifest.applying, reached, received),
        root=bytes.fromhex(manifest.root or "") or None,
        kept=replica.kept or None,
        room=replica.room_for_rest() if replica.kept_bytes else None,
        kept_bytes=replica.kept_bytes,
    )


def _require_equal(said: m.Checkpoint | m.Commit, digest: TransferDigest) -> None:
    # Invariant: nothing is noted or committed that is not what was sent, in that order.
    if (said.transfers, said.digest) != (digest.count, digest.value()):
        raise m.RemoteProtocolError("the pass is not the one that was sent")


def _hash(replica: Replica, asked: m.HashRequest, seed: int) -> m.Hashes:
    segments = [
        m.Segment(s.offset, s.length, s.zero, s.digests)
        for s in replica.hashes(asked.disk, asked.offset, asked.length, seed, m.HASH_BLOCK_BYTES)
    ]
    return m.Hashes(asked.disk, asked.offset, asked.length, segments)
