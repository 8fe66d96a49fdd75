"""Damage of what the target keeps beside its images: named, and repaired from the source."""

import os

import pytest
from test_replication import Pair, guest_write, pair

from replicator.files import Files
from replicator.journal import journal_directory
from replicator.manifest import manifest_path
from replicator.replica import Replica
from replicator.store import Store

__all__ = ["pair"]


def test_a_damaged_journal_is_named_and_the_images_repaired(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = pair.receive()
    sender = pair.start()
    pair.wait_following(sender)
    pair.wait_identical()
    receiver.kill()
    # What a crash between commit and apply leaves, of a pass that the source knows nothing of.
    monkeypatch.setattr(Files, "can_clone", lambda *_: False)
    with Store(pair.store) as store, Replica.load(store, "r") as replica:
        manifest = replica.manifest
        assert manifest.generation is not None and manifest.epoch is not None
        replica.begin(manifest.epoch + 1)
        replica.write(0, 0, os.urandom(4096))
        replica.write(1, 0, os.urandom(4096))
        replica.commit(manifest.generation, manifest.epoch + 1)
    journal = next(journal_directory(pair.store / "r").iterdir())
    content = bytearray(journal.read_bytes())
    content[-200] ^= 1
    journal.write_bytes(content)
    receiver = pair.receive()
    guest_write(pair.mount.disk(1), b"later", 4096)
    pair.wait_identical()
    assert f"journal {journal} is damaged" in receiver.said
    assert "hash" in receiver.said and sender.popen.poll() is None


def test_a_damaged_manifest_is_named_and_the_images_compared_without_it(pair: Pair) -> None:
    receiver = pair.receive()
    pair.once()
    receiver.kill()
    path = manifest_path(pair.store / "r")
    path.write_bytes(path.read_bytes()[:-20])
    # One image is not what it was either, and only a comparison can tell.
    with pair.replica(0).open("r+b") as image:
        image.write(b"damage")
    pair.receive()
    pair.refused(pair.start("--once"), f"manifest {path} is damaged")
    path.unlink()
    pair.once()
    assert pair.identical()
