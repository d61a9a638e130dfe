"""What is told of many tensors together: totals, roles, tensors of one kind at every depth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from normwise.reports import table

Record = dict[str, Any]
LISTED = 5
_FIGURES = (("l2", "L2"), ("rms", "RMS"), ("largest_unit", "largest unit"), ("smallest_unit", "smallest unit"), ("sigma", "σ₁"),
            ("stable_rank", "stable rank"), ("effective_rank", "effective rank"), ("rank", "rank"))  # fmt: skip


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def together(records: Sequence[Record]) -> Record:
    """Tensors as one: sums, the extremes with where they are, and medians of ranks."""
    measured = [r for r in records if r["l2"] is not None]
    entries = sum(r["entries"] for r in records)
    l2 = length(r["l2"] for r in measured)
    counted = [r for r in measured if r["zeros"] is not None]
    found: Record = {
        "tensors": len(records), "entries": entries, "l2": l2, "rms": l2 / math.sqrt(entries) if entries else 0.0,
        "zeros": sum(r["zeros"] for r in counted), "outliers": sum(r["outliers"] for r in counted),
        "nonfinite": sum(r["nonfinite"] for r in records), "dead_units": sum(r.get("dead_units", 0) for r in records),
    }  # fmt: skip
    found |= _extreme(records, "largest_unit", max) | _extreme(records, "smallest_unit", min) | _extreme(records, "sigma", max)
    for rank in ("stable_rank", "effective_rank"):
        values = [r[rank] for r in records if rank in r]
        found |= {rank: statistics.median(values)} if values else {}
    changes = [r["change"] for r in records if "change" in r]
    if changes:
        moves, start = [c["l2"] for c in changes], length(c["start"] for c in changes)
        moved = None if None in moves else length(moves)
        found["change"] = {"l2": moved, "start": start, "relative": moved / start if moved is not None and start else None}
    return found


def length(values: Iterable[float]) -> float:
    """Of a vector; where squares leave float64's range, in the slower way that does without them."""
    listed = list(values)
    found = math.sqrt(sum(value * value for value in listed))
    return found if 1e-100 < found < 1e100 else math.hypot(*listed)


def _extreme(records: Iterable[Record], key: str, which: Any) -> Record:
    there = [r for r in records if r.get(key) is not None]
    if not there:
        return {}
    one = which(there, key=lambda r: r[key])
    at = one.get(f"{key}_at")
    return {key: one[key], f"{key}_in": one["name"] + (f"[{at}]" if at is not None else "")}


def by_role(records: Sequence[Record]) -> dict[str, Record]:
    roles = dict.fromkeys(r["role"] for r in records)
    return {role: together([r for r in records if r["role"] == role]) for role in roles}


# ---------------------------------------------------------------------------------------------------------------- text


def text(results: Record) -> str:
    """As ``print`` shows it."""
    parts = [headline(results), *[f"  {note}" for note in notes(results)]]
    for rows in (role_rows(results), kind_rows(results)):
        if rows:
            right = [i for i, name in enumerate(rows[0]) if name not in ("role", "tensors of one kind")]
            parts += ["", table(list(rows[0]), [list(row.values()) for row in rows], right)]
    if results["policy"] is not None:
        parts += ["", results["policy"]["says"]]
    return "\n".join(parts)


def headline(results: Record) -> str:
    total = results["total"]
    against = ""
    if results["against"] and "change" in total:
        against = f"; ‖ΔW‖/‖W₀‖ {short(total['change']['relative'])} against {results['against']}"
    bad = f", {total['nonfinite']:,} entries are not finite" if total["nonfinite"] else ""
    return (
        f"{results['inspect']} ({results['format']}): {total['tensors']} tensors, {total['entries']:,} entries, L2 {short(total['l2'])}"
        f"{bad}{against}"
    )


def notes(results: Record) -> list[str]:
    """What is to be known of the figures."""
    found = list(results["notes"])
    if results["guessed"]:
        found.append("roles and units are guessed from names and shapes; --config or --model gives the library's own")
    if results["skipped"]:
        found.append(f"skipped: {len(results['skipped'])} tensors, such as {results['skipped'][0]}")
    return found


def role_rows(results: Record) -> list[dict[str, str]]:
    """A row for each role, and one for the total."""
    roles = {**results["roles"], "total": results["total"]}
    columns = (("dead_units", "dead units"), ("outliers", "outliers"), ("nonfinite", "not finite"))
    rows = []
    for role, found in roles.items():
        row = {"role": role, "tensors": str(found["tensors"]), "entries": f"{found['entries']:,}"}
        row |= {title: short(found.get(key)) for key, title in _FIGURES if key != "rank"}
        row["zeros, %"] = short(100 * found["zeros"] / max(found["entries"], 1))
        row |= {title: short(found[key]) for key, title in columns}
        if results["against"]:
            row["‖ΔW‖/‖W₀‖"] = short(found.get("change", {}).get("relative"))
        rows.append(row)
    return _without_empty(rows)


def kind_rows(results: Record) -> list[dict[str, str]]:
    """A row for the tensors whose names differ in their numbers alone, from the lowest to the highest figure."""
    kinds: dict[str, list[Record]] = {}
    for record in results["tensors"]:
        kinds.setdefault(record["kind"], []).append(record)
    rows = []
    for kind, same in kinds.items():
        row = {"tensors of one kind": kind + (f" ({len(same)})" if len(same) > 1 else "")}
        row |= {title: span([r.get(key) for r in same]) for key, title in _FIGURES if key not in ("l2", "effective_rank")}
        if results["against"]:
            changes = [r.get("change", {}) for r in same]
            row |= {title: span([c.get(key) for c in changes]) for key, title in
                    (("relative", "‖ΔW‖/‖W₀‖"), ("rank", "rank of ΔW"), ("angle", "angle, °"))}  # fmt: skip
        rows.append(row)
    return _without_empty(rows)


def tensor_rows(results: Record) -> list[dict[str, str]]:
    """A row for each tensor, with all figures."""
    more = (("zeros", "zeros"), ("dead_units", "dead units"), ("outliers", "outliers"), ("nonfinite", "not finite"))
    rows = []
    for r in results["tensors"]:
        row = {"tensor": r["name"], "role": r["role"], "shape": "×".join(map(str, r["shape"])), "dtype": r["dtype"]}
        row |= {title: short(r.get(key)) for key, title in (*_FIGURES, *more)}
        if results["against"]:
            change = r.get("change", {})
            row |= {"‖ΔW‖": short(change.get("l2")), "‖ΔW‖/‖W₀‖": short(change.get("relative")), "rank of ΔW": short(change.get("rank")),
                    "σ₁ of ΔW": short(change.get("sigma")), "angle, °": short(change.get("angle"))}  # fmt: skip
        rows.append(row)
    return _without_empty(rows)


def _without_empty(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Without the columns that say nothing in any row."""
    empty = {name for name in (rows[0] if rows else ()) if all(row[name] == "-" for row in rows)}
    return [{name: value for name, value in row.items() if name not in empty} for row in rows]


def span(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = short(min(known)), short(max(known))
    return low if low == high else f"{low} … {high}"


def short(value: float | None) -> str:
    """A number to three digits; whole ones as they are."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
