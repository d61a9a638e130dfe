"""From zero to gone: units whose weights are exactly zero are removed for good, and the smaller network gives the same outputs."""

from normwise.prune.remove_units import cut, shrink, targets
from normwise.prune.report import Report

__all__ = ["Report", "cut", "shrink", "targets"]
