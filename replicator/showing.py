"""How ``replicator start`` shows what it does: a bar on a terminal, lines in a log elsewhere."""

import logging
import logging.handlers
import sys
from pathlib import Path

import trio
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar

from fusedisk.units import format_size
from replicator import display
from replicator.following import Follower
from replicator.progress import Progress
from replicator.reporting import report

log = logging.getLogger("replicator.progress")

FORMAT = "%(asctime)s %(levelname)s %(message)s"
_BAR_SECONDS = 0.2
_LOG_SECONDS = 5.0
_LOG_BYTES_MAX = 1 << 20
_LOG_FILES = 3


async def show(follower: Follower) -> None:
    """Show progress on stderr until cancelled."""
    if sys.stderr.isatty():
        await _show_bar(follower)
    else:
        await _log_lines(follower)


async def _show_bar(follower: Follower) -> None:
    console = Console(stderr=True, highlight=False, markup=False)
    root = logging.getLogger()
    before, root.handlers = root.handlers, [_AboveBar(console)]
    try:
        with Live(console=console, auto_refresh=False, redirect_stdout=False) as live:
            try:
                while True:
                    live.update(display.table([await report(follower)]), refresh=True)
                    await trio.sleep(_BAR_SECONDS)
            finally:
                # What it came to stays on the screen.
                with trio.CancelScope(shield=True):
                    live.update(display.table([await report(follower)]), refresh=True)
    finally:
        root.handlers = before


class _AboveBar(logging.Handler):
    """Prints log lines above the bar, which is drawn again below them."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(logging.Formatter(FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), soft_wrap=True)


async def _log_lines(follower: Follower) -> None:
    """A line every few seconds while something moves, none while nothing does."""
    commits, sent = follower.commits, follower.sent.bytes
    while True:
        await trio.sleep(_LOG_SECONDS)
        if follower.state in ("filling", "comparing"):
            entry = await report(follower)
            log.info("%s: %s", entry["state"], display.progress_text(entry["progress"]))
        elif follower.commits > commits:
            log.info(
                "%s: %d epochs, %s sent, %s",
                *(follower.state, follower.commits - commits),
                *(
                    format_size(follower.sent.bytes - sent),
                    display.lag_text(await report(follower)),
                ),
            )
        commits, sent = follower.commits, follower.sent.bytes


async def showing_progress(progress: Progress) -> None:
    """Show one phase on stderr until cancelled: a bar on a terminal, else lines in the log."""
    if not sys.stderr.isatty():
        while True:
            await trio.sleep(_LOG_SECONDS)
            text = display.progress_text(progress.report(trio.current_time()))
            log.info("%s: %s", progress.phase, text)
    console = Console(stderr=True, highlight=False, markup=False)
    with Live(console=console, auto_refresh=False, redirect_stdout=False) as live:
        try:
            while True:
                live.update(_phase(progress), refresh=True)
                await trio.sleep(_BAR_SECONDS)
        finally:
            live.update(_phase(progress), refresh=True)


def _phase(progress: Progress) -> Columns:
    found = progress.report(trio.current_time())
    bar = ProgressBar(total=100, completed=found["percent"] or 0, width=28)
    return Columns([progress.phase, bar, display.progress_text(found)])


def log_to_file(path: Path) -> None:
    """Log to a rotated file instead of stderr."""
    handler = logging.handlers.RotatingFileHandler(
        path, maxBytes=_LOG_BYTES_MAX, backupCount=_LOG_FILES
    )
    handler.setFormatter(logging.Formatter(FORMAT))
    logging.getLogger().handlers = [handler]
