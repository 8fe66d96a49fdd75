"""scripts/setup without root or network, and the package as a user installs it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What the script needs of the system, besides what a test puts in its place.
USED = ("bash", "cat", "dirname", "env", "grep", "sha256sum")
# Everything that could change the machine, or this checkout.
FORBIDDEN = ("apt-get", "pip", "pip3")


def write_script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """A PATH of one directory, where nothing is to do and whatever would be done fails."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in USED:
        found = shutil.which(name)
        assert found, name
        (directory / name).symlink_to(found)
    for name in FORBIDDEN:
        write_script(directory / name, f'echo "{name} $*" >>{tmp_path}/done; exit 1')
    write_script(directory / "dpkg-query", "echo install ok installed")
    write_script(directory / "id", "echo 1000")
    # Not a link, which would lose the environment that the interpreter finds beside itself.
    write_script(directory / "python3", f'exec {sys.executable} "$@"')
    return directory


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the script reads of a checkout, and a .venv whose pip fails."""
    copy = tmp_path / "checkout"
    (copy / "fusedisk").mkdir(parents=True)
    (copy / "scripts").mkdir()
    (copy / ".venv/bin").mkdir(parents=True)
    write_script(copy / ".venv/bin/pip", f'echo "pip $*" >>{tmp_path}/done; exit 1')
    wanted = ["pyproject.toml", "setup.py", "scripts/setup"]
    for name in wanted + [f"fusedisk/{p.name}" for p in (ROOT / "fusedisk").glob("*.p[xy][xd]")]:
        shutil.copy(ROOT / name, copy / name)
    return copy


def run_setup(checkout: Path, stubs: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [checkout / "scripts/setup"],
        env={"PATH": str(stubs)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def record_stamp(checkout: Path) -> None:
    parts = [checkout / "pyproject.toml", checkout / "setup.py"]
    parts += sorted(checkout.glob("fusedisk/*.pxd")) + sorted(checkout.glob("fusedisk/*.pyx"))
    sums = subprocess.run(
        ["sha256sum"],
        input=b"".join(p.read_bytes() for p in parts),
        capture_output=True,
        check=True,
    )
    (checkout / ".venv/.stamp").write_bytes(sums.stdout)


def test_missing_packages_are_named_to_who_cannot_install_them(
    checkout: Path, stubs: Path, tmp_path: Path
) -> None:
    write_script(stubs / "dpkg-query", '[ "$3" = libfuse3-dev ] || echo install ok installed')
    result = run_setup(checkout, stubs)
    assert result.returncode == 1
    assert result.stderr == (
        "scripts/setup: these packages are missing: libfuse3-dev; run it as root, or install sudo\n"
    )
    assert not (tmp_path / "done").exists()


def test_sudo_is_used_where_it_is_there(checkout: Path, stubs: Path, tmp_path: Path) -> None:
    write_script(stubs / "dpkg-query", '[ "$3" = gcc ] || echo install ok installed')
    write_script(stubs / "sudo", f'echo "sudo $*" >>{tmp_path}/done')
    record_stamp(checkout)
    assert run_setup(checkout, stubs).returncode == 0
    update, install = (tmp_path / "done").read_text().splitlines()
    assert update.startswith("sudo apt-get update")
    assert install.startswith("sudo env") and install.endswith(" gcc")


def test_nothing_is_done_twice(checkout: Path, stubs: Path, tmp_path: Path) -> None:
    record_stamp(checkout)
    result = run_setup(checkout, stubs)
    assert (result.returncode, result.stderr) == (0, "")
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("changed", ["pyproject.toml", "setup.py", "fusedisk/disk.pyx"])
def test_what_the_package_is_made_of_changed(
    checkout: Path, stubs: Path, tmp_path: Path, changed: str
) -> None:
    record_stamp(checkout)
    before = (checkout / ".venv/.stamp").read_text()
    with (checkout / changed).open("a") as file:
        file.write("\n")
    # Invariant: what failed is not recorded as done.
    assert run_setup(checkout, stubs).returncode != 0
    assert (tmp_path / "done").read_text().startswith("pip install")
    assert (checkout / ".venv/.stamp").read_text() == before


@pytest.mark.long
def test_the_package_installs_without_the_checkout(tmp_path: Path) -> None:
    source, wheels, home = tmp_path / "source", tmp_path / "wheels", tmp_path / "venv"
    # A copy, since a build leaves files beside what it builds.
    left_out = shutil.ignore_patterns("*.so", "*.c", "__pycache__", "build")
    for name in ("fusedisk", "replicator"):
        shutil.copytree(ROOT / name, source / name, ignore=left_out)
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, source / name)
    quiet = ["--quiet", "--disable-pip-version-check"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        result = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    # The build tools are those at hand; what the wheel needs is fetched as for any user.
    tools = ("--no-build-isolation", "--no-deps", "--wheel-dir")
    run(sys.executable, "-m", "pip", "wheel", *quiet, *tools, wheels, source)
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    native = [p for p in (ROOT / "fusedisk").iterdir() if p.suffix in (".pyx", ".pxd", ".pyi")]
    assert {f"fusedisk/{p.name}" for p in native} <= names
    built = {name.split("/")[1].split(".")[0] for name in names if name.endswith(".so")}
    assert built == {p.stem for p in native if p.suffix == ".pyx"}
    python = [p for d in ("fusedisk", "replicator") for p in (ROOT / d).rglob("*.py")]
    assert {str(p.relative_to(ROOT)) for p in python} <= names

    run(sys.executable, "-m", "venv", home)
    run(home / "bin/pip", "install", *quiet, wheel)
    for tool in ("fusedisk", "replicator"):
        assert f"Usage: {tool}" in run(home / f"bin/{tool}", "--help")
