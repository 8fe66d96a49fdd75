"""The manifest: a wrong bit is found, what is written can be read, an older release's is read."""

import json
import os
from pathlib import Path

import msgspec
import pytest
from manifests import edit_manifest
from test_points import DISKS, SIZES, Model, UndoFiles

from fusedisk.errors import FuseDiskError
from fusedisk.image import Image
from fusedisk.lineage import read_base
from replicator import manifest as manifests
from replicator.files import Files
from replicator.manifest import Manifest, Point, manifest_path, read_manifest, write_manifest
from replicator.pins import Pin
from replicator.replica import Replica
from replicator.retention import POINTS_MAX
from replicator.store import Store


@pytest.fixture
def replica(tmp_path: Path) -> Path:
    model = Model(1)
    with (
        Store(tmp_path, UndoFiles(), "3") as store,
        Replica.open(store, "vm", "src", DISKS) as replica,
    ):
        model.fill(replica)
        model.step(replica)
    return tmp_path / "vm"


def read(replica: Path) -> Manifest:
    found = read_manifest(replica)
    assert found is not None
    return found


def test_any_bit_that_is_wrong_is_found(replica: Path) -> None:
    path = manifest_path(replica)
    good = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for at, byte in enumerate(good):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), at)
                with pytest.raises(FuseDiskError, match=r"is damaged .* remove the manifest"):
                    read_manifest(replica)
            os.pwrite(file.fileno(), bytes([byte]), at)
    assert read(replica).state == "following"


def test_a_wrong_bit_lets_no_image_of_a_replica_be_mounted(replica: Path) -> None:
    path = manifest_path(replica)
    image = Image("disk0", replica / "disk0", -1, SIZES[0])
    with pytest.raises(FuseDiskError, match="belongs to a replica, which is following"):
        read_base([image], read_only=False)
    path.write_bytes(path.read_bytes().replace(b'"disk0"', b'"disk1"'))
    with pytest.raises(FuseDiskError, match="it does not match its checksum"):
        read_base([image], read_only=False)


def test_the_manifest_of_an_older_release_is_read_and_sealed_when_written(replica: Path) -> None:
    path = manifest_path(replica)
    content = json.loads(path.read_text()) | {"version": 2}
    del content["checksum"]
    path.write_text(json.dumps(content, indent=2) + "\n")
    with Store(replica.parent) as store, Replica.open(store, "vm", "src", DISKS) as opened:
        opened.abort("a token")
    content = json.loads(path.read_text())
    assert content["version"] == 3 and len(content["checksum"]) == 32
    assert read(replica).aborted_tokens == ["a token"]


def test_a_sealed_one_is_of_no_older_release(replica: Path) -> None:
    edit_manifest(manifest_path(replica), {"version": 2})
    with pytest.raises(FuseDiskError, match="has version 2, only 3"):
        read_manifest(replica)


def test_a_pinned_point_beside_as_many_as_can_be_kept(tmp_path: Path) -> None:
    model = Model(2)
    with Store(tmp_path, UndoFiles(), str(POINTS_MAX)) as store:
        with Replica.open(store, "vm", "src", DISKS) as replica:
            model.fill(replica)
            points = [Point(n, "gen", 1, float(n)) for n in range(1, POINTS_MAX + 2)]
            crowded = msgspec.structs.replace(
                replica.manifest, points=points, next_point=POINTS_MAX + 2
            )
        write_manifest(store.files, tmp_path / "vm", crowded)
        pin = Pin(tmp_path, "vm", 1)
        try:
            for _ in range(2):
                with Replica.open(store, "vm", "src", DISKS) as replica:
                    replica.begin(2)
                    replica.write(0, 0, os.urandom(512))
                    replica.commit("gen", 2, model.now)
            assert len(read(tmp_path / "vm").points) == POINTS_MAX + 2
        finally:
            pin.close()


def test_what_could_not_be_read_again_is_not_written(
    replica: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read(replica)
    monkeypatch.setattr(manifests, "_MANIFEST_BYTES_MAX", manifest_path(replica).stat().st_size - 1)
    with pytest.raises(OSError, match="File too large"):
        write_manifest(Files(), replica, before)
    monkeypatch.undo()
    assert read(replica) == before
