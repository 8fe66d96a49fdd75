"""The shape of the project: imports, lengths of files, and documents that must be true."""

import ast
import re
import tomllib
from pathlib import Path

import click
import pytest

from fusedisk.cli import cli as fusedisk_cli
from replicator.cli import cli as replicator_cli

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(p for d in ("fusedisk", "replicator", "tests") for p in (ROOT / d).rglob("*.py"))
LINES_MAX = 450
LONGER = {
    "tests/test_wire.py": "one table of events, states and refusals",
    "tests/test_mount.py": "one table of what a mount does",
}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return {name.split(".")[0] for name in found}


def test_fusedisk_never_imports_replicator() -> None:
    users = [p.name for p in (ROOT / "fusedisk").rglob("*.py") if "replicator" in imported(p)]
    assert users == []


@pytest.mark.parametrize("name", ["wire", "messages", "frames"])
def test_the_protocol_has_no_io(name: str) -> None:
    assert not imported(ROOT / f"replicator/{name}.py") & {"trio", "socket", "os", "time", "io"}


def test_files_are_short() -> None:
    long = {str(p.relative_to(ROOT)) for p in FILES if len(p.read_text().splitlines()) > LINES_MAX}
    # Both ways: a reason that is not needed any longer would let the file grow again.
    assert long == set(LONGER)


def undocumented(path: Path) -> list[str]:
    """Public things of a module without a docstring."""

    def missing(node: ast.Module | ast.ClassDef, prefix: str) -> list[str]:
        found = [] if ast.get_docstring(node) else [prefix]
        for child in node.body:
            name = f"{prefix}.{getattr(child, 'name', '_')}"
            if name.rpartition(".")[2].startswith("_"):
                continue
            if isinstance(child, ast.ClassDef):
                found += missing(child, name)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                # What pyfuse3 calls is described there.
                described = isinstance(node, ast.ClassDef) and "pyfuse3.Operations" in {
                    ast.unparse(base) for base in node.bases
                }
                if not described and not ast.get_docstring(child):
                    found.append(name)
        return found

    return missing(ast.parse(path.read_text()), path.stem)


@pytest.mark.parametrize("package", ["fusedisk", "replicator"])
def test_what_is_public_is_described(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files and [name for path in files for name in undocumented(path)] == []


def test_a_missing_description_is_found(tmp_path: Path) -> None:
    module = tmp_path / "m.py"
    module.write_text(
        "class A:\n    'A.'\n    def b(self): ...\n    def _c(self): ...\ndef d(): ...\n"
    )
    assert undocumented(module) == ["m", "m.A.b", "m.d"]


def test_dependencies_are_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [
        line for extra in project["optional-dependencies"].values() for line in extra
    ]
    named = {re.split(r"[^\w.-]", line)[0] for line in lines}
    page = (ROOT / "docs/dependencies.md").read_text()
    assert set(re.findall(r"^- ([\w.-]+):", page, re.MULTILINE)) == named


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md", "docs/design.md"])
def test_links_resolve(page: str) -> None:
    path = ROOT / page
    for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / link).exists(), link


def commands(cli: click.Group) -> dict[str, click.Command]:
    # Not `cli.commands`: replicator imports a command only when it is asked for.
    context = click.Context(cli)
    found = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


@pytest.mark.parametrize(
    ("tool", "cli"), [("fusedisk", fusedisk_cli), ("replicator", replicator_cli)]
)
def test_every_command_is_documented(tool: str, cli: click.Group) -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "docs/guide.md").read_text()
    # In the table commands that share a line are written `replicator pause\|resume`.
    text = re.sub(rf"{tool} (\w+)\\\|(\w+)", rf"{tool} \1 {tool} \2", text)
    names = list(commands(cli))
    assert names and [name for name in names if f"{tool} {name}" not in text] == []


def test_no_command_asks_a_mountpoint_for_its_attributes() -> None:
    # click's own path type does, and waits for as long as no server answers.
    asking = [
        f"{name}: {parameter.name}"
        for cli in (fusedisk_cli, replicator_cli)
        for name, command in commands(cli).items()
        for parameter in command.params
        if "MOUNTPOINT" in parameter.make_metavar(click.Context(command))
        and isinstance(parameter.type, click.Path)
    ]
    # Nothing is mounted there yet.
    assert asking == ["mount: mountpoint"]
