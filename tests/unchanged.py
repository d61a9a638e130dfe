"""What a rebuild of the source tree must not change: records in ``tests/data/unchanged``, made before it and compared after each step.

    python tests/unchanged.py compare [RECORD ...]     # prints what differs, of all records or of those named
    python tests/unchanged.py record [RECORD ...]      # writes them anew: only where a change is meant

``public`` and ``errors`` change with names and words that are changed on purpose; the others stay. The files ``*.safetensors`` are states
that the code of before wrote. They are never written over: ``record`` makes only those that are missing.

On the kind of machine that made a record the comparison is exact. On another one numbers have a tolerance (``TOLERANCES``), since CPUs
round differently; texts, names and shapes are exact everywhere.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib
import inspect
import json
import math
import os
import platform
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import normwise as nw
from normwise import checkpoints

# All that is taken from inside the package. Where a rebuild renames or moves something, follow it here and nowhere else.
from normwise.experiments.catalog.contenders import FIRST
from normwise.experiments.compare.run import CompareRun
from normwise.experiments.compare.run import train as train_compare
from normwise.experiments.gan.run import GanRun, JudgedData
from normwise.experiments.gan.run import train as train_gan
from normwise.experiments.prune.run import PruneRun
from normwise.experiments.prune.run import execute as train_prune
from normwise.experiments.race.run import RaceRun, batch_of
from normwise.experiments.race.run import train as train_race
from normwise.experiments.tasks.data.splits import load as load_images
from normwise.experiments.tasks.fidelity import train_judge
from normwise.experiments.tasks.load import load_task
from normwise.norms import native
from normwise.norms.linalg import paths
from normwise.policy import NAMED
from normwise.policy.radii import Inflection, Init, WarmStart
from normwise.policy.schedules import Cosine, Linear, Warmup

FOLDER = Path(__file__).parent / "data" / "unchanged"
Found = Any
"""Plain data of which JSON is made. Floats come back from JSON as they were, to the last bit; a tensor is told by :func:`told`."""


# ------------------------------------------------------------------------------------------------------- how it is told


def digest(tensors: Iterable[Tensor]) -> str:
    """Of every bit of some tensors."""
    made = hashlib.sha256()
    for t in tensors:
        made.update(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return "sha256:" + made.hexdigest()[:12]


def told(value: Any) -> Found:
    """A state as plain data. A tensor: its dtype and shape, all of its bits, and three sizes that other machines have nearly too."""
    if isinstance(value, Tensor):
        kind = f"{str(value.dtype).removeprefix('torch.')} {'x'.join(map(str, value.shape)) or '()'}"
        return [kind, digest([value]), *(_sizes(value) if value.is_floating_point() else ())]
    if isinstance(value, Mapping):
        return {str(key): told(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [told(inner) for inner in value]
    if isinstance(value, str):
        return _told_text(value)
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def _told_text(text: str) -> Found:
    """A text as it is; but JSON as what it holds, and a tensor in base64 as a tensor, since both may hold numbers of this machine."""
    if text.startswith(("[{", '{"')):
        return told(json.loads(text))
    if folded := re.fullmatch(r"(float\d+|bfloat16):([\dx]*):([A-Za-z0-9+/=]*)", text):
        kind, shape, data = folded.groups()
        sizes = [int(n) for n in shape.split("x") if n]
        empty = torch.zeros(sizes, dtype=getattr(torch, kind))
        return told(torch.frombuffer(bytearray(base64.b64decode(data)), dtype=empty.dtype).view(sizes) if empty.numel() else empty)
    return text


def _sizes(tensor: Tensor) -> list[float]:
    """The norm, that of the positive entries, and the norm where later entries weigh more, which tells entries that changed places."""
    flat = tensor.detach().double().flatten()
    ramp = torch.linspace(1, 2, len(flat), dtype=torch.float64)
    return [float(f"{float(t.norm()):.7g}") for t in (flat, flat.clamp(min=0), flat * ramp)]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights by name, as they are now."""
    with torch.no_grad():
        return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in model.named_parameters()}


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Between two sets of weights, in L2."""
    return math.sqrt(sum(float((one[n].double() - other[n].double()).square().sum()) for n in one))


# ------------------------------------------------------------------------------------------------------------ comparison

RACERS_IN_BF16, STATES_IN_BF16 = ("muon", "muonh", "scion"), ("Muon", "NorMuon", "Scion", "MuonH")
"""What orthogonalises in bf16, where CPUs differ most."""
_RACE, _STATE = "|".join(RACERS_IN_BF16), "|".join(STATES_IN_BF16)
TOLERANCES: tuple[tuple[str, float], ...] = (
    (rf"race_\w+/({_RACE})/first", 3e-3),
    (r"race_\w+/\w+/first", 1e-4),
    (r"race_(cnn|resnet)/\w+/result", 0.5),    # accuracies of networks that have seen 16 batches
    (rf"race_\w+/({_RACE})/(moved|norm)", 1e-1),
    (r"race_", 1e-2),
    (r"prune/\w+/\w+/(validation|test)$", 0.2),
    (r"prune|compare|gan", 5e-2),
    (rf"(states|loaded)/({_STATE})/later|sharded/\w+/NorMuon", 3e-3),
    (r"", 1e-4),
)
"""Of a path's numbers: the first pattern that it begins with decides.

