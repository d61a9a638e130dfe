"""What is printed: with plain characters where a terminal has no others, and never at the price of the results."""

from __future__ import annotations

import codecs
import os
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from normwise.errors import OutputError, need

_PLAIN = {
    "±": "+-", "×": "x", "·": "*", "–": "-", "—": "-", "−": "-", "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "≠": "!=", "≈": "~",
    "∞": "inf", "√": "sqrt", "‖": "||", "∈": "in", "✓": "ok", "✗": "x", "…": "...", "‘": "'", "’": "'", "“": '"', "”": '"', "•": "*",
    "∂": "d", "∇": "grad ", "∑": "sum", "Δ": "Delta", "θ": "theta", "λ": "lambda", "μ": "u", "µ": "u", "η": "eta", "ρ": "rho",
    "γ": "gamma", "β": "beta", "α": "alpha", "σ": "sigma", "ε": "eps", "κ": "kappa", "τ": "tau", "φ": "phi", "Σ": "Sigma", "⟨": "<",
    "⟩": ">", "⌈": "ceil(", "⌉": ")", "ß": "ss", "│": "|", "─": "-", "━": "-", "═": "-", "║": "|", "┃": "|",
}  # fmt: skip
_HANDLER = "normwise.plain"


def plain(text: str) -> str:
    """In ASCII: what has no other spelling becomes a question mark."""

    def spelled(character: str) -> str:
        if character.isascii():
            return character
        if "\u2500" <= character <= "\u259f" and character not in _PLAIN:    # what remains of lines and blocks
            return "+" if character < "\u2580" else "#"
        return _PLAIN.get(character) or unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode() or "?"

    return "".join(map(spelled, text))


def for_stream(text: str, stream: TextIO) -> str:
    """As the stream can write it. For text whose width counts, as in a table: it must be known before the line is set."""
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return plain(text)
    return text


def _written_plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return plain(error.object[error.start : error.end]), error.end


codecs.register_error(_HANDLER, _written_plainly)


@contextmanager
def in_plain_characters() -> Iterator[None]:
    """Within, standard output and error write what they cannot encode in plain characters, whoever prints it."""
    streams = [(stream, stream.errors) for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]
    for stream, _ in streams:
        stream.reconfigure(errors=_HANDLER)
    try:
        yield
    finally:
        for stream, errors in streams:
            with suppress(OSError, ValueError):  # a pipe that is closed by now
                stream.reconfigure(errors=errors)


def console(out: TextIO) -> Any:
    """rich's console of a terminal, which does not end the process where nobody reads it any more."""
    need("study", "rich", what="this command")
    from rich.console import Console

    class _Ours(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return _Ours(file=out, highlight=False)


NARROW = 80    # columns that every terminal has
_CELL = 44


def show_table(rows: Sequence[Mapping[str, Any]], out: TextIO) -> None:
    """Prints rows by column; those with the same columns stand together. What is wider than the terminal, or than 80 columns of a file or a
    pipe, goes on below, in further blocks that repeat the first column, so that nothing is cut off."""
    width = console(out).width if out.isatty() else NARROW
    for columns in dict.fromkeys(tuple(row) for row in rows):
        lines = [[column, *(cell_text(row[column]) for row in rows if tuple(row) == columns)] for column in columns]
        _show_blocks([_column([for_stream(text, out) for text in texts]) for texts in lines], width, out)


def cell_text(value: Any) -> str:
    """A number to four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same rows for a page; those with the same columns stand together."""
    tables = []
    for columns in dict.fromkeys(tuple(row) for row in rows):
        lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(map(cell_text, row.values())) + " |" for row in rows if tuple(row) == columns]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


_Column = tuple[list[str], list[list[str]]]    # lines of the head, lines of each cell: all equally wide


def _column(texts: list[str]) -> _Column:
    head, *cells = texts
    broken = [textwrap.wrap(cell, _CELL) or [""] for cell in cells]
    widest = max((len(line) for cell in broken for line in cell), default=0)
    over = textwrap.wrap(head, max(widest, 12)) or [""]
    width = max(widest, *map(len, over))
    # Figures are read by their last digits: a column of them stands to the right.
    right = all(any(c.isdigit() for c in cell[:2]) or cell in ("-", "", "missed") for cell in cells)
    put = str.rjust if right else str.ljust
    return [put(line, width) for line in over], [[put(line, width) for line in cell] for cell in broken]


def _show_blocks(columns: list[_Column], width: int, out: TextIO) -> None:
    first, rest = columns[0], columns[1:]
    while True:
        used, block = len(first[0][0]), [first]
        while rest and (len(block) == 1 or used + 2 + len(rest[0][0][0]) <= width):
            used += 2 + len(rest[0][0][0])
            block.append(rest.pop(0))
        heads = max(len(head) for head, _ in block)
        lines = [[*[""] * (heads - len(head)), *head] for head, _ in block]
        print(*_across(lines), "-" * used, sep="\n", file=out)
        for k in range(len(first[1])):
            print(*_across([cells[k] for _, cells in block]), sep="\n", file=out)
        print(file=out)
        if not rest:
            return


def _across(cells: list[list[str]]) -> list[str]:
    """Lines of cells that stand side by side."""
    deep, wide = max(map(len, cells)), [len(cell[-1]) for cell in cells]
    rows = ([cell[k] if k < len(cell) else "" for cell in cells] for k in range(deep))
    return ["  ".join(text.ljust(w) for text, w in zip(row, wide, strict=True)) for row in rows]


def tell(message: str, stream: TextIO | None = None) -> None:
    """A line on standard error, or another stream, if it can be had; nothing depends on it."""
    out = stream or sys.stderr
    if out is None:
        return
    try:
        print(for_stream(message, out), file=out, flush=True)
    except (OSError, ValueError):
        _give_up(out)


def printed(show: Callable[[], None], kept: str) -> None:
    """Calls what prints results, and sees them out. kept: where else they are, as the end of a sentence.

    Raises OutputError where standard output is closed, or full, or nobody reads it any more.
    """
    if sys.stdout is None:
        raise OutputError(f"the results could not be printed, standard output is closed; {kept}.")
    try:
        show()
        sys.stdout.flush()
    except BrokenPipeError:
        _give_up(sys.stdout)
        raise OutputError(f"not all of the results could be printed, nobody reads standard output any more; {kept}.") from None
    except OSError as error:
        _give_up(sys.stdout)
        raise OutputError(f"the results could not be printed ({error.strerror or error}); {kept}.") from None


def _give_up(stream: TextIO) -> None:
    """What is left in the buffers goes nowhere, or Python would try it again at its end, and say so."""
    if stream in (sys.__stdout__, sys.__stderr__):
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            stream.flush()
