"""Checkpoints: what is in a state comes back from flat tensors and JSON, and a broken state is not written over a healthy one."""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

import normwise as nw
from normwise import NormwiseError
from normwise.checkpoints import flat, load, nested, save


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=True)
        return isinstance(b, dict) and all(equal(k, m) and equal(v, w) for (k, v), (m, w) in pairs)
    if isinstance(a, list | tuple):
        return isinstance(a, tuple) == isinstance(b, tuple) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, float | complex) and a != a:
        return repr(a) == repr(b)
    return type(a) is type(b) and a == b


def round_trip(state: Any) -> Any:
    tensors, metadata = flat(state)
    assert all(isinstance(name, str) and t.is_contiguous() for name, t in tensors.items())
    for text in metadata.values():
        json.loads(text, parse_constant=pytest.fail)    # other readers know no NaN
    return nested(tensors, metadata)


def t(value: float) -> Tensor:
    return torch.tensor([value])


pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")

# ---------------------------------------------------------------------------------------------------------- keys and values


@pytest.mark.parametrize("state", [
    {"a.b": t(1), "a": {"b": t(2)}},
    {"a": {"b": t(2)}, "a.b": t(1)},
    {"a": {"b.c": t(1), "b": {"c": t(2)}}, "a.b": {"c": t(3)}, "a.b.c": t(4)},
    {1: t(1), "1": t(2)},
    {"x": [t(1)], "x.0": t(2)},
    {"": t(1), ".": t(2), "..": t(3), "a": {"": {"": t(4)}}},
    {"!": t(1), 'state!["a"]': t(2), "a.b": t(3), "a": {"b": t(4)}},
    {None: t(1), "None": t(2), True: t(3), "True": t(4)},
    {(0, "a"): t(1), "(0, 'a')": t(2), ((1, None), 2.5): t(3)},
    {0.5: t(1), "0": {"5": t(2)}, "0.5": t(3), math.inf: t(4), "inf": t(5)},
    {b"k": t(1), "b'k'": t(2)},
], ids=str)  # fmt: skip
def test_two_ways_never_share_a_tensor(state: Any) -> None:
    assert equal(round_trip(state), state)


def test_the_names_of_colliding_tensors_do_not_depend_on_their_order() -> None:
    one, other = {"a.b": t(1), "a": {"b": t(2)}}, {"a": {"b": t(2)}, "a.b": t(1)}
    a, b = flat(one)[0], flat(other)[0]
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_names_are_the_ways_as_ever() -> None:
    state = {"model": {"fc.weight": t(1), "fc.bias": t(2)}, "optimizer": {"state": {0: {"exp_avg": t(3)}}, "param_groups": [{"lr": t(4)}]}}
    assert list(flat(state)[0]) == [
        "state.model.fc.weight", "state.model.fc.bias", "state.optimizer.state.0.exp_avg", "state.optimizer.param_groups.0.lr",
    ]  # fmt: skip


@pytest.mark.parametrize("value", [
    {}, [], (), {"a": {}, "b": [], "c": ()}, [[]], ([], {}), True, False, None, 0, -(2**70), 1.5, -0.0, math.inf, -math.inf, math.nan,
    {"x": [math.inf, -math.inf, math.nan]}, 1 + 2j, complex(math.inf, math.nan), b"", b"\x00\xff", "", "ä\u2028\ud800",
    torch.float16, torch.device("cpu"), torch.device("cuda", 1), (1, (2.0, None)), [["tensor", "state.x"]], ["dict"], ["list", []],
], ids=repr)  # fmt: skip
def test_plain_values_come_back(value: Any) -> None:
    assert equal(round_trip(value), value) and equal(round_trip({"x": value, "y": t(1)}), {"x": value, "y": t(1)})


def test_numbers_of_numpy_and_named_dictionaries_become_plain_ones() -> None:
    state = OrderedDict(a=np.float64(1.5), b=np.int64(3), c=np.bool_(True), d=np.float32(0.5), e=torch.Size([2, 3]), f=np.float64("nan"))
    assert equal(round_trip(state), {"a": 1.5, "b": 3, "c": True, "d": 0.5, "e": (2, 3), "f": math.nan})


@pytest.mark.parametrize("value", [
    object(), {1, 2}, nn.Linear(2, 2), lambda: 0, {"x": {"y": object()}}, {frozenset(): 1}, torch.eye(3).to_sparse(), np.ones(2),
])  # fmt: skip
def test_what_has_no_form_is_refused(value: Any) -> None:
    with pytest.raises(NormwiseError, match="state"):
        flat(value)


def test_metadata_of_the_versions_before_still_reads() -> None:
    old = '["dict", ["a", ["tensor", "state.a"]], ["n", NaN], ["i", Infinity], [3, ["list", 1, ["tuple"]]]]'
    assert equal(nested({"state.a": t(1)}, {"normwise": old}), {"a": t(1), "n": math.nan, "i": math.inf, 3: [1, ()]})


@pytest.mark.parametrize("tree", ['["what"]', '["bytes", "?"]', '["dtype", "float1"]', '["device", "moon"]', '["float", []]', "[]",
                                  '["dict", [["list"], 1]]', '["complex", 1]', '["tensor"]', "{", '["dict", 3]'])  # fmt: skip
def test_metadata_that_flat_did_not_make_are_refused(tree: str) -> None:
    with pytest.raises(NormwiseError, match="none that"):
        nested({}, {"normwise": tree})


