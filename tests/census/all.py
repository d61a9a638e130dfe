"""Every family."""

from __future__ import annotations

from census import mixtures
from census.family import Family

FAMILIES: list[Family] = [*mixtures.FAMILIES]
