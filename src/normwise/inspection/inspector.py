"""``normwise.inspect``: which norms a checkpoint has, how far it is from another one, and whether it keeps to a policy."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import nn

from normwise.engine.verify import Verification
from normwise.errors import DataError, a_kind_of, printable
from normwise.inspection import tables
from normwise.inspection.adapters import Product, products
from normwise.inspection.checkpoint import Checkpoint, opened
from normwise.inspection.gate import Gate
from normwise.inspection.measure import Record, change_of, is_matrix, norms_of, product_record, spectrum_of
from normwise.inspection.places import BUFFER, Places, counterpart, fitting_prefix, guessed, of_model, unplaced
from normwise.inspection.spectra import Spectra, rounding
from normwise.inspection.stored import Stored
from normwise.inspection.threads import alone
from normwise.parameters.inventory import Entry
from normwise.policy import Policy
from normwise.policy.policy import PolicyLike
from normwise.reports import Loggable

Job = tuple[str, int, Callable[[], Record]]
"""A tensor's name, its bytes, and what measures it."""
KEPT_EVERY = 2.0
"""Seconds of work that an interruption may cost: as often finished tensors go to the disk."""
FORM = 2
"""Of the records: those of another form, or that were measured otherwise, are measured again."""


class Kept(Protocol):
    """Where finished tensors are kept, see ``experiments.framework.store``."""

    entries: list[dict[str, Any]]

    def add(self, settings: Mapping[str, Any], result: dict[str, Any], /) -> None: ...


@dataclass
class Inspection(Loggable):
    """What :func:`inspect` found. ``print`` shows it in tables, ``results`` is all of it as plain data, ``flat()`` its totals.

    True in a condition unless a policy was given and a bound of it is broken, or none could be measured.
    """

    prefix: ClassVar[str] = "inspect/"
    results: dict[str, Any] = field(default_factory=dict)
    verification: Verification | None = None

    @property
    def tensors(self) -> list[Record]:
        """One record for each tensor, in the order of the files."""
        found: list[Record] = self.results["tensors"]
        return found

    def __bool__(self) -> bool:
        return self.verification is None or self.verification.ok

    def numbers(self) -> dict[str, float]:
        """The totals, and those of each role."""
        parts = {"total": self.results["total"], **self.results["roles"]}
        return {f"{part}/{k}": v for part, found in parts.items() for k, v in found.items() if isinstance(v, int | float)}

    def __str__(self) -> str:
        return tables.text(self.results)


