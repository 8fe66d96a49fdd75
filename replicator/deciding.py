"""What is decided about a replica: to be the disk, to be an older point, to stay a replica."""

from __future__ import annotations

import time

import msgspec

from fusedisk.errors import FuseDiskError
from fusedisk.image import stamp
from replicator.clones import preserve
from replicator.manifest import MAX_ABORTED_TOKENS, check_epoch, check_text, clear_errors
from replicator.promotion import clear_image_fences, rollback_clones, rollback_journal
from replicator.room import BoundedReplica


class OtherRoot(FuseDiskError):
    """The replica is not what was sent."""


class DecidableReplica(BoundedReplica):
    """Promotion, going back to a point, and cutovers that are void."""

    def promote(self, token: str, epoch: int, root: bytes | None = None) -> None:
        """Make the replica authoritative at `epoch` for the cutover `token`; durable on return.

        Repeating it with the same token and epoch changes nothing. Raises FuseDiskError if the
        replica is not at rest at that epoch, the token was aborted, or it is promoted otherwise;
        OtherRoot if it has not the `root` given.
        """
        check_text("cutover token", token)
        check_epoch(epoch)
        with self._at_rest(), self._excluding():
            manifest = self._manifest
            what = f"replica {self.name!r} cannot be promoted"
            if manifest.state == "promoted" and manifest.token != token:
                raise FuseDiskError(
                    f"{what}: another cutover ({manifest.token!r}) already did; "
                    "use the replica as it is"
                )
            if token in manifest.aborted_tokens:
                raise FuseDiskError(f"{what}: cutover {token!r} was aborted; start a new cutover")
            if manifest.epoch != epoch:
                raise FuseDiskError(
                    f"{what}: it holds epoch {manifest.epoch}, not {epoch}; "
                    "replicate once more, then start a new cutover"
                )
            if manifest.state == "promoted":
                return
            if manifest.state != "following":
                raise FuseDiskError(f"{what}: its first fill is not complete; let it finish")
            if self._receiving is not None:
                raise FuseDiskError(f"{what}: a pass is half received; replicate until it commits")
            # Invariant: asked for where both are at rest, so by no other pass than the last.
            if root is not None and manifest.root != root.hex():
                raise OtherRoot(f"{what}: it is not what was sent (its root differs)")
            self._promote(token)

    def take_over(self, token: str, *, force: bool) -> None:
        """Make the replica the disk without its source; durable on return.

        Repeating it changes nothing. Raises FuseDiskError if there is no whole point, unless
        `force` is given, or on an I/O error.
        """
        check_text("token", token)
        with self._at_rest(), self._excluding():
            manifest = self._manifest
            if manifest.state == "promoted":
                return
            if manifest.state == "filling" and not force:
                raise FuseDiskError(
                    f"replica {self.name!r} has no whole point: its images are no state that the "
                    "disks ever had; --force takes them as they are, check them before use"
                )
            self._promote(token)

    def roll_back(self, point_id: int) -> None:
        """Bring the images back to a recovery point, by a journal made of the undo records.

        So a crash leaves the one or the other point, and the images are as if the pass to the
        point were the last one received. Raises FuseDiskError if the point is not there, or there
        is no room; then nothing has changed.
        """
        with self._at_rest():
            with self._excluding():
                self._require_not_promoted()
                self._forget_pass()
                self._drop_published()
                manifest = self._manifest
            with clear_errors(f"cannot roll replica {self.name!r} back"):
                points, make = manifest.points, rollback_journal
                if self._cloning:
                    points = preserve(self._files, self._directory, self._fds, points)
                    make = rollback_clones
                ref = make(self._files, self._directory, manifest, self._fds, point_id, time.time())
            if ref is None:
                return
            with self._excluding():
                # Invariant: as in `commit`, this record alone makes the journal count.
                self._record(
                    msgspec.structs.replace(manifest, applying=True, journal=ref, points=points)
                )
            self._apply(self._manifest)

    def _promote(self, token: str) -> None:
        """Record the promotion; the replica is at rest and nobody shares it."""
        # Promoted implies applied and synced: nothing of ours flushes these images afterwards.
        self._sync_images()
        self._forget_pass()
        self._drop_published()
        try:
            points = self._manifest.points
            if self._cloning:
                # The guest is to overwrite the images; what the points need of them is kept.
                points = preserve(self._files, self._directory, self._fds, points)
            stamps = [stamp(fd) for fd in self._fds]
            # Invariant: an adopted image loses its fence only while the manifest still refuses
            # mounts, and before it allows them.
            clear_image_fences(self._files, self._directory, self._manifest)
        except OSError as error:
            raise FuseDiskError(
                f"cannot promote replica {self.name!r}: {error.strerror}; it is a replica still"
            ) from error
        self._record(
            msgspec.structs.replace(
                self._manifest,
                state="promoted",
                token=token,
                applying=False,
                filled=None,
                promoted_at=time.time(),
                stamps=stamps,
                points=points,
            )
        )

    def abort(self, token: str) -> None:
        """Record durably that the cutover `token` never promotes this replica.

        The last 16 aborted tokens are kept. Raises FuseDiskError if it was promoted with `token`.
        """
        check_text("cutover token", token)
        with self._excluding():
            manifest = self._manifest
            if manifest.token == token:
                raise FuseDiskError(
                    f"cutover {token!r} cannot be aborted: replica {self.name!r} is promoted "
                    "with it; go on at the target"
                )
            if token not in manifest.aborted_tokens:
                kept = [*manifest.aborted_tokens, token][-MAX_ABORTED_TOKENS:]
                self._record(msgspec.structs.replace(manifest, aborted_tokens=kept))
