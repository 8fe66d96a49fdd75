"""What a person sees of a replica: a line, a live table with bars, and lines for a log.

Everything is made from entries of ``status --json``, so that a bar shows what a program is told.
"""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fusedisk.units import format_size
from fusedisk.unsettled import unsettled_text

_BAR_COLUMNS = 28
_AT_WORK = ("filling", "comparing")
_NEVER = "never: "


def format_seconds(seconds: float) -> str:
    """A time for people, e.g. ``1:02:03``, ``4:05`` or ``12 s``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def lag_text(entry: dict[str, Any]) -> str:
    """How far the replica is behind."""
    lag, epoch = entry["lag"], entry["epoch"]["committed"]
    if epoch is None:
        return "no complete copy yet"
    if not lag["chunks"]:
        return f"up to date at epoch {epoch}"
    # A sender of an older version knows of none.
    rpo = entry.get("rpo")
    if rpo and rpo["exceeded"]:
        late = f", {format_seconds(rpo['age'])} old (--rpo {rpo['target']:g} s)"
        return f"lag {format_size(lag['bytes'])}{late}, last commit epoch {epoch}"
    age = "" if lag["seconds"] is None else f", {format_seconds(lag['seconds'])}"
    return f"lag {format_size(lag['bytes'])}{age}, last commit epoch {epoch}"


def capture_text(entry: dict[str, Any]) -> str:
    """How full the spill of the pass under way is, and whether captures are being given up."""
    parts = []
    if capture := entry.get("capture"):
        used, room = format_size(capture["spill_bytes"]), format_size(capture["spill_bytes_max"])
        parts.append(f", spill {used} of {room}")
    if (given_up := entry.get("given_up")) and given_up["reason"]:
        parts.append(f", {given_up['captures']} captures given up: {given_up['reason']}")
    return "".join(parts)


def progress_text(progress: dict[str, Any]) -> str:
    """Percent, size, rate and time left."""
    parts = [f"{progress['percent']:.1f}% of {format_size(progress['total'])}"]
    if progress["rate"]:
        parts.append(f"{format_size(progress['rate'])}/s")
    if progress["eta"] and progress["percent"] < 100:
        parts.append(f"{format_seconds(progress['eta'])} left")
    return ", ".join(parts)


def outlook_text(entry: dict[str, Any]) -> str | None:
    """When the replica will have caught up, or why never, and why all is sent or compared."""
    # A sender of an older version says nothing of either.
    forecast, parts = entry.get("forecast") or {}, []
    seconds, reason = forecast.get("caught_up_seconds"), forecast.get("reason") or ""
    if seconds:
        parts.append(f"caught up in {format_seconds(seconds)}")
    elif reason.startswith(_NEVER):
        parts.append(f"never caught up: {reason.removeprefix(_NEVER)}")
    if cause := entry.get("cause"):
        parts.append(f"because {cause}")
    return _printable(", ".join(parts)) or None


def cutover_text(cutover: dict[str, Any]) -> str:
    """What a cutover is doing, and what its downtime would be now; or that it is to be resolved."""
    if cutover.get("state") == "unknown":
        return unsettled_text(cutover)
    parts = [f"{cutover['phase']}", f"{format_size(cutover['remaining_bytes'])} left"]
    for name, key in (("dirty", "dirty_rate"), ("send", "send_rate")):
        if cutover[key] is not None:
            parts.append(f"{name} {format_size(cutover[key])}/s")
    if (slowed := cutover.get("slowed_to")) is not None:
        parts.append(f"guest slowed to {format_size(slowed)}/s")
    if memory := cutover["memory"]:
        done, total = format_size(memory["done"]), format_size(memory["total"])
        parts.append(f"memory {done} of {total}")
    if cutover["estimate_ms"] is not None:
        limit = cutover["max_downtime_ms"]
        parts.append(f"downtime expected {cutover['estimate_ms']:.0f} ms of {limit:.0f} ms")
    return ", ".join(parts)


def line(entry: dict[str, Any]) -> str:
    """One replica in one line."""
    error = f" ({_printable(entry['error'])})" if entry["error"] else ""
    text = f"{entry['name']}: {entry['state']}{error}, {entry['address']}, "
    if entry["cutover"]:
        return text + cutover_text(entry["cutover"])
    text += (
        progress_text(entry["progress"])
        if _moving(entry)
        else lag_text(entry) + capture_text(entry)
    )
    outlook = outlook_text(entry)
    return f"{text}, {outlook}" if outlook else text


def table(entries: Sequence[dict[str, Any]]) -> RenderableType:
    """Replicas with bars where something is being copied, for rich to draw."""
    if not entries:
        return Text("no replicas")
    parts: list[RenderableType] = []
    for entry in entries:
        parts.append(_heading(entry))
        if _moving(entry):
            parts.append(_bars(entry))
        if not entry["cutover"] and (outlook := outlook_text(entry)):
            parts.append(Text(f"  {outlook}", overflow="fold"))
    return Group(*parts)


def _moving(entry: dict[str, Any]) -> bool:
    state, progress = entry["state"], entry["progress"]
    return state in _AT_WORK or (
        state == "paused" and entry["epoch"]["committed"] is None and progress["total"] > 0
    )


def _heading(entry: dict[str, Any]) -> Text:
    text = Text(overflow="ellipsis", no_wrap=True)
    text.append(_printable(entry["name"]), style="bold")
    text.append(f"  {entry['state']}", style="cyan")
    if entry["cutover"]:
        text.append(f"  {cutover_text(entry['cutover'])}")
    elif not _moving(entry):
        text.append(f"  {lag_text(entry)}{capture_text(entry)}")
    if entry["error"]:
        text.append(f"  {_printable(entry['error'])}", style="red")
    return text


def _bars(entry: dict[str, Any]) -> Table:
    grid = Table.grid(padding=(0, 1))
    for _ in range(3):
        grid.add_column(no_wrap=True)
    disks = entry["disks"] if len(entry["disks"]) > 1 else []
    for disk in disks:
        text = f"{disk['percent']:5.1f}% of {format_size(disk['total'])}"
        grid.add_row(f"  {_printable(disk['name'])}", _bar(disk), text)
    name = "  all" if disks else f"  {_printable(entry['disks'][0]['name'])}"
    grid.add_row(name, _bar(entry["progress"]), progress_text(entry["progress"]))
    return grid


def _bar(progress: dict[str, Any]) -> ProgressBar:
    return ProgressBar(total=100, completed=progress["percent"], width=_BAR_COLUMNS)
