"""What is told of one tensor: norms, units, spectrum, and how far it is from what it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from normwise.errors import DataError
from normwise.inspection.adapters import Product
from normwise.inspection.checkpoint import widest
from normwise.inspection.spectra import Slabs, Spectra, of_product, rounding, summary
from normwise.inspection.stored import Stored
from normwise.inspection.tally import Numbers, Tally, not_finite, tally
from normwise.norms import L2
from normwise.parameters.inventory import Entry
from normwise.parameters.layouts import ROWS, Layout, block_view

Record = dict[str, Any]
_MOST_PRODUCT = 1e140


class Change:
    """What was added to a tensor: the difference of two stored ones of one shape, computed where it is read."""

    def __init__(self, now: Stored, before: Stored) -> None:
        self.now, self.before = now, before
        self.dtype = widest(now.dtype) if widest(now.dtype) == torch.float64 else widest(before.dtype)
        self.count = now.count

    def fetch(self, first: int, count: int, into: Tensor | None = None) -> Tensor:
        return self.now.fetch(first, count).to(self.dtype) - self.before.fetch(first, count).to(self.dtype)


def norms_of(numbers: Numbers, layout: Layout | None, whole: Callable[[], Tensor]) -> tuple[Record, Tally]:
    """Norms of a tensor and of its units. whole: the tensor as one, for layouts whose units lie neither in rows nor in columns."""
    way = _way(layout) if layout is not None else ("vector", numbers.count)
    found = tally(numbers, way[1], way[0] == "columns")
    finite = numbers.count - found.nonfinite
    record: Record = {
        "l2": found.l2, "rms": found.l2 / math.sqrt(finite) if finite else 0.0, "zeros": found.zeros, "outliers": found.outliers,
        "nonfinite": found.nonfinite,
    }  # fmt: skip
    if layout is None or way[0] == "vector":
        return record, found
    if way[0] == "else":
        return record | _units(*_units_of(layout, whole())), found
    columns = way[0] == "columns"
    units = found.columns if columns and found.columns is not None else found.rows
    return record | _units(units, not_finite(numbers, way[1], columns) if found.nonfinite else None), found


def _units_of(layout: Layout, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of units that lie neither in rows nor in columns, and which of them have an entry that is not finite."""
    blocks = block_view(layout, "unit", False).blocks(tensor.to(widest(tensor.dtype)))
    bad = ~blocks.isfinite()
    blocks = torch.where(bad, 0, blocks)
    # A power of two, so that no digit changes; it matters where the squares of float64 numbers leave its range.
    scale = _power_of(float(blocks.abs().max())) if blocks.dtype == torch.float64 else 1.0
    return L2().measure(blocks / scale).double().flatten() * scale, bad.flatten(1).any(1)


def _power_of(size: float) -> float:
    """A power of two near ``size``; 1 for usual sizes, and for none."""
    if not size or 1e-100 < size < 1e100:
        return 1.0
    return 2.0 ** (max(min(math.frexp(size)[1], 1000), -1000) if math.isfinite(size) else 1000)


def _way(layout: Layout) -> tuple[str, int]:
    """Where the units of a tensor lie, and how long the rows are that its squares are summed over."""
    own = [axis in ROWS for axis in layout.axes]
    if all(own):    # each unit is one entry: a bias, also one of heads, experts or a fused layer
        return "vector", math.prod(layout.shape)
    lead = own.index(False)
    n = math.prod(layout.shape[lead:])
    if len(layout.axes) < 2 or not lead:
        columns = layout.axes == "io"
        return ("columns", layout.shape[1]) if columns else ("else", math.prod(layout.shape)) if True in own[1:] else ("vector", n)
    return ("else" if any(own[lead:]) else "rows", n)


def _units(units: Tensor, bad: Tensor | None = None) -> Record:
    """Unit norms in short: the largest and the smallest, and those that are zero. bad: the units with entries that are not finite, of
    which none is dead, nor the smallest for want of others."""
    dead = units == 0 if bad is None else (units == 0) & ~bad
    least, most = int((units if bad is None else units.masked_fill((units == 0) & bad, math.inf)).argmin()), int(units.argmax())
    return {
        "units": len(units), "largest_unit": float(units[most]), "largest_unit_at": most, "smallest_unit": float(units[least]),
        "smallest_unit_at": least, "dead_units": int(dead.sum()),
    }  # fmt: skip


def spectrum_of(numbers: Numbers, layout: Layout, whole: Callable[[], Tensor], limit: float, spectra: Spectra, record: Record) -> None:
    """Adds a matrix's singular values to ``record`` when ``spectra`` has them. A stack of experts is one matrix each."""
    scale = _power_of(record["l2"]) if numbers.dtype == torch.float64 else 1.0
    axes = [axis for axis, n in zip(layout.axes, layout.shape, strict=True) if n > 1]
    turns = sum((a in ROWS) != (b in ROWS) for a, b in pairwise(axes))
    if "e" not in axes and turns == 1:
        first = next(i for i, axis in enumerate(layout.axes) if (axis in ROWS) != (layout.axes[0] in ROWS)) if layout.axes else 0
        rows, n = math.prod(layout.shape[:first]), math.prod(layout.shape[first:])
        slabs = Slabs(lambda first, count: numbers.fetch(first, count) / scale if scale != 1 else numbers.fetch(first, count), rows, n)
        spectra.add(slabs, limit / scale, lambda values: record.update(summary(values[None], limit / scale, scale)))
        return
    tensor = whole() / scale if scale != 1 else whole()
    blocks = block_view(layout, "expert" if "e" in axes else "tensor", True).blocks(tensor)
    gathered: list[Tensor] = []

    def note(values: Tensor) -> None:
        gathered.append(values)
        if len(gathered) == len(blocks):
            record.update(summary(torch.stack(gathered), limit / scale, scale))

    for block in blocks:
        m, n = block.shape
        flat = block.reshape(-1)
        spectra.add(Slabs(lambda a, c, flat=flat: flat[a : a + c], m, n), limit / scale, note)    # type: ignore[misc]


