"""What is told of one tensor: norms, units, spectrum, and how far it is from what it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from normwise.inspection.adapters import Product
from normwise.inspection.checkpoint import widest
from normwise.inspection.spectra import Slabs, Spectra, of_product, rounding, summary
from normwise.inspection.stored import Stored
from normwise.inspection.tally import Numbers, Tally, tally
from normwise.norms import L2
from normwise.parameters.inventory import Entry
from normwise.parameters.layouts import ROWS, Layout, block_view

Record = dict[str, Any]


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
    if way[0] == "rows":
        units = found.rows.sqrt()
    elif way[0] == "columns":
        units = found.columns.sqrt() if found.columns is not None else found.rows
    else:
        tensor = whole()
        units = L2().measure(block_view(layout, "unit", False).blocks(tensor.to(widest(tensor.dtype)))).double().nan_to_num()
    return record | _units(units), found


def _way(layout: Layout) -> tuple[str, int]:
    """Where the units of a tensor lie, and how long the rows are that its squares are summed over."""
    own = [axis in ROWS for axis in layout.axes]
    lead = own.index(False) if False in own else len(own)
    n = math.prod(layout.shape[lead:])
    if len(layout.axes) < 2 or n == math.prod(layout.shape) or lead == len(own):
        columns = layout.axes == "io"
        return ("columns", layout.shape[1]) if columns else ("else", math.prod(layout.shape)) if True in own[1:] else ("vector", n)
    return ("else" if any(own[lead:]) else "rows", n)


def _units(units: Tensor) -> Record:
    """Unit norms in short: the largest and the smallest, and those that are zero."""
    least, most = int(units.argmin()), int(units.argmax())
    return {
        "units": len(units), "largest_unit": float(units[most]), "largest_unit_at": most, "smallest_unit": float(units[least]),
        "smallest_unit_at": least, "dead_units": int((units == 0).sum()),
    }  # fmt: skip


def spectrum_of(numbers: Numbers, layout: Layout, whole: Callable[[], Tensor], limit: float, spectra: Spectra, record: Record) -> None:
    """Adds a matrix's singular values to ``record`` when ``spectra`` has them. A stack of experts is one matrix each."""
    axes = [axis for axis, n in zip(layout.axes, layout.shape, strict=True) if n > 1]
    turns = sum((a in ROWS) != (b in ROWS) for a, b in pairwise(axes))
    if "e" not in axes and turns == 1:
        first = next(i for i, axis in enumerate(layout.axes) if (axis in ROWS) != (layout.axes[0] in ROWS)) if layout.axes else 0
        rows, n = math.prod(layout.shape[:first]), math.prod(layout.shape[first:])
        slabs = Slabs(lambda first, count: numbers.fetch(first, count), rows, n)
        spectra.add(slabs, limit, lambda values: record.update(summary(values[None], limit)))
        return
    tensor = whole()
    blocks = block_view(layout, "expert" if "e" in axes else "tensor", True).blocks(tensor)
    gathered: list[Tensor] = []

    def note(values: Tensor) -> None:
        gathered.append(values)
        if len(gathered) == len(blocks):
            record.update(summary(torch.stack(gathered), limit))

    for block in blocks:
        m, n = block.shape
        flat = block.reshape(-1)
        spectra.add(Slabs(lambda a, c, flat=flat: flat[a : a + c], m, n), limit, note)    # type: ignore[misc]


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
        return record | {"l2": None, "rms": None}
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
