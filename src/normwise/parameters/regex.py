"""Regular expressions that end: whether one is found in a parameter's name, in a bounded number of steps.

A policy's file may come from a stranger, and Python's ``re`` backtracks: ``(a+)+$`` takes longer than the universe on a name of fifty
letters, and only a signal can interrupt it. A selector asks only *whether* a pattern is found, which needs no backtracking: all places
where a part of the pattern can end are followed at once (Thompson, 1968), as the bits of one number. Names are short, so each part of a
pattern costs a few operations on a small integer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from importlib import import_module
from typing import Any

from normwise.errors import PolicyError

# Characters of a selector; a hundred describe any family of names.
LONGEST = 1000
# Parts of a pattern tried on one name, some hundredths of a second; a usual pattern takes a hundred.
MOST_STEPS = 20_000

_parser: Any = import_module("re._parser")    # what ``re`` itself reads patterns with; named so since Python 3.11
_CATEGORIES = {
    "CATEGORY_DIGIT": r"\d", "CATEGORY_NOT_DIGIT": r"\D", "CATEGORY_SPACE": r"\s", "CATEGORY_NOT_SPACE": r"\S",
    "CATEGORY_WORD": r"\w", "CATEGORY_NOT_WORD": r"\W",
}  # fmt: skip
_SINGLE = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
_KNOWN = {*_SINGLE, "AT", "FAILURE", "BRANCH", "SUBPATTERN", "MAX_REPEAT", "MIN_REPEAT", "ASSERT", "ASSERT_NOT"}


@lru_cache(maxsize=512)
def finder(pattern: str, flags: int = 0) -> Callable[[str], bool]:
    """Whether ``re.search(pattern, name, flags)`` finds something, as a function of the name.

    Raises PolicyError here for a pattern that is broken, is longer than 1000 characters, or refers back to what another part matched; and
    from the function if a name takes more than 20,000 steps.
    """
    shown = pattern if len(pattern) <= 100 else f"{pattern[:97]}..."
    if len(pattern) > LONGEST:
        raise PolicyError(f"'re:{shown}' is no regular expression for names: it has {len(pattern)} characters, {LONGEST} at most are read.")
    try:
        tree = _parser.parse(pattern, flags)
        _check(tree, shown)
    except (re.error, OverflowError, RecursionError) as error:
        raise PolicyError(f"'re:{shown}' is no regular expression: {error}.") from error
    return lambda name: _Search(shown, name, tree.state.flags).found(tree)


def _check(tree: Any, shown: str) -> None:
    for kind, value in tree:
        if str(kind) not in _KNOWN:
            raise PolicyError(
                f"'re:{shown}' has a part of the kind {str(kind).lower()}, which refers back to what another part matched; such "
                "patterns may take for ever. Write it without, or as a function: lambda entry: ..."
            )
        for part in _parts(str(kind), value):
            _check(part, shown)
        if str(kind).startswith("ASSERT") and value[0] < 0 and len(set(value[1].getwidth())) > 1:
            raise re.error("look-behind requires a pattern of fixed width")


def _parts(kind: str, value: Any) -> Iterable[Any]:
    """The patterns within a part."""
    if kind == "BRANCH":
        return value[1]
    return value[-1:] if kind not in (*_SINGLE, "AT", "FAILURE") else ()


class _Search:
    """One search in one name. A set of places is a number whose bit p says that the place before the p-th character is in it."""

    def __init__(self, shown: str, name: str, flags: int) -> None:
        self.shown, self.name, self.flags, self.steps = shown, name, flags, 0
        self.everywhere = (1 << (len(name) + 1)) - 1
        # Each part is asked once for each letter of the name, however often a repetition comes back to it.
        self.fitting: dict[tuple[str, Any, int], int] = {}

    def found(self, tree: Any) -> bool:
        return self.sequence(tree, self.everywhere, self.flags) != 0

    def sequence(self, tree: Any, places: int, flags: int) -> int:
        """Where the pattern can end that begins at one of ``places``."""
        for kind, value in tree:
            if not places:
                break
            self.steps += 1
            if self.steps > MOST_STEPS:
                raise PolicyError(f"'re:{self.shown}' takes more than {MOST_STEPS} steps on the name {self.name[:60]!r}; write it simpler.")
            places = self.part(str(kind), value, places, flags)
        return places

    def part(self, kind: str, value: Any, places: int, flags: int) -> int:
        if kind in _SINGLE:
            return (places & self.fits(kind, value, flags)) << 1
        if kind == "AT":
            return places & self.anchors(str(value), flags)
        if kind == "FAILURE":    # (?!)
            return 0
        if kind == "BRANCH":
            ends = 0
            for tree in value[1]:
                ends |= self.sequence(tree, places, flags)
            return ends
        if kind == "SUBPATTERN":
            _, added, removed, tree = value
            return self.sequence(tree, places, (flags | added) & ~removed)
        if kind.endswith("REPEAT"):
            least, most, tree = value
            return self.repeated(least, most, tree, places, flags)
        direction, tree = value
        # A look-behind has one width, which was checked, so it can be matched forwards from its beginning.
        back = tree.getwidth()[0] if direction < 0 else 0
        held = 0
        for p in _bits(places):
            begin = p - back
            ends = self.sequence(tree, 1 << begin, flags) if begin >= 0 else 0
            held |= (1 << p) if (ends >> p & 1 if back or direction < 0 else ends) else 0
        return held if kind == "ASSERT" else places & ~held

    def repeated(self, least: int, most: int, tree: Any, places: int, flags: int) -> int:
        """Greedy or not makes no difference to whether there is an end."""
        for _ in range(least):
            before, places = places, self.sequence(tree, places, flags)
            if places == before:    # nothing at all, or every repetition may be empty: further ones change nothing
                break
        ends, fresh, times = places, places, int(most) - least
        while fresh and times > 0:
            fresh = self.sequence(tree, fresh, flags) & ~ends
            ends |= fresh
            times -= 1
        return ends

    def fits(self, kind: str, value: Any, flags: int) -> int:
        """The places before a character that a part for one character matches. Looked at once for each part."""
        key = (kind, id(value) if kind == "IN" else value, flags)
        if key not in self.fitting:
            holds = {letter: _holds(kind, value, letter, flags) for letter in set(self.name)}
            self.fitting[key] = sum(1 << p for p, letter in enumerate(self.name) if holds[letter])
        return self.fitting[key]

    def anchors(self, where: str, flags: int) -> int:
        name, end = self.name, len(self.name)
        if where == "AT_BEGINNING_STRING" or (where == "AT_BEGINNING" and not flags & re.MULTILINE):
            return 1
        if where == "AT_END_STRING":
            return 1 << end
        if where in ("AT_BEGINNING", "AT_END"):
            shift = where == "AT_BEGINNING"
            lines = sum(1 << (p + shift) for p, letter in enumerate(name) if letter == "\n")
            if flags & re.MULTILINE:
                return lines | (1 if shift else 1 << end)
            return 1 << end | (1 << (end - 1) if name.endswith("\n") else 0)
        word = [_holds("IN", [("CATEGORY", "CATEGORY_WORD")], letter, flags) for letter in name]
        edges = sum(1 << p for p, (a, b) in enumerate(zip([False, *word], [*word, False], strict=True)) if a != b)
        if where == "AT_BOUNDARY":
            return edges
        return self.everywhere & ~edges


def _holds(kind: str, value: Any, letter: str, flags: int) -> bool:
    """Whether a part for one character matches the letter."""
    if kind == "ANY":
        return letter != "\n" or bool(flags & re.DOTALL)
    cases = _cases(letter) if flags & re.IGNORECASE else (letter,)
    codes = [ord(case) for case in cases]
    if kind in ("LITERAL", "NOT_LITERAL"):
        return (value in codes) == (kind == "LITERAL")
    negated = bool(value) and str(value[0][0]) == "NEGATE"
    return any(_in(str(what), item, letter, codes, flags) for what, item in value[negated:]) != negated


def _in(what: str, item: Any, letter: str, codes: list[int], flags: int) -> bool:
    if what == "LITERAL":
        return item in codes
    if what == "RANGE":
        return any(item[0] <= code <= item[1] for code in codes)
    return re.fullmatch(_CATEGORIES[str(item)], letter, flags & re.ASCII) is not None


def _cases(letter: str) -> set[str]:
    """The letter in both cases, single characters only."""
    found = {letter, letter.lower(), letter.upper()}
    return {case for one in found for case in (one, one.lower(), one.upper()) if len(case) == 1}


def _bits(places: int) -> Iterator[int]:
    while places:
        low = places & -places
        yield low.bit_length() - 1
        places ^= low
