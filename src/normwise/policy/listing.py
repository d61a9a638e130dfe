"""What ``normwise policies`` prints: the named rules, one of them in full, or a policy's rules one by one."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

from normwise.errors import PolicyError, nearest
from normwise.policy.named import NAMED, Common
from normwise.policy.policy import Policy


def named_rules() -> str:
    """One line for each named rule: its name, its arguments and the first sentence about it."""
    heads = {}
    for name in sorted(NAMED):
        parameters = inspect.signature(NAMED[name]).parameters.values()
        shown = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "params"]
        heads[name] = f"{name}({', '.join(shown)})"
    width = max(map(len, heads.values()))
    return "\n".join(f"{head:<{width}}  {inspect.getdoc(NAMED[name]).splitlines()[0]}" for name, head in heads.items())  # type: ignore[union-attr]


def explained(name: str) -> str:
    """A named rule in full: its signature, what it does, an example in Python and in YAML, and the fields that it stands for.

    Raises:
        PolicyError: for an unknown name, with the nearest one.
    """
    if name not in NAMED:
        raise PolicyError(f"unknown named rule {name!r}.{nearest(name, NAMED)}")
    make = NAMED[name]
    signature = inspect.signature(make)
    # Of arguments without a default any number will do that means something: radii are often near 1, strengths far below.
    needed = {p.name: 1.0 if "Radius" in str(p.annotation) or p.annotation == "float" else 0.01
              for p in signature.parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}  # fmt: skip
    written = ", ".join(f"{argument}={value:g}" for argument, value in needed.items())
    short = f"- {name}: {{{written.replace('=', ': ')}}}" if needed else f"- {name}"
    shown = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    common = ", ".join(Common.__annotations__)
    sections = {
        "": f"nw.{name}{signature.replace(parameters=shown, return_annotation=signature.empty)}\nand the keywords of every rule: {common}",
        "What it does": str(inspect.getdoc(make)),
        "Example": f"nw.attach(model, optimizer, nw.{name}({written}))",
        "In YAML": short,
        "The same by its fields": Policy(make(**needed)).to_yaml(),
    }
    return "\n\n".join(f"{head}:\n{textwrap.indent(text.strip(), '    ')}" if head else text for head, text in sections.items())


def explain_file(path: Path) -> str:
    """The policy of a YAML file, one rule a line.

    Raises:
        PolicyError: for a file that cannot be read and, with the line, for one that is no policy.
    """
    policy = Policy.load(path)
    lines = [f"{place}. {rule}" for place, rule in enumerate(policy.rules, start=1)]
    return "\n".join([f"{path} is a valid policy of {len(lines)} rule{'s' * (len(lines) != 1)}:", *lines])
