"""Published architectures, built small and offline: what normwise makes of them against expectations that were written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from census.all import FAMILIES
from census.compare import faults
from census.family import Family, Unavailable

DEFAULT = [f for f in FAMILIES if f.default]


def _check(family: Family) -> None:
    try:
        model = family.build()
    except Unavailable as why:
        pytest.skip(str(why))
    assert faults(family, model) == []


@pytest.mark.parametrize("family", DEFAULT, ids=lambda f: f.name)
def test_a_few_of_every_kind(family: Family) -> None:
    _check(family)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_family(family: Family, coverage: Any) -> None:
    _check(family)
    coverage("census", family.group, "families")
