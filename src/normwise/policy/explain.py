"""What a policy does to a model, as a table: every parameter with its role, its axes, its blocks and its rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from normwise.parameters.inventory import Entry, Inventory
from normwise.policy.rule import Rule
from normwise.reports import Loggable, table, unique

if TYPE_CHECKING:
    from normwise.policy.policy import Policy

HEADER = ("parameter", "shape", "role", "axes", "rule: blocks")


@dataclass(frozen=True)
class Row:
    """One parameter, or one weight that is computed from several. ``blocks`` has, for each rule that touches it (counted from 1), how many
    blocks of which shape it sees; ``how`` what computes the weight, and ``part_of``, of a raw tensor, the weights that are computed from
    it; of LoRA's product, which is listed below its factors, their names."""

    name: str
    shape: tuple[int, ...]
    role: str
    axes: str
    blocks: dict[int, str]
    tied: tuple[str, ...] = ()
    how: str = ""
    part_of: tuple[str, ...] = ()
    frozen: bool = False
    """Whether nothing trains it, so that no rule acts on it until it is unfrozen."""

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of ``HEADER``."""
        name = f"{self.name} (= {', '.join(self.tied)})" if self.tied else self.name
        name = f"{name} (by {self.how})" if self.how else name
        name = f"  {name}" if self.part_of else name
        name = f"{name} (frozen)" if self.frozen else name
        shape = "x".join(map(str, self.shape)) or "scalar"
        touched = ", ".join(f"{rule}: {blocks}" for rule, blocks in self.blocks.items())
        return name, shape, self.role, self.axes, touched or "-"


@dataclass(frozen=True)
class Explanation(Loggable):
    """The table; ``print`` it, or read ``rows``, ``rules`` (their labels) and ``untouched`` (names)."""

    prefix: ClassVar[str] = "policy/"
    rules: tuple[str, ...]
    rows: tuple[Row, ...]

    def numbers(self) -> dict[str, float]:
        """How many parameters there are, how many no rule touches, how many are frozen, and how many each rule touches."""
        whole = [row for row in self.rows if not row.part_of]
        counts = {"parameters": len(whole), "untouched": len(self.untouched), "frozen": sum(row.frozen for row in whole)}
        touched = {label: sum(number in row.blocks for row in self.rows) for number, label in enumerate(unique(self.rules), 1)}
        return {**counts, **{f"touched/{label}": n for label, n in touched.items()}}

    @property
    def untouched(self) -> tuple[str, ...]:
        """The parameters that no rule touches, neither themselves nor as raw tensors of a weight."""
        touched = {name for row in self.rows if row.blocks for name in (row.name, *row.part_of)}
        return tuple(row.name for row in self.rows if row.name not in touched and not row.part_of)

    def __str__(self) -> str:
        rules = [f"rule {number}: {label}" for number, label in enumerate(self.rules, 1)]
        left, count = self.untouched, sum(not row.part_of for row in self.rows)
        summary = f"Every one of the {count} parameters is touched by a rule."
        if left:
            summary = f"{len(left)} {'parameter is' if len(left) == 1 else 'parameters are'} touched by no rule: {', '.join(left)}."
        return "\n".join([*rules, table(HEADER, [row.cells() for row in self.rows]), summary])


def explain(policy: Policy, model: nn.Module) -> Explanation:
    """See :meth:`Policy.explain`."""
    inventory = Inventory(model, policy.roles, policy.layouts)
    touched = [{id(e) for e in rule.targets(inventory.entries if rule.phase == "gradient" else inventory.weights)} for rule in policy]
    listed: dict[int, Entry] = {}
    for entry in inventory.weights:    # below a computed weight its raw tensors, which have the gradients
        raw = [e for e in inventory.entries if {e.name, *e.tied} & set(entry.aliases)] if entry.computed else []
        listed |= {id(e): e for e in (entry, *raw)}
    rows = []
    for entry in listed.values():
        numbered = enumerate(zip(policy, touched, strict=True), 1)
        blocks = {number: _blocks_of(rule, entry) for number, (rule, ids) in numbered if id(entry) in ids}
        how = entry.computed.way.how if entry.computed else ""
        factors = {id(p) for p in entry.factors}
        part_of = tuple(e.name for e in inventory.entries if id(e.param) in factors) if entry.computed else entry.aliases
        axes = f"{entry.layout}{'' if entry.layout.certain else ' ?'}"
        rows.append(Row(entry.name, tuple(entry.shape), entry.role, axes, blocks, tuple(entry.tied), how, part_of, not entry.trained))
    labels = tuple(f"{rule.name}: {rule.summary()}" if rule.name else rule.label() for rule in policy)
    return Explanation(labels, tuple(rows))


def _blocks_of(rule: Rule, entry: Entry) -> str:
    """``10 of 84``, ``1 of 10x84``: how many blocks of which shape; a part of a global block has no number of its own."""
    if entry.computed is not None and entry.computed.refused(rule.phase):
        return f"refused ({entry.computed.way.how})"
    if rule.action == "weight_decay":
        return "all"
    view = rule.view(entry)
    return "global" if rule.per == "global" else f"{view.count} of {'x'.join(map(str, view.block_shape))}"
