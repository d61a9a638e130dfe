"""What is printed: with plain characters where a terminal has no others, and never at the price of the results."""

from __future__ import annotations

import codecs
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
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
_WIDE_ENOUGH = 200


def plain(text: str) -> str:
    """In ASCII: what has no other spelling becomes a question mark."""
    return "".join(map(_spelled, text))


def _spelled(character: str) -> str:
    if character.isascii():
        return character
    if character in _PLAIN:
        return _PLAIN[character]
    if "\u2500" <= character <= "\u259f":  # what remains of lines and blocks
        return "+" if character < "\u2580" else "#"
    spelled = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return spelled or "?"


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
    """rich's console, which does not end the process where a pipe is closed. A pipe has no width of its own: it is not cut to 80."""
    need("study", "rich", what="this command")
    from rich.console import Console

    class _Ours(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return _Ours(file=out, width=None if out.isatty() else _WIDE_ENOUGH, highlight=False)


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
