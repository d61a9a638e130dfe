"""Progress of long work on standard error: a live bar on a terminal, plain lines elsewhere, nothing where nobody asked."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TextIO

from normwise.errors import need
from normwise.experiments.framework import interrupts
from normwise.experiments.framework.printing import console, tell

_SECONDS_BETWEEN_LINES = 10.0
_LINE_ANEW = b"\r\x1b[2K\x1b[?25h"  # a terminal's line is cleared, its cursor shown


class Progress:
    """Tells nothing: what a study uses when it is called as a function."""

    unit = "runs"
    """What is counted."""

    def start(self, total: int | None) -> None:
        """``total`` runs lie ahead, finished ones included; None where that depends on what comes out."""

    def advance(self, text: str, amount: int = 1) -> None:
        """One run is finished, or so many of another unit; ``text`` says what it was."""

    def note(self, text: str) -> None:
        """A line to keep."""

    def stop(self) -> None:
        """The end, in any case."""


class Lines(Progress):
    """Plain lines, one at most every ten seconds beside the notes: for logs and pipes."""

    def __init__(self, stream: TextIO, unit: str = "runs") -> None:
        self.stream, self.done, self.unit = stream, 0, unit
        self.total: int | None = None
        self.started = self.last = time.monotonic()

    def start(self, total: int | None) -> None:
        self.total = total

    def advance(self, text: str, amount: int = 1) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.last >= _SECONDS_BETWEEN_LINES:
            self.last = now
            runs = f"{self.done} {self.unit}" if self.total is None else f"{self.done} of {self.total} {self.unit}"
            self.note(f"{runs} after {now - self.started:.0f} s; {text}")

    def note(self, text: str) -> None:
        tell(text, self.stream)


class Bar(Progress):
    """A live bar with the time that remains."""

    def __init__(self, stream: TextIO, unit: str = "runs") -> None:
        need("study", "rich", what="a live bar")
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(), TextColumn("left")
        self.bar = RichProgress(
            *columns, TimeRemainingColumn(), TextColumn("{task.description}"), console=console(stream), transient=True
        )

    def start(self, total: int | None) -> None:
        interrupts.live(_LINE_ANEW)
        self.bar.start()
        self.task = self.bar.add_task("", total=total)

    def advance(self, text: str, amount: int = 1) -> None:
        self.bar.update(self.task, advance=amount, description=text)

    def note(self, text: str) -> None:
        with suppress(OSError):
            self.bar.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        with suppress(OSError):
            self.bar.stop()
        interrupts.live()


def on_stderr(unit: str = "runs") -> Progress:
    """A bar where standard error is a terminal, lines where it is not, nothing where it is closed."""
    if sys.stderr is None:
        return Progress()
    return Bar(sys.stderr, unit) if sys.stderr.isatty() else Lines(sys.stderr, unit)
