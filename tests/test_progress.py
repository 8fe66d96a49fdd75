"""What progress claims: never more than is done, and what a person sees of it."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fusedisk.replicas import progress_entry, total_entry
from replicator import display
from replicator.progress import Progress


@given(
    totals=st.lists(st.integers(0, 1 << 40), min_size=1, max_size=4),
    steps=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1 << 40)), max_size=20),
)
def test_never_beyond_the_total_and_never_done_too_early(
    totals: list[int], steps: list[tuple[int, int]]
) -> None:
    progress = Progress()
    progress.begin("fill", totals)
    last_total = progress.total
    for now, (disk, count) in enumerate(steps):
        progress.advance(disk % len(totals), count, float(now))
        report = progress.report(float(now))
        assert report["done"] == progress.done <= progress.total == report["total"]
        assert progress.total >= last_total
        last_total = progress.total
        assert report["percent"] is not None and report["percent"] < 100
        assert all(d["percent"] < 100 for d in progress.disks(["x"] * len(totals)))
    progress.finish()
    assert progress.report(100.0)["percent"] == 100
    assert progress.report(100.0)["eta"] == 0
    assert all(d["percent"] == 100 for d in progress.disks(["x"] * len(totals)))


def test_rate_falls_while_nothing_moves() -> None:
    progress = Progress()
    progress.begin("fill", [1000])
    for second in range(5):
        progress.advance(0, 100, float(second))
    assert progress.rate(4.0) == 125
    assert progress.report(4.0)["eta"] == 4.0
    assert progress.rate(8.0) < 70
    assert progress.rate(100.0) < 10


def test_before_anything_is_known_nothing_is_done() -> None:
    assert Progress().report(0.0) == {
        "total": 0,
        "done": 0,
        "percent": 0.0,
        "rate": 0.0,
        "eta": None,
    }
    assert [d["name"] for d in Progress().disks(["a", "b"])] == ["a", "b"]


def entry(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "name": "web",
        "address": "unix:///s",
        "state": "filling",
        "progress": progress_entry(4 << 20, 1 << 20, 1 << 20, finished=False),
        "disks": [
            {"name": "a.img", "total": 2 << 20, "done": 1 << 20, "percent": 50.0},
            {"name": "b.img", "total": 2 << 20, "done": 0, "percent": 0.0},
        ],
        "lag": {"bytes": 0, "chunks": 0, "seconds": 0.0},
        "epoch": {"current": 2, "committed": None},
        "cutover": None,
        "error": None,
    }
    return made | changes


def drawn(*entries: dict[str, Any]) -> str:
    console = Console(width=100, force_terminal=False)
    with console.capture() as capture:
        console.print(display.table(entries))
    return capture.get()


def test_total_is_the_sum() -> None:
    other = progress_entry(4 << 20, 4 << 20, 0.0, finished=True)
    total = total_entry([entry(), entry(progress=other)])
    assert (total["total"], total["done"], total["percent"]) == (8 << 20, 5 << 20, 62.5)
    assert total["eta"] == 3.0
    assert total_entry([])["percent"] == 100


def test_each_disk_and_the_sum_have_a_bar() -> None:
    text = drawn(entry())
    for part in (
        "web",
        "filling",
        "a.img",
        "50.0%",
        "b.img",
        "all",
        "25.0% of 4.0 MiB",
        "3 s left",
    ):
        assert part in text


def test_following_shows_the_lag_instead() -> None:
    lag = {"bytes": 3 << 20, "chunks": 48, "seconds": 65.0}
    text = drawn(entry(state="following", lag=lag, epoch={"current": 9, "committed": 7}))
    assert "lag 3.0 MiB, 1:05, last commit epoch 7" in text
    assert "%" not in text


def forecast(seconds: float | None, reason: str | None) -> dict[str, Any]:
    rates = {"dirty_rate": 1.0, "send_rate": 2.0}
    return {"forecast": {**rates, "caught_up_seconds": seconds, "reason": reason}}


def test_when_it_will_have_caught_up_and_why_all_is_compared() -> None:
    cause = "the source began a new generation: image a.img changed while it was not mounted"
    comparing = entry(state="comparing", cause=cause, **forecast(125.0, None))
    for text in (display.line(comparing), drawn(comparing)):
        assert f"caught up in 2:05, because {cause}" in " ".join(text.split())
    never = forecast(None, "never: the guest writes 2.5 MiB/s and 1.0 MiB/s are sent")
    lag = {"bytes": 3 << 20, "chunks": 48, "seconds": 65.0}
    following = entry(state="following", lag=lag, epoch={"current": 9, "committed": 7}, **never)
    for text in (display.line(following), drawn(following)):
        assert "never caught up: the guest writes 2.5 MiB/s and 1.0 MiB/s are sent" in text


def test_nothing_is_said_of_what_is_not_known_or_over() -> None:
    for seconds, reason in (
        (0.0, None),
        (None, "not enough was sent yet to tell"),
        (None, "paused"),
    ):
        said = display.line(entry(state="following", cause=None, **forecast(seconds, reason)))
        assert "caught up" not in said and "because" not in said
    # What a sender of an older version, or none, says.
    assert "caught up" not in display.line(entry(cause=None, forecast=None))


def test_an_error_of_a_peer_cannot_draw_on_the_terminal() -> None:
    text = drawn(entry(state="waiting", error="gone\x1b[2Jaway\nnow"))
    assert "\x1b" not in text and "gone [2Jaway now" in text
    assert "\x1b" not in display.line(entry(error="\x1b[2J"))