def inspect(
    checkpoint: str | Path, against: str | Path | None = None, policy: PolicyLike | str | Path | None = None, *,
    model: nn.Module | None = None, spectra: bool = True, kept: Kept | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Inspection:  # fmt: skip
    """Measures the tensors of a checkpoint, one after the other, without loading it.

    Memory holds two blocks of 4 MB for norms, and for spectra one tensor at most with its Gram matrix. Norms are those of the finite
    entries, computed in fp32 (float64 where the tensor is) with sums in float64.

    Args:
        checkpoint: a file, an index of shards, or a folder, see docs/inspect.md.
        against: another checkpoint with the same names, such as the model before fine-tuning; for an adapter its base.
        policy: rules whose bounds on weights are measured, or the path of a policy's YAML file.
        model: the module that was saved, on the meta device if you like: it tells roles and layouts. Without it they are guesses.
        spectra: False leaves out singular values, which take nearly all of the time.
        kept: where finished tensors are kept and found again.
        progress: called for each tensor with its name, its bytes and all bytes.

    Raises:
        DataError: for what is no checkpoint, is damaged, lacks a part, or would run code (nothing is run), and for checkpoints that do not
            fit each other or the model.
        PolicyError: for a rule that matches nothing, or a file that holds no policy.
    """
    return prepared(checkpoint, against, policy, model, spectra).inspection(kept, progress)


def prepared(
    checkpoint: str | Path, against: str | Path | None, policy: PolicyLike | str | Path | None, model: nn.Module | None, spectra: bool
) -> Work:
    """What :func:`inspect` finds out before it measures anything, and so everything that it refuses for what was given."""
    if model is not None and not isinstance(model, nn.Module):
        raise DataError(f"model is {a_kind_of(model)}, but must be a torch.nn.Module, the one whose weights were saved, or None.")
    now = opened(checkpoint)
    before = opened(against) if against is not None else None
    pairs = products(now) if now.adapter is not None else []
    places = of_model(now, model) if model is not None else guessed(now)
    return Work(now, before, places, pairs, _rules(policy), spectra)


def _rules(policy: PolicyLike | str | Path | None) -> Policy | None:
    if policy is None:
        return None
    return Policy.load(policy) if isinstance(policy, str | Path) else Policy(policy)


class Work:
    """One inspection under way: what is to be measured, and what is."""

    def __init__(
        self, now: Checkpoint, before: Checkpoint | None, places: Places, pairs: list[Product], policy: Policy | None, spectra: bool
    ) -> None:
        self.now, self.before, self.places, self.pairs = now, before, places, pairs
        self.spectra = Spectra() if spectra else None
        self.bases = _counterparts(now, before, pairs) if before is not None else {}
        self.factors = _factor_entries(pairs) if policy is not None else {}
        entries = [*places.entries.values(), *self.factors.values()]
        strange = {**places.strange, **unplaced(now)}
        self.gate = None if policy is None else Gate(policy, entries, strange, places.guessed, before is not None)
        self.records: dict[str, Record] = {}
        self.kept: Kept | None = None
        self.settings: dict[str, Any] = {
            "kind": "inspect", "form": FORM, "files": now.identity(), "against": before.identity() if before is not None else None,
            "policy": repr(policy), "spectra": spectra, "guessed": places.guessed,
            "roles": {name: [e.role, str(e.layout)] for name, e in places.entries.items()} if not places.guessed else None,
        }  # fmt: skip

    def inspection(self, kept: Kept | None = None, progress: Callable[[str, int, int], None] | None = None) -> Inspection:
        """Measures what ``kept`` does not have; see :func:`inspect`."""
        self.resume(kept)
        tell = progress or (lambda *what: None)
        with alone():
            for told in self.run():
                tell(*told)
        self._check_unchanged()
        return self.result()

    @property
    def read(self) -> list[Path]:
        """The files and folders that are read."""
        return [path for one in (self.now, self.before) if one is not None for path in (one.place, *one.paths)]

    def _check_unchanged(self) -> None:
        """Figures of two contents together would be those of none."""
        for key, one in (("files", self.now), ("against", self.before)):
            # All but the last figure, the time of a change to the name or the mode, which is none to the content.
            if one is not None and [file[:-1] for file in one.identity()] != [file[:-1] for file in self.settings[key]]:
                raise DataError(f"{one.place}: this checkpoint was changed while it was measured; start again when it is written.")

    # ------------------------------------------------------------------------------------------------ finished tensors

    def resume(self, kept: Kept | None) -> None:
        """Takes what was measured of the same files under the same options."""
        self.kept = kept
        for one in kept.entries if kept is not None else ():
            if {key: value for key, value in one["settings"].items() if key != "first"} == self.settings:
                self.records |= _back(one["result"].get("records", {}))

    def _keep(self, fresh: dict[str, Record]) -> None:
        if self.kept is not None and fresh:
            self.kept.add({**self.settings, "first": next(iter(fresh))}, {"records": _plain(fresh)})
        self.records |= fresh

    # ------------------------------------------------------------------------------------------------ measuring

    def run(self) -> Iterator[tuple[str, int, int]]:
        """Measures what is left; yields each tensor's name, its bytes and the bytes of all."""
        jobs = self._jobs()
        total = sum(size for _, size, _ in jobs)
        fresh: dict[str, Record] = {}
        last = time.monotonic()
        for (name, size, measure), following in zip_longest(jobs, jobs[1:]):
            if name not in self.records:
                self._ahead(following)
                fresh[name] = measure()
            if time.monotonic() - last > KEPT_EVERY:
                self._finish(fresh)
                fresh, last = {}, time.monotonic()
            yield name, size, total
        self._finish(fresh)

    def _ahead(self, following: Job | None) -> None:
        """The disk may read the next tensor while this one is measured."""
        one = None if following is None else self.now.tensors.get(following[0])
        if one is not None:
            one.ahead()

    def _finish(self, fresh: dict[str, Record]) -> None:
        """A record is whole when its spectra have been decomposed."""
        if self.spectra is not None:
            self.spectra.flush()
        self._keep(fresh)

    def _jobs(self) -> list[Job]:
        plain = [(name, one.size, partial(self._tensor, one)) for name, one in self.now.tensors.items()]
        return [*((p.name, p.a.size + p.b.size, partial(self._product, p)) for p in self.pairs), *plain]

    def _tensor(self, one: Stored) -> Record:
        entry, base = self.places.entries.get(one.name), self.bases.get(one.name)
        layout = entry.layout if entry is not None else None
        record = _about(one.name, one.shape, str(one.dtype), self.places.role(one.name), one.count)
        found, _ = norms_of(one, layout, one.whole)
        record |= found
        if self.spectra is not None and layout is not None and is_matrix(layout) and not record["nonfinite"]:
            spectrum_of(one, layout, one.whole, rounding(record["l2"], one.dtype), self.spectra, record)
        if base is not None:
            change_of(one, base, entry, self.spectra, record)
        if self.gate is not None and entry is not None and self.gate.concerns(one.name):
            record["policy"] = self.gate.look_at(entry, one.whole(), base.whole if base is not None else None)
        return record

    def _product(self, product: Product) -> Record:
        m, n = product.shape
        role = "embedding" if product.embedding else "hidden"
        record = _about(product.name, (m, n), str(product.b.dtype), role, m * n) | product_record(product, self.bases.get(product.name))
        if self.gate is not None:
            factors = [one for one in (product.a, product.b) if self.gate.concerns(one.name)]
            record["policy"] = [told for one in factors for told in self.gate.look_at(self.factors[one.name], one.whole(), None)]
        return record

    # ------------------------------------------------------------------------------------------------ the whole

    def result(self) -> Inspection:
        names = sorted((name for name, _, _ in self._jobs()), key=_as_read)
        records = [self.records[name] for name in names]
        verification = None
        if self.gate is not None:
            verification = self.gate.verification([record.get("policy", []) for record in records])
        notes = [*self.now.notes, *self.places.notes]
        if self.before is not None:
            absent = [name for name in names if name not in self.bases]
            notes += [f"against: {note}" for note in self.before.notes]
            notes += [f"not compared, since the base has no tensor of this name and shape: {tables.listed(absent)}"] if absent else []
        told = None if verification is None else {
            "ok": verification.ok, "blocks": verification.blocks, "broken": [str(one) for one in verification.breaches],
            "unchecked": verification.unchecked, "says": str(verification),
        }  # fmt: skip
        results = {
            "inspect": _called(self.now.place), "format": self.now.kind, "guessed": self.places.guessed,
            "against": _called(self.before.place) if self.before is not None else None,
            "notes": [printable(note) for note in notes],
            "skipped": [f"{name}: {why}" for name, why in self.now.skipped.items()],
            "spectra": self.spectra is not None, "total": tables.together([r for r in records if r["role"] != BUFFER]),
            "roles": tables.by_role(records), "policy": told,
            "tensors": [{key: value for key, value in record.items() if key != "policy"} for record in records],
        }  # fmt: skip
        return Inspection(results, verification)


_NOT_FINITE = "not finite"


def _plain(value: Any) -> Any:
    """Figures as JSON can keep them, which knows neither NaN nor infinity."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return {_NOT_FINITE: str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _back(value: Any) -> Any:
    """The inverse of :func:`_plain`."""
    if isinstance(value, Mapping):
        return float(value[_NOT_FINITE]) if list(value) == [_NOT_FINITE] else {key: _back(one) for key, one in value.items()}
    return [_back(one) for one in value] if isinstance(value, list) else value


def _as_read(name: str) -> list[tuple[int, int, str]]:
    """The order of a reader, for whom layer 10 comes after layer 9."""
    steps = [(step, step.lstrip("0")) for step in name.split(".")]
    # Digits are compared as words, for a number in a name may be longer than Python makes an int of.
    return [(1, len(number), number) if step.isascii() and step.isdecimal() else (0, 0, step) for step, number in steps]


def _called(place: Path) -> str:
    """With its folder, since most checkpoints are called ``model.safetensors``."""
    whole = place.resolve()
    return printable(f"{whole.parent.name}/{whole.name}".lstrip("/"))


def _about(name: str, shape: tuple[int, ...], dtype: str, role: str, count: int) -> Record:
    depth = re.search(r"(?:^|\.)([0-9]{1,9})\.", name)
    return {
        "name": name, "kind": re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name), "depth": int(depth[1]) if depth else None, "shape": list(shape),
        "dtype": dtype.removeprefix("torch."), "role": role, "entries": count,
    }  # fmt: skip


def _counterparts(now: Checkpoint, before: Checkpoint, pairs: list[Product]) -> dict[str, Stored]:
    """The tensors of the other checkpoint by the names that they have in this one.

    Raises:
        DataError: where none has its name and shape, or an adapter changes what the base does not have.
    """
    there = {**{name: name for name in before.tensors}, **before.aliases}
    names = [*now.tensors, *(pair.name for pair in pairs)]
    lead = fitting_prefix(names, there)
    found = {name: one for name in names if (one := before.get(counterpart(name, lead))) is not None}
    for pair in pairs:
        shape = before.shapes.get(before.aliases.get(at := counterpart(pair.name, lead), at))
        if shape is None or not pair.fits(shape):
            has = "has no such tensor" if shape is None else f"has it with shape {list(shape)}"
            raise DataError(
                f"{before.place}: this base does not fit the adapter {now.place}, which adds {list(pair.shape)} to {pair.name}; it {has}."
            )
        if pair.name not in found:
            now.notes.append(f"{pair.name} is no tensor of floating-point numbers in the base (quantised?), so that it is not compared")
    pairs_by_name = {pair.name for pair in pairs}
    fitting = {name: one for name, one in found.items() if name in pairs_by_name or one.shape == now.tensors[name].shape}
    if not fitting and not pairs:
        raise DataError(
            f"{now.place}: no tensor ({', '.join(names[:3])}, ...) has the name and the shape of one in {before.place} "
            f"({', '.join(list(before.tensors)[:3])}, ...); give two checkpoints of one model."
        )
    return fitting


def _factor_entries(pairs: list[Product]) -> dict[str, Entry]:
    """A and B as parameters of their own, for rules that select them."""
    stored = {one.name: one for pair in pairs for one in (pair.a, pair.b)}
    if not stored:
        return {}
    made = guessed(Checkpoint(Path(), "", stored, shapes={name: one.shape for name, one in stored.items()}))
    return made.entries

