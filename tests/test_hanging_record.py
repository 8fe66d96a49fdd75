"""Cutovers whose record beside the images hangs: what is told, and what the guest does."""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import wait_for
from test_cutover_faults import Cutting
from test_late_sender import Monitor
from test_promotion import replicator
from test_replication import Pair, pair

from fusedisk.gate import take_lease
from replicator import gating, handover
from replicator.handover import NotConverged, NotRecorded, OutcomeUnknown, outcome_of
from replicator.source import Source

__all__ = ["pair"]


class Hanging:
    """Makes a change of the records hang once it is done, as a sync of their directory may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.answer, self.hangs = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []

    def at(self, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
        real = getattr(handover, name)

        @functools.wraps(real)
        def change(*arguments: object) -> None:
            real(*arguments)
            if when(*arguments):
                self.hangs.set()
                assert self.answer.wait(120)

        self._monkeypatch.setattr(handover, name, change)


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    made = Hanging(monkeypatch)
    yield made
    made.answer.set()


def wait_for_lease(pair: Pair) -> None:
    """Until the thread that was left behind is done."""

    def free() -> bool:
        try:
            os.close(take_lease(pair.mount.state))
        except BlockingIOError:
            return False
        return True

    wait_for(free, "the lease is given back")


def test_a_guest_does_not_wait_for_a_record_that_hangs(
    pair: Pair, hanging: Hanging, tmp_path: Path
) -> None:
    monitor = Monitor(tmp_path / "q")
    paused = tmp_path / "paused"
    try:
        hanging.at("record_fence")
        cutting = Cutting(pair)
        hooks = {"before": f"touch {paused}", "on_rollback": f"rm {paused}"}
        told = cutting.cut(downtime_seconds_max=2.0, qmp=str(tmp_path / "q"), **hooks)
        assert isinstance(told, NotConverged) and "--max-downtime" in str(told), told
        assert (told.exit_code, isinstance(told, NotRecorded)) == (3, True)
        assert hanging.hangs.is_set() and not hanging.answer.is_set()
        # The guest goes on, beside a record that nobody was promoted by.
        assert monitor.running and not paused.exists()
        assert cutting.record is not None and cutting.record.state == "committing"
        assert cutting.source_writable()
    finally:
        monitor.close()
    source = Source(pair.mount.mountpoint)
    assert outcome_of(source, told) == "rolled-back"
    source.close()
    # The record is the thread's for as long as that may write it.
    busy = replicator("resolve", pair.mount.mountpoint)
    assert busy.returncode == 4 and "under way" in busy.stderr
    hanging.answer.set()
    wait_for_lease(pair)
    assert cutting.record is None and not cutting.promoted and cutting.source_writable()


def test_a_fence_that_hangs_does_not_hold_up_the_guest_of_a_promotion(
    pair: Pair, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "_DISK_SECONDS_MAX", 0.2)
    hanging.at("record_fence", lambda _, record: record.state == "fenced")
    cutting = Cutting(pair)
    told = cutting.cut()
    assert isinstance(told, dict) and told["outcome"] == "promoted", told
    assert told["exit_code"] == 1 and "has not answered" in told["error"]
    assert cutting.promoted and not cutting.source_writable()
    hanging.answer.set()
    wait_for_lease(pair)
    assert cutting.record is not None and cutting.record.state == "fenced"


def test_a_record_that_cannot_be_taken_back_in_time_is_an_unknown_outcome(
    pair: Pair, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "_DISK_SECONDS_MAX", 0.2)
    # The gate was let go, so that nothing may be promoted.
    monkeypatch.setattr(gating, "begin_promotion", lambda _: False)
    hanging.at("clear_fence")
    cutting = Cutting(pair)
    told = cutting.cut()
    assert isinstance(told, OutcomeUnknown) and "resolve" in str(told), told
    assert not cutting.source_writable() and not cutting.promoted
    hanging.answer.set()
    wait_for_lease(pair)
    assert "nothing to resolve" in replicator("resolve", pair.mount.mountpoint).stdout
    assert cutting.source_writable()