def is_matrix(layout: Layout) -> bool:
    """Whether it has singular values."""
    long = [axis for axis, n in zip(layout.axes, layout.shape, strict=True) if n > 1]
    return bool(set(long) & set(ROWS)) and bool(set(long) - set(ROWS))


def change_of(now: Stored, before: Stored, entry: Entry | None, spectra: Spectra | None, record: Record) -> None:
    """Adds ‖ΔW‖, ‖W₀‖, their quotient and the angle between W and W₀ to ``record["change"]``; with ``spectra`` ΔW's, too.

    The rank of ΔW counts what rounding of W and W₀ to their dtypes cannot have made.
    """
    change = Change(now, before)
    layout = entry.layout if entry is not None else None
    whole = lambda: change.fetch(0, change.count).view(now.shape)    # noqa: E731
    found, _ = norms_of(change, layout, whole)
    start = tally(before, max(before.count, 1)).l2
    told: Record = {key: value for key, value in found.items() if key not in ("rms", "zeros", "outliers")}
    told |= {"start": start, "relative": _share(found["l2"], start), "angle": angle(record["l2"], start, found["l2"])}
    # How far a tensor moved that is no longer finite, or was not, has no number; its finite part is not the tensor.
    told |= {"l2": None, "relative": None, "angle": None} if found["nonfinite"] else {}
    told["changed_entries"] = change.count - found["zeros"]
    record["change"] = told
    if spectra is not None and layout is not None and is_matrix(layout) and not found["nonfinite"]:
        limit = rounding(record["l2"], now.dtype) + rounding(start, before.dtype)
        spectrum_of(change, layout, whole, limit, spectra, told)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def angle(a: float, b: float, c: float) -> float | None:
    """Degrees between two vectors of lengths a and b whose difference has length c, by Kahan's formula, which keeps small angles."""
    a, b = max(a, b), min(a, b)
    if not b or not math.isfinite(a + b + c):
        return None
    if not 1e-100 < b <= a < 1e100:    # or the products below may leave float64's range
        a, b, c = (math.ldexp(one, -math.frexp(a)[1]) for one in (a, b, c))
    c = min(max(c, a - b), a + b)
    rest = c - (a - b) if b >= c else b - (a - c)
    below = (a + (b + c)) * ((a - c) + b)
    return math.degrees(2 * math.atan(math.sqrt(((a - b) + c) * max(rest, 0.0) / below))) if below > 0 else 180.0


# ------------------------------------------------------------------------------------------------------------ adapters


def product_record(product: Product, base: Stored | None) -> Record:
    """What is told of s·BA; with the base's weight also how far it moves that."""
    a, b = product.factors()
    nonfinite = int((~a.isfinite()).sum() + (~b.isfinite()).sum())
    m, n = product.shape
    record: Record = {
        "factors": [list(product.b.shape), list(product.a.shape)], "scale": product.scale, "adapter_rank": product.rank,
        "zeros": None, "outliers": None, "nonfinite": nonfinite,
    }  # fmt: skip
    if nonfinite:
        start = tally(base, max(base.count, 1)).l2 if base is not None else 0.0
        change = {"change": {"l2": None, "start": start, "relative": None, "angle": None}}
        return record | {"l2": None, "rms": None} | (change if base is not None else {})
    if not float(b.abs().max()) * float(a.abs().max()) * abs(product.scale) < _MOST_PRODUCT:
        raise DataError(f"the product B·A of {product.layer} has entries that float64 cannot square: its factors or its scale are damaged.")
    values, rows = of_product(a, b, product.scale)
    l2 = float(values.square().sum().sqrt())
    limit = max(rounding(float(b.norm() * a.norm()) * abs(product.scale), dtype) for dtype in (product.a.dtype, product.b.dtype))
    units = _units(rows.norm(dim=1)) if not product.embedding else {}
    record |= {"l2": l2, "rms": l2 / math.sqrt(m * n), **units, **summary(values[None], limit)}
    if base is not None:
        record["change"] = _moved(product, base, a, b, l2) | {key: record[key] for key in ("sigma", "stable_rank", "rank")}
    return record


def _moved(product: Product, base: Stored, a: Tensor, b: Tensor, l2: float) -> Record:
    """‖s·BA‖ / ‖W₀‖, and the angle between W₀ and W₀ + s·BA from ⟨W₀, BA⟩ = ⟨Bᵀ W₀, A⟩, a product of r rows."""
    m, n = product.shape
    across = base.shape[0] != m or (m == n and product.transposed)
    weight = base.whole().flatten(1)
    start = tally(base, max(base.count, 1)).l2
    inner = product.scale * sum(
        float((b[i : i + 256].mT @ (weight[:, i : i + 256].mT if across else weight[i : i + 256]).double()).mul(a).sum())
        for i in range(0, m, 256)
    )
    now = math.sqrt(max(start * start + 2 * inner + l2 * l2, 0.0))
    return {"l2": l2, "start": start, "relative": _share(l2, start), "angle": angle(now, start, l2)}
