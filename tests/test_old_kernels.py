"""On kernels that do not hand out unanswered requests again, the user is told at mount time."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from fusedisk import cli, keeper, mounting


@pytest.mark.parametrize(
    ("release", "survives"),
    [("6.8.12-amd64", False), ("5.15.0", False), ("6.9.0-rc1", True), ("6.10.3", True)],
)
def test_mounting_says_whether_a_crash_is_survived(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str, survives: bool
) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    mounted = mounting.Mounted(keeper=None, state=tmp_path, notices=[])  # type: ignore[arg-type]
    monkeypatch.setattr(mounting, "mount", lambda *_: mounted)
    assert keeper.survives_crashes() == survives
    result = CliRunner().invoke(cli.cli, ["mount", "disk.img", str(tmp_path)])
    assert result.exit_code == 0
    assert ("will not be survived" in result.output) == (not survives)
