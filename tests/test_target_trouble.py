"""What fails at a target and may pass: it is told as such, so that no sender ends because of it."""

import errno
from pathlib import Path

import pytest

from fusedisk.errors import FuseDiskError
from replicator.failures import failure_code
from replicator.files import Files
from replicator.journal import JournalDamaged
from replicator.manifest import ReplicaDisk
from replicator.replica import Replica
from replicator.store import Store

CHUNK = 65536


class FailingFiles(Files):
    """Whose syncs fail with ``errno`` while it is set."""

    errno: int | None = None

    def sync(self, fd: int) -> None:
        if self.errno is not None:
            raise OSError(self.errno, "it failed")
        super().sync(fd)


def opened(store: Store) -> Replica:
    return Replica.open(store, "r", "source", [ReplicaDisk("a", CHUNK, CHUNK)])


def code_of(error: BaseException) -> str:
    assert isinstance(error, FuseDiskError)
    return failure_code(error)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        *((n, "io") for n in (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)),
        *((n, "io") for n in (errno.ETIMEDOUT, errno.EREMOTEIO, errno.ESTALE)),
        *((n, "full") for n in (errno.ENOSPC, errno.EDQUOT)),
        (errno.EACCES, "refused"),
    ],
)
@pytest.mark.parametrize("kind", ["fill", "pass"])
def test_what_fails_after_a_failure_fails_like_it(
    tmp_path: Path, number: int, code: str, kind: str
) -> None:
    files = FailingFiles()
    with Store(tmp_path, files) as store, opened(store) as replica:
        if kind == "pass":
            replica.begin(2, "gen")
            replica.commit("gen", 2)
        replica.begin(3, "gen", based=kind == "pass")
        replica.write(0, 0, b"data")
        files.errno = number
        later = (
            lambda: replica.checkpoint("gen", 3, 0, 4096),
            lambda: replica.write(0, 0, b"data"),
            lambda: replica.commit("gen", 3, consistent=kind == "pass"),
            replica.apply,
        )
        for call in later:
            with pytest.raises(FuseDiskError) as caught:
                call()
            assert code_of(caught.value) == code, call
            # Whether the disk works again by now, this replica does not know.
            files.errno = None


def test_what_follows_a_damaged_journal_is_repaired_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: object, **__: object) -> None:
        raise JournalDamaged("a journal is damaged")

    with Store(tmp_path) as store, opened(store) as replica:
        for epoch in (3, 4):
            replica.begin(epoch, "gen")
            replica.write(0, 0, b"data")
            replica.commit("gen", epoch)
        monkeypatch.setattr("replicator.holding.apply_journal", damaged)
        for call in (replica.apply, lambda: replica.begin(5, "gen")):
            with pytest.raises(FuseDiskError) as caught:
                call()
            assert code_of(caught.value) == "damaged"