@pytest.mark.parametrize("make", [
    lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: Adam(p, lr=torch.tensor(0.1), amsgrad=True), lambda p: torch.optim.LBFGS(p),
    lambda p: torch.optim.Rprop(p), lambda p: torch.optim.Adagrad(p), lambda p: torch.optim.NAdam(p), lambda p: torch.optim.Adafactor(p),
], ids=["sgd", "adam", "lbfgs", "rprop", "adagrad", "nadam", "adafactor"])  # fmt: skip
def test_the_state_of_torchs_optimizers_with_a_control_comes_back(make: Any) -> None:
    net = nn.Linear(3, 2)
    optimizer: Optimizer = make(net.parameters())
    control = nw.attach(net, optimizer, [nw.max_norm("init"), nw.autoclip(window=4)])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    state = {"optimizer": optimizer.state_dict(), "control": control.state_dict()}
    assert equal(round_trip(state), state)


# ---------------------------------------------------------------------------------------------------------- refuse_nonfinite


def broken(state: dict[str, Any], where: str) -> dict[str, Any]:
    at: Any = state
    *way, last = where.split("/")
    for key in way:
        at = at[int(key) if key.isdigit() else key]
    at[last].view(-1)[-1] = math.nan
    return state


def trained() -> dict[str, Any]:
    net = nn.Linear(3, 2)
    optimizer = AdamW(net.parameters(), lr=0.1)
    control = nw.attach(net, optimizer, [nw.max_norm("init"), nw.max_norm(9.0, center="init"), nw.autoclip(window=4),
                                        nw.cpr(nw.radii.WarmStart(9))])    # fmt: skip
    plan = ReduceLROnPlateau(optimizer)    # whose best loss is infinite at first
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "control": control.state_dict(), "plan": plan.state_dict()}


def test_a_healthy_state_with_our_own_infinities_is_written(tmp_path: Path) -> None:
    state = trained()
    found = [v for rule in state["control"]["rules"] for own in rule["found"].values() for v in own.values()]
    assert any(not v.isfinite().all() for v in found), "the case would be vacuous"
    save(state, tmp_path / "run.pt", refuse_nonfinite=True)
    assert equal(load(tmp_path / "run.pt")["model"], dict(state["model"]))


@pytest.mark.parametrize("where", [
    "model/weight", "optimizer/state/0/exp_avg", "control/rules/0/radius/weight", "control/rules/1/center/weight",
    "optimizer/param_groups/0/normwise/0/kept_float64",
])  # fmt: skip
def test_a_state_that_is_not_finite_does_not_replace_the_healthy_one(tmp_path: Path, where: str) -> None:
    path = tmp_path / "run.pt"
    save({"healthy": 1}, path, refuse_nonfinite=True)
    name = re.sub(r"(param_groups|normwise|rules)\.(\d)", r"\1[\2]", where.replace("/", "."))
    with pytest.raises(NormwiseError) as caught:
        save(broken(trained(), where), path, refuse_nonfinite=True)
    assert f"not finite in {name} (1 of" in str(caught.value) and str(path) in str(caught.value)
    assert load(path) == {"healthy": 1} and [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    save(broken(trained(), where), path)    # as ever
    assert load(path) != {"healthy": 1}


class Boxed(Tensor):
    """A tensor subclass of torch's protocol, as quantised weights are."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Boxed:
        made: Boxed = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)    # type: ignore[attr-defined]
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(func)


INF = torch.tensor([1.0, math.inf, 2.0])


@pytest.mark.parametrize("tensor", [
    INF, -INF, INF.half(), INF.bfloat16(), INF.double(), torch.complex(INF, INF), INF.to(torch.float8_e5m2), INF.to_sparse(),
    INF.expand(2, 3).to_sparse_csr(), torch.stack([INF, INF]).t(), INF[1], nn.Parameter(INF), Boxed(INF),
    torch.sparse_coo_tensor([[0, 1]], [math.nan, 1.0], (4,)),
], ids=lambda v: f"{type(v).__name__}-{v.dtype}-{v.layout}")  # fmt: skip
def test_every_kind_of_tensor_is_looked_at(tmp_path: Path, tensor: Tensor) -> None:
    with pytest.raises(NormwiseError, match=r"not finite in a\[0\]\.b"):
        save({"a": [{"b": tensor}]}, tmp_path / "x.pt", refuse_nonfinite=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tensor", [
    torch.ones(3), torch.tensor([2**62]), torch.tensor([True]), torch.empty(0), torch.empty(3, device="meta"),
    torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), torch.ones(2, dtype=torch.complex64),
], ids=lambda v: f"{v.dtype}-{v.numel()}-{v.device}")  # fmt: skip
def test_what_is_finite_passes(tmp_path: Path, tensor: Tensor) -> None:
    save({"a": (tensor, math.inf)}, tmp_path / "x.pt", refuse_nonfinite=True)


def test_only_the_named_entries_are_looked_at(tmp_path: Path) -> None:
    state = {"model": {"mask": torch.full((2,), -math.inf)}, "optimizer": {"m": t(1)}}
    save(state, tmp_path / "x.pt", refuse_nonfinite=["optimizer"])
    with pytest.raises(NormwiseError, match=r"model\.mask \(2 of 2"):
        save(state, tmp_path / "x.pt", refuse_nonfinite=["model", "optimizer"])
    with pytest.raises(NormwiseError, match="'modle', which the state has not"):
        save(state, tmp_path / "x.pt", refuse_nonfinite=["modle"])
