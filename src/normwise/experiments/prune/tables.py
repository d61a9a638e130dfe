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
    ends = " and ".join(f"[{100 * lowest:.1f}, {100 * highest:.1f}]" for lowest, highest in (one, other))
    if not differ(one, other):
        return f"{about}: {NO_DIFFERENCE}, since the intervals {ends} overlap."
    return f"{about}; the intervals {ends} do not overlap."


def trial(line: Mapping[str, Any]) -> dict[str, str]:
    """A strength that was tried, with the tuning seed."""
    row = {"strength": f"{line['strength']:.2g}"}
    if "failed" in line:
        return {**row, "validation, %": "-", "fine-tuned, %": "-", "parameters": "-", "multiplications": "-"}
    scores = {"validation, %": f"{100 * line['trained']:.1f}", "fine-tuned, %": f"{100 * line['fine_tuned']:.1f}"}
    return {**row, **scores, "parameters": f"{line['parameters']:,}", "multiplications": f"{line['multiplications']:,}"}


def networks(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """The full network, the smaller one and the same shape from fresh weights, with what each step of them costs."""
    found, timing = results["summary"], results["timing"]
    heads = {"step, ms": "step_ms", "inference, ms": "inference_ms", "one input, ms": "single_ms"}
    # Of several seeds' networks the median, by kind of time.
    typical = {
        what: {kind: statistics.median(one[kind] for one in timing[what]) for kind in heads.values()} for what in ("smaller", "ratio")
    }

    def row(label: str, name: str, times: Mapping[str, float]) -> dict[str, str]:
        test, tuned = (f"{100 * of['mean']:.1f} ± {100 * of['std']:.1f}" for of in (found[name]["trained"], found[name]["fine_tuned"]))
        return {
            "network": label, "test, %": test, "fine-tuned, %": tuned, "parameters": f"{found[name]['parameters']:,.0f}",
            "multiplications": f"{found[name]['multiplications']:,.0f}",
            **{head: f"{times[kind]:.3g}" if times else "" for head, kind in heads.items()},
        }  # fmt: skip

    full = row("full", "full", timing["full"])
    share = {**dict.fromkeys(full, ""), "network": "smaller / full"}
    share |= {what: f"{found['smaller'][what] / found['full'][what]:.3f}" for what in ("parameters", "multiplications")}
    share |= {head: f"{typical['ratio'][kind]:.2f}" for head, kind in heads.items()}
    smaller = row("smaller: group lasso, shrunk", "smaller", typical["smaller"])
    return [full, smaller, row("its shape from fresh weights", "fresh", {}), share]
