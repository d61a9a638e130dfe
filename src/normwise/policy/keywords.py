"""What all named rules share: the keywords that they hand on, and who they are about."""

from __future__ import annotations

from typing import TypedDict

from normwise.parameters.layouts import Layout
from normwise.parameters.selectors import Selector


class Common(TypedDict, total=False):
    """The keywords that every named rule hands on to its Rule."""

    exclude: Selector | None
    every: int
    start: int
    stop: int | None
    layout: Layout | None
    optional: bool
    rounding: str


EVERYTHING = "role:all"
MATRICES = ("role:hidden", "role:conv", "role:recurrent")
"""What the matrix methods act on: no embeddings and heads, whose rows are not mixed by a layer."""


def on_matrices(params: Selector | None, common: Common) -> Common:
    """``common`` with ``params``, which default to :data:`MATRICES`; a model need not have all of these roles."""
    if params is not None:
        return {**common, "params": params}  # type: ignore[typeddict-unknown-key]
    return {"optional": True, **common, "params": MATRICES}  # type: ignore[typeddict-unknown-key]
