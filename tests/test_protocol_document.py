"""The tables of docs/protocol.md are those of the code."""

import re
from pathlib import Path

from replicator import failures, frames, messages, wire

TEXT = (Path(__file__).parent.parent / "docs/protocol.md").read_text()


def rows(section: str) -> list[list[str]]:
    """The cells of the last table of a section, without its head."""
    body = TEXT.split(f"\n## {section}\n")[1].split("\n## ")[0]
    table = body.split("|---|")[-1].splitlines()[1:]
    return [[c.strip() for c in line.split("|")[1:-1]] for line in table if line.startswith("|")]


def test_frame_types_and_their_lengths() -> None:
    expected = []
    for number, kind in frames.FRAME_TYPES.items():
        least, most = frames._length_bounds(kind)
        length = str(least) if least == most else f"{least} to {most}"
        expected.append([str(number), kind.__name__, length])
    assert rows("Frames") == expected


def test_transitions() -> None:
    expected = {
        (state.value, kind.__name__, "either" if len(roles) == 2 else min(roles), following.value)
        for state, rules in wire.TRANSITIONS.items()
        for kind, (roles, following) in rules.items()
    }
    assert {tuple(row) for row in rows("States")} == expected


def test_limits() -> None:
    for label, value in rows("Limits"):
        (name,) = re.findall(r"`(\w+)`", label)
        assert getattr(messages, name) == int(value)


def test_error_codes() -> None:
    source = Path(failures.__file__).read_text()
    body = source.split("def failure_code(")[1].split("\n\n\n")[0]
    assert {row[0].strip("`") for row in rows("Error codes")} == set(
        re.findall(r'return "(\w+)"', body)
    )
