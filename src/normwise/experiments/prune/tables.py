"""What ``normwise prune`` found, in words and as rows of tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from normwise.experiments.framework.figures import NO_DIFFERENCE, differ, share_interval


def verdict(results: Mapping[str, Any]) -> str:
    """How much smaller, and whether it is better or worse: only where the intervals of the test accuracies do not overlap."""
    full, smaller = (results["summary"][name] for name in ("full", "smaller"))
    sizes = f"The smaller network has {100 * smaller['parameters'] / full['parameters']:.0f}% of the parameters"
    count = results.get("test_images")
    if count is None:    # of results that were kept before this was noted
        return f"{sizes}."
    one, other = (share_interval(network["fine_tuned"]["values"], count) for network in (smaller, full))
    low, high = (f"{100 * network['fine_tuned']['mean']:.1f}%" for network in (smaller, full))
    about = f"{sizes} and, fine-tuned, is right on {low} of {count} test images, the full one on {high}"
    if not differ(one, other):
        return f"{about}: {NO_DIFFERENCE}, since the intervals {_ends(one)} and {_ends(other)} overlap."
    return f"{about}; the intervals {_ends(one)} and {_ends(other)} do not overlap."


def _ends(interval: tuple[float, float]) -> str:
    return f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def trial(line: Mapping[str, Any]) -> dict[str, str]:
    """A strength that was tried, with the tuning seed."""
    row = {"strength": f"{line['strength']:.2g}"}
    if "failed" in line:
        return {**row, "validation, %": "-", "fine-tuned, %": "-", "parameters": "-", "multiplications": "-"}
    scores = {"validation, %": f"{100 * line['trained']:.1f}", "fine-tuned, %": f"{100 * line['fine_tuned']:.1f}"}
    return {**row, **scores, "parameters": f"{line['parameters']:,}", "multiplications": f"{line['multiplications']:,}"}


def networks(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """The full network, the smaller one and the same shape from fresh weights, with what each step of them costs."""
    full = _row("full", results, "full", results["timing"]["full"])
    smaller = _row("smaller: group lasso, shrunk", results, "smaller", _typical(results, "smaller"))
    ratios = _typical(results, "ratio")
    fresh = _row("its shape from fresh weights", results, "fresh", {})
    share = {**dict.fromkeys(full, ""), "network": "smaller / full"}
    found = results["summary"]
    share |= {what: f"{found['smaller'][what] / found['full'][what]:.3f}" for what in ("parameters", "multiplications")}
    share |= {head: f"{ratios[kind]:.2f}" for head, kind in _TIMES.items()}
    return [full, smaller, fresh, share]


_TIMES = {"step, ms": "step_ms", "inference, ms": "inference_ms", "one input, ms": "single_ms"}


def _row(label: str, results: Mapping[str, Any], name: str, times: Mapping[str, float]) -> dict[str, str]:
    found = results["summary"][name]
    return {
        "network": label, "test, %": _percent(found["trained"]), "fine-tuned, %": _percent(found["fine_tuned"]),
        "parameters": f"{found['parameters']:,.0f}", "multiplications": f"{found['multiplications']:,.0f}",
        **{head: f"{times[kind]:.3g}" if times else "" for head, kind in _TIMES.items()},
    }  # fmt: skip


def _typical(results: Mapping[str, Any], what: str) -> dict[str, float]:
    """The median over the seeds' networks, by kind of time."""
    measured = results["timing"][what]
    return {kind: statistics.median(one[kind] for one in measured) for kind in measured[0]}


def _percent(over_seeds: Mapping[str, Any]) -> str:
    return f"{100 * over_seeds['mean']:.1f} ± {100 * over_seeds['std']:.1f}"
