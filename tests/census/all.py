"""Every family, and why timm's are none of them."""

from __future__ import annotations

from collections.abc import Iterable

from census import decoders, encoders, heads, mixtures, plain, recurrent, seq2seq, speech, torch_own, vision
from census.family import Family

TABLES = (mixtures, decoders, heads, encoders, seq2seq, vision, speech, recurrent, torch_own, plain)
FAMILIES: list[Family] = [family for table in TABLES for family in table.FAMILIES]
DEFAULT = [family for family in FAMILIES if family.default]


def architectures(families: Iterable[Family]) -> set[str]:
    """Families without regard to their heads and forms: ``"bert, answers"`` is bert."""
    return {family.name.partition(",")[0] for family in families}


def timm_is_missing() -> str:
    """Why timm's models are left out; "" where it can be imported."""
    try:
        import timm  # noqa: F401
    except ImportError as error:
        return f"timm cannot be imported: {error}"
    return ""
