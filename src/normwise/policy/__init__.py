"""Rules as data: what to do, to which parameters, under which norm; policies of them, and their YAML form."""

from __future__ import annotations

from normwise.policy import published as _published  # noqa: F401 - its methods list themselves in NAMED
from normwise.policy.named import NAMED
from normwise.policy.policy import Policy
from normwise.policy.rule import Rule

__all__ = ["NAMED", "Policy", "Rule"]