Measured between torch's AVX2 code and its plainest, with MKL and oneDNN held to SSE: after the first step 5e-7, in bf16 4e-4; at the end of
a race 3e-4 of losses, in bf16 2e-2 of the way that the weights went; of states and split models 9e-6. A learning rate of 1.001 instead of
1 changes the first step, and the way after a state, by 1e-3."""
BITS = re.compile(r"(states|loaded)/(compensated|stochastic)/later|prune/smaller/(removed|kept|units|parameters|multiplications)")
"""Paths that are compared bit for bit or not at all: what is rounded to bf16 by chance or by a carry, and units at a threshold."""


def differences(recorded: Found, found: Found, path: str, exact: bool) -> list[str]:
    """What differs, one line each. exact: bit for bit; otherwise numbers have a tolerance by their path, and digests are left out."""
    if not exact and BITS.match(path):
        return []
    if isinstance(recorded, dict) and isinstance(found, dict):
        lines = [f"{path}/{key}: is gone" for key in recorded if key not in found]
        lines += [f"{path}/{key}: is new" for key in found if key not in recorded]
        return lines + [d for key in recorded if key in found for d in differences(recorded[key], found[key], f"{path}/{key}", exact)]
    if isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        return [d for i, pair in enumerate(zip(recorded, found, strict=True)) for d in differences(*pair, f"{path}/{i}", exact)]
    if type(recorded) is type(found) and (repr(recorded) == repr(found) or (not exact and _near(recorded, found, path))):
        return []
    return [f"{path}: {recorded!r} is now {found!r}"]


def _near(recorded: Found, found: Found, path: str) -> bool:
    if isinstance(recorded, float):
        rtol = next(rtol for pattern, rtol in TOLERANCES if re.match(pattern, path))
        return math.isclose(recorded, found, rel_tol=rtol, abs_tol=1e-7)
    return isinstance(recorded, str) and recorded.startswith("sha256:") and found.startswith("sha256:")


@functools.cache
def machine() -> dict[str, str]:
    """What decides how numbers are rounded: torch's version, the CPU and what it can."""
    try:
        lines = dict(re.findall(r"^([^\t:]+)\t*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    except OSError:
        lines = {}
    vectors = sorted(flag for flag in lines.get("flags", "").split() if re.match(r"sse|avx|fma|f16c|amx|bmi|vnni", flag))
    return {
        "torch": torch.__version__, "cpu": lines.get("model name", platform.processor() or platform.machine()),
        "model": f"{lines.get('cpu family', '')}.{lines.get('model', '')}", "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": hashlib.sha256(" ".join(vectors).encode()).hexdigest()[:12],
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- races

TASKS = ("cnn", "resnet", "lstm", "gpt")
RACERS: dict[str, dict[str, Any]] = {
    "adamw": {}, "adamw_max_norm": {"clip": 1.0}, "muon": {"init": "orthogonal"}, "muonh": {"batch": 0.5}, "scion": {"schedule": "hold"},
    "auto": {},
}  # fmt: skip
"""Contenders, with choices of theirs that are not at the centre of the search."""
STEPS, SEED = 16, 3


def race(task: str, planted: float = 1.0, racers: Iterable[str] = RACERS) -> dict[str, Found]:
    """Short runs of one task. planted: a factor on every learning rate."""
    return {name: _race(task, name, planted) for name in racers}


def _race(name: str, contender: str, planted: float) -> Found:
    task = load_task(name, text_file() if name in ("lstm", "gpt") else None, size="tiny")
    numbers = FIRST[contender].numbers((0,) * len(FIRST[contender].axes)) | RACERS[contender]
    numbers |= {key: planted * float(numbers[key]) for key in ("lr", "rest") if key in numbers}
    run = RaceRun(task.key, contender, tuple(numbers.items()), STEPS * batch_of(numbers, task.batch), SEED, True, 1, "")
    seen, models, loss, evaluate = [], [], task.loss, task.evaluate

    def watched(model: nn.Module, batch: Any) -> Tensor:
        seen.append(weights(model))
        return loss(model, batch)

    def evaluated(model: nn.Module, part: Any) -> Any:
        models.append(model)
        return evaluate(model, part)

    task.loss, task.evaluate = watched, evaluated    # type: ignore[method-assign]
    result = train_race(run, task)
    end = weights(models[-1])
    norm = math.sqrt(sum(float(w.double().square().sum()) for w in end.values()))
    return {
        "first": distance(seen[0], seen[1]), "result": result["result"], "loss": result["loss"], "test": result["test"]["loss"],
        "train": result["train"]["loss"], "steps": result["steps"], "breaches": result["breaches"], "moved": distance(seen[0], end),
        "norm": norm, "weights": digest(end.values()),
    }  # fmt: skip


@functools.cache
def text_file() -> Path:
    """A text that is the same on every Python, with words that can be learned."""
    chance = random.Random(0)
    words = ["".join(chance.choice("etaoinshrdlu") for _ in range(chance.randint(2, 7))) for _ in range(40)]
    text = ""
    while len(text) < 11_000:
        text += words[int(chance.random() ** 2 * 40)] + (" " if chance.random() < 0.9 else ".\n")
    folder = Path(tempfile.mkdtemp(prefix="unchanged"))
    (folder / "text.txt").write_text(text)
    return folder / "text.txt"


# ------------------------------------------------------------------------------------------------------ the other studies


def prune(planted: float = 1.0) -> Found:
    """Short runs of ``normwise prune``: without a lasso, with one that only shortens, and with one that takes units away."""
    return {
        "plain": _prune("cnn", "tiny", 30, 0.1 * planted, 0.0), "held": _prune("resnet", "tiny", 30, 0.1 * planted, 0.1, hold=True),
        "smaller": _prune("cnn", "standard", 120, 0.3 * planted, 0.01),
    }  # fmt: skip


def _prune(name: str, size: str, steps: int, lr: float, strength: float, hold: bool = False) -> Found:
    task = load_task(name, size=size)
    result = train_prune(PruneRun(task.key, steps, 3, lr, strength, SEED, True, hold=hold), task)
    for key in ("seconds", "difference"):    # a time, and a number that is rounding errors
        result.pop(key, None)
    return told(result)


def compare(planted: float = 1.0) -> Found:
    """Short runs of ``normwise compare``: rules that are attached to three optimizers. Those before its protocol 4 had other networks."""
    task = load_task("cnn", size="tiny")
    wanted = {"nothing": ("gd", 0.3, {}), "max_norm": ("adam", 0.01, {"radius": 0.06}), "cpr": ("muon", 0.02, {})}
    found = {}
    for name, (optimizer, lr, strengths) in wanted.items():
        run = CompareRun(task.key, name, optimizer, lr * planted, strengths, SEED, 16, 64, 2, True)
        found[name] = told({key: value for key, value in train_compare(run, task).items() if key != "seconds"})
    return found


def gan(planted: float = 1.0) -> Found:
    """Two short runs of ``normwise gan``."""
    data = load_images().thinned(300)
    judged = JudgedData.of(data, train_judge(data, epochs=1))
    found = {}
    for name, strengths in {"nothing": {}, "spectral_cap": {"radius": 0.8}}.items():
        run = GanRun(name, "non_saturating", 2e-3 * planted, strengths, SEED, 4, 16, 8, 2, 60, True, data.key)
        found[name] = told({key: value for key, value in train_gan(run, judged).items() if key != "seconds"})
    return found


# -------------------------------------------------------------------------------------------------------------- policies

Call = tuple[tuple[Any, ...], dict[str, Any]]


def call(*args: Any, **kwargs: Any) -> Call:
    """Arguments of a rule."""
    return args, kwargs


RULES: dict[str, tuple[Call, Call]] = {
    "l1_penalty": (call(0.1), call(1e-5, samples=7)),
    "l2_penalty": (call(0.1), call(Warmup(1e-4, 100), "fc*", center="init")),
    "elastic_net": (call(0.1, 0.2), call(1e-5, 1e-4, exclude=["*.bias", "role:gain"])),
    "l1_prox": (call(0.1), call(1e-20, every=5, start=2, stop=100)),
    "weight_decay": (call(0.1), call(Cosine(0.1, 0.0, 10), "re:^fc[12]")),
    "decay_to_init": (call(0.1), call(0.1, ["class:Linear", "conv*"])),
    "group_lasso": (call(0.1), call(0.0, per="input", optional=True)),
    "nuclear_prox": (call(0.1), call(1 / 3, per="head", layout=nw.Layout("hoi", (2, 4, 16)))),
    "max_norm": (call(3.0), call("1.5*init", per="input", every=2)),
    "unit_norm": (call(), call(Init(0.5), per="tensor")),
    "min_max_norm": (call(0.5, 2.0), call(0, Linear(3, 1, 100), 0.25)),
    "clip_weight_value": (call(0.1), call(-1, 0.1, "role:head")),
    "clip_weight_norm": (call(3.0), call(Linear(3, 1, 1000), norm="l1")),
    "non_negative": (call(), call("fc*", optional=True)),
    "l1_ball": (call(2.0), call(2, per="tensor", start=10)),
    "spectral_cap": (call(1.0), call(Init(Cosine(1, 0.5, 10)), tolerance=0.01)),
    "spectral_normalize": (call(), call(2.0, "role:conv", per="tensor")),
    "clip_grad_norm": (call(1.0), call(Linear(1, 2, 10), per="tensor", norm="linf")),
    "clip_grad_value": (call(1.0), call(1e300, exclude="role:bias")),
    "normalize_grad": (call(), call(0.5, per="global")),
    "agc": (call(), call(Linear(0.1, 0.01, 5), eps=0.5)),
    "hyperball": (call(), call("2*init", "fc*", per="matrix", floor=1e-3)),
    "relative_update": (call(), call(0.1, norm="rms", per="unit", floor=1e-3)),
    "radial_brake": (call(), call(0.0, "role:hidden", per="unit")),
    "cpr": (call(), call(WarmStart(20), mu=0.1, per="tensor")),
    "autoclip": (call(), call(50, "fc*", window=100, per="tensor", on="update")),
    "zclip": (call(), call(3, alpha=0.9, warmup=10, norm="l1")),
    "qk_clip": (call(), call(50, query="*.q.weight", key="*.k.weight", heads=8)),
    "orthogonal": (call(), call(2.0, "fc*", every=10)),
    "orthogonal_penalty": (call(0.1), call(Warmup(0.1, 5), per="tensor")),
}
"""Of every named rule: the fewest arguments, and an example with others."""


def policies() -> Found:
    """Every named rule as YAML, what it reads back to included, and the label of each rule in tables."""
    found: dict[str, Found] = {}
    for name in sorted(NAMED):
        for kind, (args, kwargs) in zip(("plain", "options"), RULES.get(name, ()), strict=False):
            policy = nw.Policy(NAMED[name](*args, **kwargs))
            text = policy.to_yaml()
            assert nw.Policy.from_yaml(text) == policy and nw.Policy.from_yaml(text).to_yaml() == text, name
            found[f"{name} {kind}"] = {"yaml": text, "labels": [rule.label() for rule in policy]}
    everything = [NAMED[name](*args, **kwargs) for name, (_, (args, kwargs)) in RULES.items()]
    both = nw.Policy(everything, roles={"*.decoder": "head"}, layouts={"*.qkv.weight": nw.Layout("soi", (3, 4, 4))})
    assert nw.Policy.from_yaml(both.to_yaml()) == both
    return found | {"all of it": hashlib.sha256(both.to_yaml().encode()).hexdigest()}


# ---------------------------------------------------------------------------------------------------------------- states


class Small(nn.Module):
    """One parameter of each role, so small that states of it are a few kB."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 4)
        self.attn = nn.MultiheadAttention(4, 2, bias=False)
        self.lstm = nn.LSTM(3, 2, bias=False)
        self.conv = nn.Conv2d(2, 3, 2, bias=False)
        self.fc = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6, bias=False)
        self.head = nn.Linear(6, 3, bias=False)


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    """With weights that are the same on every machine and none of them zero."""
    torch.manual_seed(0)
    model = Small()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.rand_like(p).sub_(0.5).mul_(0.2))
    return model.to(dtype)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, control: Any, which: Iterable[int], planted: float = 1.0) -> None:
    """Steps on given gradients, so that no forward pass adds what it rounds. planted: a factor on every learning rate."""
    for group in optimizer.param_groups:
        group["lr"] *= planted
    for step in which:
        made = torch.Generator().manual_seed(step + 1)
        for p in model.parameters():
            gradient = torch.randn(p.shape, generator=made, dtype=torch.float64).to(p.dtype)
            p.grad = distribute_tensor(gradient, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else gradient
        if control is not None and any(rule.action == "qk_clip" for rule in control.policy):
            control.report_max_logits("attn", torch.tensor([50.0 + step, 150.0]))
        optimizer.step()


Made = tuple[nn.Module, torch.optim.Optimizer, Any]
BEFORE, AFTER = range(4), range(4, 7)


def remembering() -> list[Any]:
    """Rules of every kind that remembers something."""
    return [
        nw.zclip(1.0, warmup=2), nw.autoclip(30.0, "fc.*", window=5, per="tensor"), nw.cpr(Inflection(1), "attn.out_proj.weight"),
        nw.cpr(WarmStart(2), "lstm.weight_ih_l0"), nw.cpr("init", "conv.weight", mu=0.1), nw.spectral_cap(0.8, "fc.weight", tolerance=0.05),
        nw.max_norm("0.9*init", "emb.weight", every=2), nw.max_norm(0.2, "head.weight", center="init"),
        nw.hyperball("init", "lstm.weight_hh_l0"), nw.radial_brake(0.5, "conv.weight"), nw.decay_to_init(0.1, "norm.weight"),
        nw.qk_clip(100.0),
    ]  # fmt: skip


def _attached(in_optimizer_state: bool) -> Made:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    return model, optimizer, nw.attach(model, optimizer, remembering(), in_optimizer_state=in_optimizer_state)


def _preset(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Made:
    model = small(dtype)
    return model, getattr(nw.optim, name)(model, **options), None


SAVED: dict[str, Callable[[], Made]] = {
    "control": functools.partial(_attached, False),
    "attached": functools.partial(_attached, True),
    "AdamW_policy": functools.partial(_preset, "AdamW", policy=[nw.max_norm("init", "fc.weight"), nw.zclip(1.0, warmup=2)]),
    "LARS": functools.partial(_preset, "LARS", weight_decay=0.1),
    "Muon": functools.partial(_preset, "Muon", weight_decay=0.1),
    "NorMuon": functools.partial(_preset, "NorMuon"),
    "Scion": functools.partial(_preset, "Scion", constrained=True, radius=2.0, head_radius=5.0),
    "AdamH": functools.partial(_preset, "AdamH"),
    "MuonH": functools.partial(_preset, "MuonH", polar="fast", per="head", override={"fc.weight": 2.0}),
    "auto": functools.partial(_preset, "auto"),
    "compensated": functools.partial(_preset, "AdamW", torch.bfloat16, rounding="compensated"),
}
"""Whose states are in files."""
OTHERS: dict[str, Callable[[], Made]] = {
    "SGD": functools.partial(_preset, "SGD", momentum=0.9, nesterov=True, hold="ball", limit=0.5),
    "NormalizedSGD": functools.partial(_preset, "NormalizedSGD", per="unit"),
    "Signum": functools.partial(_preset, "Signum", weight_decay=0.1),
    "Lion": functools.partial(_preset, "Lion", weight_decay=0.1, decay="cautious"),
    "LAMB": functools.partial(_preset, "LAMB", weight_decay=0.1),
    "Ridge": functools.partial(_preset, "Ridge", by_role={"conv": {"damping": 0.1}}, hold="row_floor", limit=0.5),
    "stochastic": functools.partial(_preset, "Muon", torch.bfloat16, rounding="stochastic", seed=7),
}
"""Whose states are told, not kept."""


def state_of(name: str, made: Made) -> dict[str, Any]:
    """All that is saved of a training beside the model. The control's own state only where the optimizer's has it not."""
    _, optimizer, control = made
    return {"optimizer": optimizer.state_dict()} | ({"control": control.state_dict()} if name == "control" else {})


def states(planted: float = 1.0) -> Found:
    """The form and numbers of every state after four steps, and the weights three steps later."""
    found = {}
    for name, make in (SAVED | OTHERS).items():
        made = make()
        steps(*made, BEFORE)
        form = told(state_of(name, made))
        if name == "control":    # of torch's AdamW, which "attached" has told
            del form["optimizer"]["state"]
        routing = getattr(made[1], "routing", None)
        found[name] = {"state": form, "routing": told(routing.of) if routing is not None else None, "later": _later(name, made, planted)}
    return found


def _later(name: str, made: Made, planted: float) -> Found:
    """Three steps on: how far the weights went, the weights, and all bits of the state."""
    before = weights(made[0])
    steps(*made, AFTER, planted)
    after, (tensors, _) = weights(made[0]), checkpoints.flat(state_of(name, made))
    return {"moved": distance(before, after), "weights": told(after), "state": digest(tensors[key] for key in sorted(tensors))}


def loaded(planted: float = 1.0) -> Found:
    """The weights three steps after the states in the files, which the code of before the rebuild wrote."""
    return {name: _later(name, _resumed(name), planted) for name in SAVED}


def _resumed(name: str) -> Made:
    with safe_open(state_file(name), "pt") as file:
        state = checkpoints.nested({key: file.get_tensor(key) for key in file.keys()}, file.metadata())    # noqa: SIM118
    made = model, optimizer, control = SAVED[name]()
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(state["model"][n])
    optimizer.load_state_dict(state["optimizer"])
    if "control" in state:
        control.load_state_dict(state["control"])
    return made


def state_file(name: str) -> Path:
    """Where a state is kept."""
    return FOLDER / f"{name}.safetensors"


def save_states() -> None:
    """Writes the files that are missing."""
    for name, make in SAVED.items():
        if not state_file(name).exists():
            made = make()
            steps(*made, BEFORE)
            tensors, metadata = checkpoints.flat({"model": weights(made[0]), **state_of(name, made)})
            save_file(tensors, state_file(name), metadata)


# ---------------------------------------------------------------------------------------------------------- public names

PUBLIC = (
    "normwise", "normwise.optim", "normwise.norms", "normwise.norms.linalg", "normwise.checkpoints", "normwise.policy.schedules",
    "normwise.policy.radii",
)  # fmt: skip


def public() -> Found:
    """Public names with their signatures, and the public members of classes."""
    return {module: _names(importlib.import_module(module)) for module in PUBLIC}


def _names(module: Any) -> dict[str, Found]:
    own = [n for n, value in vars(module).items() if not n.startswith("_") and getattr(value, "__module__", None) == module.__name__]
    return {name: _signature(getattr(module, name)) for name in sorted(getattr(module, "__all__", own))}


def _signature(value: Any) -> Found:
    if inspect.isclass(value):
        members = {n: inspect.getattr_static(value, n) for n in sorted(dir(value)) if not n.startswith("_")}
        return {"": _text(value), **{n: _text(m) for n, m in members.items() if not _inherited(value, n)}}
    if isinstance(value, Mapping):
        return sorted(map(str, value))
    return _text(value)


def _inherited(cls: type, name: str) -> bool:
    """Whether a member is one of Python's or torch's, which change with their versions."""
    owner = next((c for c in cls.__mro__ if name in vars(c)), cls)
    return not owner.__module__.startswith("normwise")


def _text(value: Any) -> str:
    value = getattr(value, "__func__", value)
    try:
        return str(inspect.signature(value))
    except (TypeError, ValueError):
        return type(value).__name__


# ---------------------------------------------------------------------------------------------------------------- errors


class Odd(nn.Module):
    """A parameter whose axes nobody states."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, 3, 4))


def attach(*rules: Any, model: nn.Module | None = None, **options: Any) -> Any:
    """To SGD."""
    model = small() if model is None else model
    return nw.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), list(rules), **options)


def _step_with_nan() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nw.attach(model, optimizer, nw.max_norm(1.0), on_nonfinite="raise")
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()


def _zero(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.fc.weight.zero_()    # type: ignore[union-attr,operator]
    return model


def _twice() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = nw.attach(model, optimizer, nw.max_norm(1.0))
    nw.attach(model, optimizer, nw.max_norm(2.0))
    del first


def _missing_from_optimizer() -> None:
    model = small()
    nw.attach(model, torch.optim.SGD([model.get_parameter("fc.weight")], lr=0.1), nw.max_norm(1.0, "head.weight"))


ERRORS: dict[str, Callable[[], Any]] = {
    "pattern that matches nothing": lambda: attach(nw.max_norm(1.0, "fc9*")),
    "role that is unknown": lambda: nw.max_norm(1.0, "role:hiden"),
    "roles of a policy": lambda: nw.Policy(nw.max_norm(1.0), roles={"fc": "haed"}),
    "radius below zero": lambda: nw.max_norm(-1.0),
    "radius that is no number": lambda: nw.max_norm("big"),
    "radius that is missing": lambda: nw.Rule(action="clip_norm"),
    "action misspelt": lambda: nw.Rule(action="clip", radius=1.0),
    "option misspelt": lambda: nw.max_norm(1.0, evry=2),    # type: ignore[call-arg]
    "option of another action": lambda: nw.Rule(action="penalty", radius=1.0, strength=0.1),
    "per that is unknown": lambda: nw.max_norm(1.0, per="row"),
    "norm that is unknown": lambda: nw.clip_weight_norm(1.0, norm="spectrl"),
    "matrix norm of vectors": lambda: nw.spectral_cap(1.0, per="unit"),
    "target without meaning": lambda: nw.Rule(action="lmo", on="weight"),
    "box that is empty": lambda: nw.clip_weight_value(2, 1),
    "stop before start": lambda: nw.max_norm(1.0, start=5, stop=5),
    "brake of gradients": lambda: nw.Rule(action="clip_norm", on="grad", radius=nw.radial_brake().radius),
    "rules that contradict": lambda: attach(nw.unit_norm(2.0), nw.max_norm(1.0)),
    "zero block under init": lambda: attach(nw.unit_norm("init"), model=_zero(small())),
    "block that a parameter has not": lambda: attach(nw.max_norm(1.0, "fc.weight", per="head")),
    "layout that nobody stated": lambda: attach(nw.max_norm(1.0, "w"), model=Odd()),
    "layout that does not fit": lambda: attach(nw.max_norm(1.0, "fc.weight", layout=nw.Layout("soi", (5, 2, 4)))),
    "layout with an unknown letter": lambda: nw.Layout("xy", (2, 3)),
    "no policy": lambda: attach("max_norm"),
    "on_nonfinite misspelt": lambda: attach(nw.max_norm(1.0), on_nonfinite="rise"),
    "weight that no optimizer holds": _missing_from_optimizer,
    "second control": _twice,
    "gradient that is not finite": _step_with_nan,
    "state of something else": lambda: attach(nw.max_norm(1.0)).load_state_dict({"version": 0}),
    "YAML with a misspelt field": lambda: nw.Policy.from_yaml("- {max_norm: 3}\n- action: clip_norm\n  radus: 3"),
    "YAML with an unknown rule": lambda: nw.Policy.from_yaml("- {max_nrm: 3}"),
    "YAML that is none": lambda: nw.Policy.from_yaml("- [", "rules.yaml"),
    "vector to Muon": lambda: nw.optim.Muon([nn.Parameter(torch.ones(3))]),
    "vector to Muon by override": lambda: nw.optim.Muon(small(), override={"fc.bias": "muon"}),
    "tensor of unknown axes to Muon": lambda: nw.optim.Muon([nn.Parameter(torch.ones(2, 3, 4))]),
    "adjust misspelt": lambda: nw.optim.Muon(small(), adjust="match_rms"),    # type: ignore[call-arg]
    "column misspelt": lambda: nw.optim.Muon(small(), polr="fast"),    # type: ignore[call-arg]
    "column that nothing uses": lambda: nw.optim.AdamW(small(), momentum=0.5),    # type: ignore[call-arg]
    "option of torch's": lambda: nw.optim.AdamW(small(), amsgrad=True),    # type: ignore[call-arg]
    "learning rate below zero": lambda: nw.optim.Lion(small(), lr=-1.0),
    "override that matches nothing": lambda: nw.optim.Muon(small(), override={"fc9.weight": "adamw"}),
    "state of another preset": lambda: nw.optim.Muon(small()).load_state_dict(nw.optim.AdamW(small()).state_dict()),
    "checkpoint with a strange value": lambda: checkpoints.flat({"x": object}),
}  # fmt: skip


def errors() -> Found:
    """The text of typical errors."""
    return {name: _raised(wrong) for name, wrong in ERRORS.items()}


def _raised(wrong: Callable[[], Any]) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrong()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing is raised"


# --------------------------------------------------------------------------------------------------------------- sharded

WORLD = 3
"""Processes: 12 rows are split evenly, 7 and 8 are not, and of 2 rows one process has none."""
PLACEMENTS: dict[str, Callable[[Tensor], Any]] = {
    "rows": lambda p: Shard(0), "columns": lambda p: Shard(min(1, p.ndim - 1)), "replicated": lambda p: Replicate(),
}  # fmt: skip
WHERE, PLANTED = (*PLACEMENTS, "mixed"), "rows, a little off"


class Wide(nn.Module):
    """Rows that divide evenly, that do not, and fewer rows than processes."""

    def __init__(self) -> None:
        super().__init__()
        self.even = nn.Linear(8, 12)
        self.odd = nn.Linear(5, 7, bias=False)
        self.few = nn.Linear(6, 2, bias=False)
        self.conv = nn.Conv2d(4, 6, 3, bias=False)
        self.emb = nn.Embedding(7, 4)


SHARDED: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {}
"""What trains a split model."""


def _sharded(*rules: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def made(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
        nw.attach(model, optimizer, list(rules))
        return optimizer

    return made


SHARDED |= {
    "clip and max-norm": _sharded(nw.clip_grad_norm(1.0), nw.max_norm("init", per="tensor")),
    "units": _sharded(nw.group_lasso(0.5), nw.max_norm("0.9*init", per="input")),
    "whole blocks": _sharded(nw.spectral_cap(0.5, "even.weight"), nw.l1_ball(0.7, ["odd.weight", "few.weight"])),
    "found": _sharded(nw.zclip(1.0, warmup=2), nw.cpr("init", mu=0.1), nw.hyperball("init", "conv.weight")),
    "NorMuon": lambda model: nw.optim.NorMuon(model),
    "auto": lambda model: nw.optim.auto(model),
}


def on_a_rank(where: str, planted: float) -> Found:
    """Runs on each rank of a group: three steps with every one of ``SHARDED``, and the whole weights."""
    paths.bf16_pays = lambda device: True    # see found_now
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for name, make in SHARDED.items():
        torch.manual_seed(0)
        model = Wide()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.rand_like(p).sub_(0.5).mul_(0.2))
        for k, (full, p) in enumerate(list(model.named_parameters())):
            owner, _, local = full.rpartition(".")
            if where != "mixed" or k % 4 != 3:    # of "mixed", every fourth is no DTensor
                place = PLACEMENTS[where if where != "mixed" else list(PLACEMENTS)[k % 4]]
                setattr(model.get_submodule(owner), local, nn.Parameter(distribute_tensor(p.detach(), mesh, [place(p)])))
        before, optimizer = weights(model), make(model)
        steps(model, optimizer, None, range(3), planted)
        after = weights(model)
        found[name] = {"moved": distance(before, after), "weights": told(after)}
    return found


def sharded() -> Found:
    """The weights of split models; they are the same on all ranks. Beside them those by rows with a learning rate of 1.001 times theirs."""
    from sharded_group import run

    jobs = [*((where, "unchanged:on_a_rank", [where, 1.0]) for where in WHERE), (PLANTED, "unchanged:on_a_rank", ["rows", 1.001])]
    with tempfile.TemporaryDirectory() as folder:
        found = run(WORLD, jobs, Path(folder))
    assert all(rank == ranks[0] for ranks in found.values() for rank in ranks), "the ranks differ"
    return {name: ranks[0] for name, ranks in found.items()}


# --------------------------------------------------------------------------------------------------------------- records

RECORDS: dict[str, Callable[[], Found]] = {
    **{f"race_{task}": functools.partial(race, task) for task in TASKS},
    "prune": prune, "compare": compare, "gan": gan, "states": states, "loaded": loaded, "sharded": sharded, "policies": policies,
    "public": public, "errors": errors,
}  # fmt: skip
"""Each in a file of its own."""
TEXTS = ("policies", "public", "errors")
"""Which have no numbers of any machine."""


@functools.cache
def found_now(name: str) -> Found:
    """What a record would hold if it were made now, on one thread; once a process.

    By torch's calls alone, here and in ranks, and in bf16 where that is slow, too: what a machine has is none of the code's doing.
    """
    before, switch, pays = torch.get_num_threads(), os.environ.get(native.SWITCH), paths.bf16_pays
    torch.set_num_threads(1)
    os.environ[native.SWITCH] = "0"
    native.library.cache_clear()
    paths.bf16_pays = lambda device: True
    try:
        return RECORDS[name]()
    finally:
        paths.bf16_pays = pays
        torch.set_num_threads(before)
        os.environ.pop(native.SWITCH)
        os.environ.update({native.SWITCH: switch} if switch is not None else {})
        native.library.cache_clear()


def record_file(name: str) -> Path:
    """Where a record is kept."""
    return FOLDER / f"{name}.json"


def recorded(name: str) -> tuple[dict[str, str], Found]:
    """The machine that a record was made on, and what it holds."""
    kept = json.loads(record_file(name).read_text(encoding="utf-8"))
    return kept["machine"], kept["found"]


def record(name: str) -> None:
    """Writes what there is now."""
    kept = {"machine": {} if name in TEXTS else machine(), "found": found_now(name)}
    record_file(name).write_text(_lines(kept) + "\n", encoding="utf-8")


def _lines(value: Found, depth: int = 0) -> str:
    """JSON with a line for each innermost mapping and for each entry of the others, so that a change shows as the lines that changed."""
    if isinstance(value, dict) and value and (depth < 2 or any(isinstance(inner, dict) for inner in value.values())):
        inner = ",\n".join(" " * (depth + 1) + f"{json.dumps(k, ensure_ascii=False)}: {_lines(v, depth + 1)}" for k, v in value.items())
        return "{\n" + inner + "\n" + " " * depth + "}"
    return json.dumps(value, ensure_ascii=False)


def main(words: Sequence[str]) -> int:
    """The command; 1 where something differs."""
    names = words[1:] or list(RECORDS)
    if not words or words[0] not in ("record", "compare") or not set(names) <= set(RECORDS):
        print(f"usage: python tests/unchanged.py record|compare [{' | '.join(RECORDS)}]", file=sys.stderr)
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    if words[0] == "record":
        save_states()
        for name in names:
            record(name)
        return 0
    lines = []
    for name in names:
        made_on, kept = recorded(name)
        lines += differences(kept, found_now(name), name, exact=name in TEXTS or made_on == machine())
    print("\n".join(lines) or "Nothing has changed.")
    return int(bool(lines))


if __name__ == "__main__":
    sys.modules["unchanged"] = sys.modules["__main__"]    # the ranks of a group import it by its name
    sys.exit(main(sys.argv[1:]))
