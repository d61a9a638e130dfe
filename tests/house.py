"""How easy the package is to live in, in figures: ``python tests/house.py`` prints them, ``test_house.py`` holds them to their bars.

    python tests/house.py              the table
    python tests/house.py --where      also names what stands behind the figures: the longest functions, the deepest, the traced calls
    python tests/house.py --json       the figures alone, for other programs
"""

from __future__ import annotations

import ast
import io
import json
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

SOURCE = Path(__file__).resolve().parents[1] / "src"
PACKAGE = SOURCE / "normwise"
START_LINES = 26_948
"""Lines of source before the rebuild."""
BARS: dict[str, tuple[str, float]] = {
    "source lines": ("<=", START_LINES - 2000),
    "comments, % of lines": (">", 2.0),
    "function length, p90": ("<=", 25),
    "functions nested three deep or more, %": ("<", 2.0),
    "largest folder, files": ("<=", 15),
    "modules in import cycles": ("<=", 0),
    "attach([max_norm]): files": ("<=", 12),
    "step of [max_norm] on SGD: files": ("<=", 6),
    "step of [max_norm] on SGD: calls": ("<=", 40),
    "step of nw.optim.Muon: files": ("<=", 8),
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def met(name: str, value: float) -> bool:
    sign, bar = BARS[name]
    return {"<=": value <= bar, "<": value < bar, ">": value > bar}[sign]


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------- what is written


def comments(path: Path) -> int:
    """Comments for readers: those that only speak to a type checker, a linter or a formatter do not count."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    marks = ("type:", "noqa", "fmt:", "pragma", "mypy:")
    return sum(t.type == tokenize.COMMENT and not t.string.lstrip("# ").startswith(marks) and bool(t.string.strip("#- ")) for t in tokens)


def functions(path: Path) -> Iterator[Function]:
    """Every function and method, inner ones too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, Function):
            yield node


def length(function: Function) -> int:
    """Lines from ``def`` to the end; the docstring and the decorators left out."""
    first = function.body[0]
    has_docstring = ast.get_docstring(function, clean=False) is not None
    docstring = first.end_lineno - first.lineno + 1 if has_docstring and first.end_lineno else 0
    return (function.end_lineno or function.lineno) - function.lineno + 1 - docstring


def depth(node: ast.AST, is_elif: bool = False) -> int:
    """How deep blocks stand within each other; an ``elif`` stands beside its ``if``, and an inner function is counted by itself."""
    block = isinstance(node, (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match))
    deepest = 0
    for name, value in ast.iter_fields(node):
        children = [child for child in (value if isinstance(value, list) else [value]) if isinstance(child, ast.AST)]
        for child in children:
            if not isinstance(child, (*Function.__args__, ast.ClassDef, ast.Lambda)):
                beside = isinstance(node, ast.If) and name == "orelse" and len(children) == 1 and isinstance(child, ast.If)
                deepest = max(deepest, depth(child, beside))
    return deepest + (block and not is_elif)


def used_once(paths: list[Path]) -> float:
    """The share of functions, in %, that are private and named in exactly one place: each is a jump for the reader. A sign, not a bar."""
    names = Counter(
        node.id if isinstance(node, ast.Name) else node.attr
        for path in paths
        for node in ast.walk(tree(path))
        if isinstance(node, (ast.Name, ast.Attribute))
    )
    every = [f.name for path in paths for f in functions(path)]
    return 100 * sum(name.startswith("_") and not name.startswith("__") and names[name] == 1 for name in every) / len(every)


