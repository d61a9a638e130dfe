"""The recipes of CONTRIBUTING.md work as they stand: their blocks of code are put into a copy of the package, and the result is tried."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```python\n# ((?:src|tests)/[\w/.]+), (new|at the end)\n(.*?)```", re.DOTALL)


class Copy:
    """A copy of the package and of the tests' helpers, outside the repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ignore = shutil.ignore_patterns("__pycache__", "test_*.py")
        shutil.copytree(ROOT / "src" / "normwise", folder / "src" / "normwise", ignore=ignore)
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__", "test_*.py", "data", "census"))
        shutil.copy(ROOT / "pyproject.toml", folder)

    def follow(self, heading: str) -> list[Path]:
        """Does what the recipe says, and gives the files that it touches."""
        recipe = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        blocks = BLOCK.findall(recipe)
        assert blocks and len(blocks) == recipe.count("```python"), f"a block of {heading!r} does not say where it goes"
        for name, where, code in blocks:
            path = self.folder / name
            assert path.exists() == (where == "at the end"), f"{name} is {'' if path.exists() else 'not '}there"
            with path.open("a", encoding="utf-8") as file:
                file.write(f"\n\n{code}" if where == "at the end" else code)
        return [Path(name) for name, _, _ in blocks]

    def use(self, code: str) -> None:
        """Runs ``code`` on the copy, and makes sure that it is the copy, not the package that is tested here."""
        self.python("-c", f"import normwise; assert normwise.__file__.startswith({str(self.folder)!r})\n{code}")

    def python(self, *arguments: str) -> str:
        """Runs Python on the copy; what it prints."""
        environment = os.environ | {"PYTHONPATH": f"{self.folder / 'src'}{os.pathsep}{self.folder / 'tests'}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """One for all recipes, which touch different files: to start a process on each would take seconds more."""
    return Copy(tmp_path_factory.mktemp("copy"))


def test_the_recipe_for_a_norm(copy: Copy) -> None:
    """One file and its test; every law holds; a rule with it trains, holds and goes through YAML."""
    source, test = copy.follow("A norm")
    assert source.parts[:3] == ("src", "normwise", "norms") and test.parts[0] == "tests"
    shutil.copy(ROOT / "tests" / "test_norm_laws.py", copy.folder / "tests")
    (copy.folder / "tests" / "test_use.py").write_text("def test_use():\n" + indent(USE_OF_A_NORM, "    "), encoding="utf-8")
    files = ("tests/test_norm_laws.py", "tests/test_use.py")
    printed = copy.python("-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *files, "-k", f"{LAWS} or test_use")
    passed = re.search(r"(\d+) passed", printed)
    assert passed and int(passed[1]) > 30, printed


LAWS = "_of_fours and float64"    # the exact numbers, and the dtype that rounds most: the laws take a second each
USE_OF_A_NORM = """
import torch, normwise as nw
torch.manual_seed(0)
rule = nw.Rule(action="project", norm="sum_of_fours", per="unit", radius=0.5)
policy = nw.Policy([rule])
assert nw.Policy.from_yaml(policy.to_yaml()) == policy
model = torch.nn.Linear(8, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
control = nw.attach(model, optimizer, policy)
for _ in range(3):
    model(torch.randn(16, 8)).square().mean().backward()
    optimizer.step()
assert control.verify(), control.verify()
assert 0 < len(control.verify().rules)
"""


USE_OF_A_TASK = """
import torch
from normwise.experiments.tasks.load import TASKS, load_task
assert "mlp" in TASKS
task = load_task("mlp", size="tiny")
torch.manual_seed(0)
model = task.build()
optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
before = task.evaluate(model, "validation")
for batch, again, _ in zip(task.batches(64, seed=1), task.batches(64, seed=1), range(80)):
    assert all(map(torch.equal, batch, again))
    optimizer.zero_grad()
    task.loss(model, batch).backward()
    optimizer.step()
after = task.evaluate(model, "validation")
assert after.loss < before.loss / 2 and after.accuracy > 0.8, (before, after)
"""


USE_OF_AN_ACTION = """
import torch, normwise as nw
policy = nw.Policy([nw.Rule(action="soft_clip", per="unit", radius=0.5)])
assert policy[0].label() == "soft_clip l2/unit <= 0.5"
assert nw.Policy.from_yaml(policy.to_yaml()) == policy
try:
    nw.Rule(action="soft_clip", radius=0.5, rounding="stochastic")
except nw.PolicyError as error:
    assert "soft_clip" in str(error)
else:
    raise AssertionError("a field that the action does not read was taken")
torch.manual_seed(0)
model = torch.nn.Linear(8, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
control = nw.attach(model, optimizer, policy)
model(torch.randn(16, 8)).square().mean().backward()
free = model.weight.detach().double() - 0.1 * model.weight.grad.double()
optimizer.step()
lengths = free.norm(dim=1, keepdim=True)
wanted = free / lengths * 0.5 * torch.tanh(lengths / 0.5)
assert torch.allclose(model.weight.detach().double(), wanted, rtol=1e-5, atol=1e-7)
assert list(control.violations().values()) == [4], control.violations()
assert not control.verify().breaches
control.load_state_dict(control.state_dict())
"""


USE_OF_A_PRESET = """
import copy, torch
from normwise.optim.presets import PRESETS, UnitAdam
assert PRESETS["UnitAdam"] is UnitAdam and "policy: rules that run inside the step" in UnitAdam.__doc__
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))
optimizer = UnitAdam(model, lr=0.03)
assert optimizer.routing.of["0.weight"] == "unit_adam" and optimizer.routing.of["0.bias"] == "adamw_undecayed", optimizer.routing
x, before = torch.randn(16, 8), model[0].weight.detach().double().clone()

def step(m, o):
    o.zero_grad()
    m(x).square().mean().backward()
    o.step()

step(model, optimizer)
g = model[0].weight.grad.double()
u = g / (g.abs() + 1e-8)    # Adam's first step
wanted = before - 0.03 * before.norm(dim=1, keepdim=True) / u.norm(dim=1, keepdim=True) * u
assert torch.allclose(model[0].weight.detach().double(), wanted, rtol=1e-4, atol=1e-6)
other = copy.deepcopy(model)
resumed = UnitAdam(other, lr=0.03)
resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
for m, o in ((model, optimizer), (other, resumed)):
    step(m, o), step(m, o)
assert all(map(torch.equal, model.parameters(), other.parameters()))
"""


def test_the_recipes_for_a_task_an_action_and_a_preset(copy: Copy) -> None:
    """One file each, used in one process.

    The task is known by its name, its batches are decided by the seed, and a tiny model learns in a few dozen steps. The action's rule goes
    through YAML, acts as its formula says, is counted, and is saved and loaded. The preset's step is the formula, biases take AdamW, the
    arguments are documented, and a run resumes bit for bit.
    """
    for heading, folder in (("A task", "experiments/tasks"), ("An action", "engine/rules"), ("A preset", "optim")):
        (source,) = copy.follow(heading)
        assert source.is_relative_to(f"src/normwise/{folder}")
    copy.use(USE_OF_A_TASK + USE_OF_AN_ACTION + USE_OF_A_PRESET)
