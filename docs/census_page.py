"""Writes docs/census.md: what normwise makes of published architectures. ``python docs/census_page.py``; ``--check`` only compares.

Every model is built small and with random weights; nothing is downloaded. It needs the ``test`` extra, and takes about a minute.
"""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from torch import nn  # noqa: E402

from census.all import FAMILIES, architectures, timm_is_missing  # noqa: E402
from census.compare import faults  # noqa: E402
from census.family import Family, Unavailable  # noqa: E402
from census.seen import Seen, look  # noqa: E402

PAGE = ROOT / "docs" / "census.md"
ROLES = ("hidden", "conv", "recurrent", "embedding", "head", "other")
COLUMNS = ("model", "parameters", *ROLES, "vectors", "head", "q, k, v", "experts", "neither", "Muon", "auto", "as expected", "notes")
HEADER = f"| {' | '.join(COLUMNS)} |"
INTRO = """# Census: what normwise makes of published architectures

Roles and axes decide which rule acts on which tensor. A wrong one is a silent fault: a matrix method leaves out a matrix, or takes in a
head, or a bound acts on columns where you meant rows. So {models} models of {families} architectures are built here, small, offline and
with random weights, by transformers {version}, and compared with expectations written by hand from their code (`tests/census`). The
forward pass checks these expectations: which outputs of a fused projection are queries, keys and values, which axis of an expert's
tensor is its input, and which layer gives the output.

`python docs/census_page.py` writes this page again; `pytest tests/test_census.py -m "long or not long"` compares every model.

How to read it:

- **parameters** counts those of the small model. The next columns are shares of it by role; **vectors** are biases and gains.
- **head** names the layers that give the output; *tied* means a head that shares the embedding's table and is treated as the embedding.
- **q, k, v**: *apart* means one matrix each. *fused* means one tensor that is stepped as several matrices, with their number in
  brackets (more than three where there are more queries than keys: they are stepped in pieces of the keys' size). *none* means no
  queries, keys and values.
- **experts** counts the tensors that hold stacked experts, with their axes: `e` expert, `s` gate and up, `o` outputs, `i` inputs.
- **neither** lists tensors of two or more dimensions that are not matrices, such as tokens and tables of positions, or whose axes
  nobody states. They take AdamW, and a warning names those that may be matrices after all.
- **Muon** and **auto** are the shares of the weights of two or more dimensions that `nw.optim.Muon` and `nw.optim.auto` step as
  matrices; the others take AdamW.
- **as expected** counts the parameters that differ from the expectation.
"""


def row(family: Family, model: nn.Module | None = None, seen: Seen | None = None) -> str:
    """The model's line of the table; ``model`` and ``seen`` where they are there already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = family.build() if model is None else model
        except Unavailable as why:
            return f"| {family.name} | not built: {why} |" + " |" * (len(COLUMNS) - 2)
        seen = look(model) if seen is None else seen
        wrong = faults(family, model, seen)
    total = sum(seen.roles.values())
    shares = [_percent(seen.roles.get(role, 0) / total) for role in ROLES]
    vectors = _percent(sum(seen.roles.get(role, 0) for role in ("bias", "gain")) / total)
    matrix = [f"{100 * seen.matrix_share(preset):.0f}%" for preset in ("muon", "auto")]
    verdict = "yes" if not wrong else f"{len(wrong)} differ"
    cells = [
        family.name,
        f"{total:,}",
        *shares,
        vectors,
        _heads(family, seen),
        _attention(seen),
        _experts(seen),
        _neither(seen),
        *matrix,
        verdict,
        family.note,
    ]
    return "| " + " | ".join(cells) + " |"


def _percent(share: float) -> str:
    return "" if share == 0 else f"{100 * share:.0f}%" if share >= 0.005 else "<1%"


def _heads(family: Family, seen: Seen) -> str:
    found = [f"`{name.removesuffix('.weight')}`" for name, entry in seen.entries.items() if entry.role == "head" and entry.param.ndim >= 2]
    return ", ".join([*found, *(["tied"] if family.tied else [])]) or "none"


def _attention(seen: Seen) -> str:
    fused = [e for e in seen.entries.values() if e.attention == "qkv"]
    pieces = sorted({e.layout.size("s") for e in fused})
    apart = any(e.attention == "q" for e in seen.entries.values())
    return ", ".join([*(["apart"] if apart else []), *(f"fused ({n})" for n in pieces)]) or "none"


def _experts(seen: Seen) -> str:
    found: dict[str, int] = {}
    for entry in seen.entries.values():
        if "e" in entry.layout.axes and entry.role == "hidden":
            found[entry.layout.axes] = found.get(entry.layout.axes, 0) + 1
    return ", ".join(f"{count} `{axes}`" for axes, count in found.items())


def _neither(seen: Seen) -> str:
    """Tensors of two or more dimensions that are no matrix, or whose axes nobody states, by their last name."""
    left = [e for e in seen.entries.values() if e.param.ndim >= 2 and (e.role == "other" or not e.layout.certain)]
    names = dict.fromkeys(f"`{e.local_name}`" for e in left)
    told = any(e.name in seen.told for e in left)
    return ", ".join(names) + (" (a warning says so)" if told else "")


def text() -> str:
    """The whole page."""
    rows: dict[str, list[str]] = {}
    for family in FAMILIES:
        rows.setdefault(family.group, []).append(row(family))
    built = [line for lines in rows.values() for line in lines if "| not built: " not in line]
    published = architectures(f for f in FAMILIES if f.group not in ("torch.nn", "plain torch"))
    parts = [INTRO.format(models=len(built), families=len(published), version=version("transformers"))]
    for group, lines in rows.items():
        parts.append(f"## {group[0].upper()}{group[1:]}\n\n{HEADER}\n{'|---' * (HEADER.count('|') - 1)}|\n" + "\n".join(lines) + "\n")
    if why := timm_is_missing():
        parts.append(f"## timm\n\nNot built here: {why}.\n")
    return "\n".join(parts)


def write(page: Path, now: str) -> int:
    """Writes a page; with ``--check`` it only compares. The exit status: 1 where the page is another."""
    if "--check" not in sys.argv:
        page.write_text(now)
        return 0
    stale = not page.exists() or page.read_text() != now
    print(f"docs/{page.name} is not what docs/{Path(sys.argv[0]).name} writes" if stale else f"docs/{page.name} is up to date")
    return int(stale)


if __name__ == "__main__":
    sys.exit(write(PAGE, text()))