# ---------------------------------------------------------------------------------------------------------- imports


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, known: set[str]) -> set[str]:
    """The modules that ``path`` imports, within functions too, and not those that only a type checker sees."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(inner & known)
            if not inner <= known:
                found.add(node.module)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree(path))
    return found & known - {module_of(path)}


def cycles(paths: list[Path]) -> list[list[str]]:
    """Modules that reach themselves, in groups of those that reach each other."""
    known = {module_of(path) for path in paths} - {"normwise"}   # the package as a whole: test_layers.py says who may import it
    direct = {module_of(path): imports(path, known) for path in paths}
    reach: dict[str, set[str]] = {}
    for start in known:
        reach[start], queue = set(), list(direct[start])
        while queue:
            if (module := queue.pop()) not in reach[start]:
                reach[start].add(module)
                queue.extend(direct[module])
    groups = {tuple(sorted(other for other in reach[m] if m in reach[other])) for m in known if m in reach[m]}
    return [list(group) for group in sorted(groups)]


# ----------------------------------------------------------------------------------------------------------- traces


@dataclass
class Trace:
    """The Python calls within the package while a piece of code runs, in order."""

    calls: list[tuple[str, str]] = field(default_factory=list)

    def files(self) -> int:
        return len({file for file, _ in self.calls})

    def functions(self) -> int:
        return len(set(self.calls))

    def changes(self) -> int:
        """How often the next call is in another file."""
        return sum(a[0] != b[0] for a, b in zip(self.calls, self.calls[1:], strict=False))


def trace(run: Callable[[], Any]) -> Trace:
    found = Trace()
    prefix = str(PACKAGE)

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(prefix):
            found.calls.append((str(Path(code.co_filename).relative_to(PACKAGE)), code.co_qualname))

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def traces() -> dict[str, Trace]:
    """On a network of two layers, after everything has run twice, so that imports and what is built once are out of the way."""
    import torch
    from torch import nn

    import normwise as nw

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def backward(model: nn.Module) -> None:
        model.zero_grad()
        model(torch.randn(32, 8)).square().mean().backward()

    def attached() -> tuple[nn.Module, torch.optim.Optimizer, Trace, nw.Control]:
        model = network()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        controls: list[nw.Control] = []
        return model, sgd, trace(lambda: controls.append(nw.attach(model, sgd, [nw.max_norm(1.0)]))), controls[0]

    attached()
    model, sgd, attach, control = attached()
    other = network()
    muon = nw.optim.Muon(other)
    for _ in range(2):
        for trained, optimizer in ((model, sgd), (other, muon)):
            backward(trained)
            optimizer.step()
        control.verify()
    backward(model)
    backward(other)
    return {
        "attach([max_norm])": attach,
        "step of [max_norm] on SGD": trace(sgd.step),
        "verify()": trace(control.verify),
        "step of nw.optim.Muon": trace(muon.step),
    }


# ------------------------------------------------------------------------------------------------------------- all


def figures() -> dict[str, float]:
    paths = sources()
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in paths}
    every = [f for path in paths for f in functions(path)]
    lengths = sorted(map(length, every))
    deep = sum(depth(f) >= 3 for f in every)
    folders = Counter(path.parent for path in paths)
    found: dict[str, float] = {
        "files": len(paths),
        "source lines": sum(lines.values()),
        "comments, % of lines": round(100 * sum(map(comments, paths)) / sum(lines.values()), 2),
        "functions": len(every),
        "function length, median": lengths[len(lengths) // 2],
        "function length, p90": lengths[int(0.9 * len(lengths))],
        "functions nested three deep or more, %": round(100 * deep / len(every), 2),
        "private functions used once, %": round(used_once(paths), 1),
        "largest folder, files": max(folders.values()),
        "modules in import cycles": sum(map(len, cycles(paths))),
    }
    for name, found_calls in traces().items():
        found[f"{name}: files"] = found_calls.files()
        found[f"{name}: functions"] = found_calls.functions()
        found[f"{name}: calls"] = len(found_calls.calls)
        found[f"{name}: changes of file"] = found_calls.changes()
    return found


def where() -> Iterator[str]:
    """What stands behind the figures."""
    every = [(path.relative_to(PACKAGE), f) for path in sources() for f in functions(path)]
    yield "\nlongest functions"
    for path, f in sorted(every, key=lambda pair: -length(pair[1]))[:15]:
        yield f"  {length(f):4}  {path}:{f.lineno}  {f.name}"
    yield "\nnested three deep or more"
    for path, f in every:
        if depth(f) >= 3:
            yield f"  {depth(f):4}  {path}:{f.lineno}  {f.name}"
    yield "\nlargest folders"
    for folder, count in Counter(path.parent.relative_to(SOURCE) for path in sources()).most_common(5):
        yield f"  {count:4}  {folder}"
    yield "\nimport cycles"
    for group in cycles(sources()):
        yield f"        {' <-> '.join(group)}"
    for name, found in traces().items():
        yield f"\n{name}"
        by_file: dict[str, Counter[str]] = defaultdict(Counter)
        for file, function in found.calls:
            by_file[file][function] += 1
        for file, counts in by_file.items():
            yield f"  {counts.total():4}  {file}: " + ", ".join(f"{f} {n}" if n > 1 else f for f, n in counts.items())


def main() -> None:
    found = figures()
    if "--json" in sys.argv:
        print(json.dumps(found))
        return
    for name, value in found.items():
        sign, bar = BARS.get(name, ("", 0))
        verdict = f"{sign:>3} {bar:<8,g} {'met' if met(name, value) else 'missed'}" if sign else ""
        print(f"{name:<44}{value:>10,g}   {verdict}".rstrip())
    if "--where" in sys.argv:
        print(*where(), sep="\n")


if __name__ == "__main__":
    sys.path.insert(0, str(SOURCE))
    main()
