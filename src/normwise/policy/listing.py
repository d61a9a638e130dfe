"""What ``normwise policies`` prints: the named rules, or a policy's rules one by one."""

from __future__ import annotations

import inspect
from pathlib import Path


def named_rules() -> str:
    """One line for each named rule: its name, its arguments and the first sentence about it."""
    from normwise.policy.named import NAMED

    heads = {name: f"{name}({', '.join(_arguments(name))})" for name in sorted(NAMED)}
    width = max(map(len, heads.values()))
    return "\n".join(f"{head:<{width}}  {_first_sentence(NAMED[name].__doc__)}" for name, head in heads.items())


def explain_file(path: Path) -> str:
    """The policy of a YAML file, one rule a line. Raises PolicyError for a file that cannot be
    read and, with the line, for one that is no policy."""
    from normwise.policy import Policy

    policy = Policy.load(path)
    lines = [f"{place}. {rule}" for place, rule in enumerate(policy.rules, start=1)]
    return "\n".join([f"{path} is a valid policy of {len(lines)} rule{'s' * (len(lines) != 1)}:", *lines])


def _arguments(name: str) -> list[str]:
    from normwise.policy.named import NAMED

    parameters = inspect.signature(NAMED[name]).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "params"]


def _first_sentence(text: str | None) -> str:
    return (text or "").strip().splitlines()[0]
