"""Names cleaned of wrappers, roles, the inventory, and what a selector selects."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune

from normwise.errors import LayoutError, PolicyError
from normwise.parameters.inventory import (
    Entry,
    Inventory,
    check_selector,
    clean_name,
    find_roles,
    matches,
    select,
    selector_from_data,
    selector_to_data,
)  # fmt: skip
from normwise.parameters.layouts import Layout
from normwise.parameters.names import module_names
from normwise.parameters.roles import GROUPS, ROLES


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc1 = nn.Linear(4, 8)
        self.fc2 = nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.table = nn.Parameter(torch.ones(3, 2))


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)


class Transformer(nn.Module):
    """Blocks under a class of block; ``head`` may be absent, separate or tied."""

    def __init__(self, head: str | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        if head:
            self.out = nn.Linear(4, 7, bias=False)
        if head == "tied":
            self.out.weight = self.embed.weight


NAMES = ["scale", "table", "conv.weight", "conv.bias", "norm.weight", "norm.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]


def names(entries: list[Entry]) -> list[str]:
    return [entry.name for entry in entries]


# ------------------------------------------------------------------------------------------------------------------ names


def wrapped_in_ddp(model: nn.Module) -> nn.Module:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(model)
    finally:
        dist.destroy_process_group()


WRAPPERS = {
    "none": lambda m: m,
    "DataParallel": nn.DataParallel,
    "compile": torch.compile,
    "compile-DataParallel": lambda m: torch.compile(nn.DataParallel(m)),
    "DataParallel-compile": lambda m: nn.DataParallel(torch.compile(m)),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "checkpoint": checkpoint_wrapper,
    "DistributedDataParallel": wrapped_in_ddp,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_are_those_of_the_unwrapped_model(wrapper: str) -> None:
    model = WRAPPERS[wrapper](Net())
    assert names(Inventory(model).entries) == NAMES == [name for name, _ in Net().named_parameters()]
    assert list(find_roles(model)) == NAMES
    assert [clean_name(name) for name in model.state_dict() if "norm" not in name and name != "n_averaged"] == [
        name for name in NAMES if "norm" not in name
    ]


def test_a_submodule_of_the_user_may_be_called_module() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)
            self.inner = checkpoint_wrapper(nn.Linear(2, 2, bias=False))

    assert names(Inventory(Outer()).entries) == ["module.weight", "module.bias", "inner.weight"]
    assert names(Inventory(nn.DataParallel(Outer())).entries) == ["module.weight", "module.bias", "inner.weight"]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_module_has_the_name_that_it_has_in_the_unwrapped_model(wrapper: str) -> None:
    """The model itself the empty one, also where it is the attention that reports its logits."""
    for inner in (Net(), nn.MultiheadAttention(8, 2)):
        found = module_names(WRAPPERS[wrapper](inner))
        if "average" not in wrapper:    # which trains a copy
            assert {found[id(m)] for m in inner.modules()} == {name for name, _ in inner.named_modules()}
        assert set(found.values()) == {name for name, _ in inner.named_modules()}


def test_clean_name_of_a_string() -> None:
    assert clean_name("module.module._orig_mod.a.module.b") == "a.module.b"
    assert clean_name("a._fsdp_wrapped_module.b._checkpoint_wrapped_module.c") == "a.b.c"
    assert clean_name("module") == "module"


# ------------------------------------------------------------------------------------------------------------------ roles


def test_roles_by_module_type() -> None:
    assert find_roles(Net()) == {
        "scale": "gain", "table": "other", "conv.weight": "conv", "conv.bias": "bias", "norm.weight": "gain", "norm.bias": "bias",
        "fc1.weight": "hidden", "fc1.bias": "bias", "fc2.weight": "head", "fc2.bias": "bias",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("module", "role"),
    [
        (nn.ConvTranspose2d(2, 2, 3), "conv"),
        (nn.EmbeddingBag(3, 2), "embedding"),
        (nn.LSTM(2, 3, proj_size=2), "recurrent"),
        (nn.GRUCell(2, 3), "recurrent"),
        (nn.Bilinear(2, 2, 2), "hidden"),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), "hidden"),
        (nn.MultiheadAttention(4, 2, kdim=3, vdim=5), "hidden"),
        (nn.LayerNorm((2, 3)), "gain"),
        (nn.PReLU(), "gain"),
        (nn.Linear(2, 2), "head"),
    ],
)
def test_a_module_has_one_role_and_biases(module: nn.Module, role: str) -> None:
    found = find_roles(module)
    assert found and all(r == ("bias" if "bias" in name else role) for name, r in found.items())
    assert role in found.values()


def test_a_tied_head_is_an_embedding_once() -> None:
    inventory = Inventory(Transformer("tied"))
    entry = inventory.by_name["embed.weight"]
    assert (entry.role, entry.tied, entry.layout) == ("embedding", ("out.weight",), Layout("oi", (7, 4)))
    assert inventory.by_name["out.weight"] is entry
    assert len(inventory) == len(inventory.entries) == len(list(Transformer().parameters()))
    assert "head" not in {e.role for e in inventory}
    assert names(select(inventory, "out.*")) == ["embed.weight"] == names(select(inventory, "embed.*"))
    assert "embed.weight" in names(select(inventory, nn.Linear))


def test_tied_through_storage_and_through_a_shared_module() -> None:
    model = nn.ModuleDict({"out": nn.Linear(4, 7, bias=False), "embed": nn.Embedding(7, 4)})
    model["embed"].weight = nn.Parameter(model["out"].weight.detach())
    assert [(e.name, e.tied, e.role) for e in Inventory(model)] == [("out.weight", ("embed.weight",), "embedding")]
    shared = nn.Linear(2, 2, bias=False)
    assert [(e.name, e.tied) for e in Inventory(nn.Sequential(shared, nn.ReLU(), shared))] == [("0.weight", ("2.weight",))]
    views = nn.ParameterList([nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(0))])
    assert len(Inventory(views)) == 3


def test_heads() -> None:
    assert find_roles(Transformer("separate"))["out.weight"] == "head"
    without = find_roles(Transformer())
    assert without["blocks.1.down.weight"] == without["blocks.1.attention.out_proj.weight"] == "hidden"
    assert "head" not in without.values()
    assert find_roles(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))))["1.0.weight"] == "head"
    assert find_roles(nn.Sequential(Block()))["0.down.weight"] == "head"
    assert find_roles(nn.DataParallel(Transformer("separate")))["out.weight"] == "head"


def test_a_hugging_face_model_names_its_head() -> None:
    class Model(Transformer):
        def get_output_embeddings(self) -> nn.Module | None:
            return self.lm if hasattr(self, "lm") else None

    model = Model("separate")
    assert find_roles(model)["out.weight"] == "head"
    model.lm = nn.Linear(4, 7, bias=False)
    model.later = nn.Linear(4, 4)
    roles = find_roles(nn.DataParallel(model))
    assert (roles["lm.weight"], roles["later.weight"], roles["out.weight"]) == ("head", "hidden", "hidden")
    model.lm.weight = model.embed.weight
    assert "head" not in find_roles(model).values()


def test_parametrized_and_pruned_weights_keep_their_role() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    nn.utils.parametrizations.spectral_norm(model[0])
    nn.utils.parametrizations.weight_norm(model[1])
    prune.random_unstructured(model[2], "weight", amount=1)
    nn.utils.parametrizations.orthogonal(model[3])
    inventory = Inventory(model)
    assert {e.name: e.role for e in inventory if e.role != "bias"} == {
        "0.parametrizations.weight.original": "conv",
        "1.parametrizations.weight.original0": "gain",
        "1.parametrizations.weight.original1": "hidden",
        "2.weight_orig": "hidden",
        "3.parametrizations.weight.original": "head",
    }
    assert all(e.layout.certain for e in inventory)
    assert inventory.by_name["0.parametrizations.weight.original"].layout.axes == "soikk"
    assert len(select(inventory, nn.Linear)) == len(inventory) - 2
    old = find_roles(nn.utils.weight_norm(nn.Linear(3, 2)))
    assert old == {"bias": "bias", "weight_g": "gain", "weight_v": "head"}


def test_what_a_subclass_adds_is_not_taken_for_its_weight() -> None:
    class LowRank(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.down = nn.Parameter(torch.zeros(2, 4))

    inventory = Inventory(nn.Sequential(LowRank(), nn.Linear(4, 4)))
    found = {e.name: (e.role, e.layout.certain) for e in inventory}
    assert (found["0.weight"], found["0.down"]) == (("hidden", True), ("other", False))
    assert find_roles(nn.LazyConv2d(2, 3)) == {"weight": "conv", "bias": "bias"}


def test_attention_layouts_know_their_parent() -> None:
    by_name = Inventory(Transformer()).by_name
    assert by_name["blocks.0.attention.out_proj.weight"].layout == Layout("oHi", (4, 2, 2))
    assert by_name["blocks.0.attention.in_proj_weight"].layout == Layout("shoi", (3, 2, 2, 4))


def test_roles_can_be_corrected() -> None:
    inventory = Inventory(Net(), roles={"fc*.weight": "hidden", "table": "embedding", "role:hidden": "head"})
    assert {name: inventory.by_name[name].role for name in ("fc1.weight", "fc2.weight", "table", "conv.weight")} == {
        "fc1.weight": "head", "fc2.weight": "hidden", "table": "embedding", "conv.weight": "conv",
    }  # fmt: skip
    with pytest.raises(PolicyError, match="Did you mean 'hidden'"):
        Inventory(Net(), roles={"fc1.weight": "hiden"})
    with pytest.raises(PolicyError, match="matches no parameter"):
        Inventory(Net(), roles={"fc9.weight": "hidden"})


def test_frozen_complex_empty_and_lazy_parameters() -> None:
    model = nn.ParameterDict({"c": nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64)), "e": nn.Parameter(torch.zeros(0, 3))})
    model["c"].requires_grad_(False)
    entries = Inventory(model).by_name
    assert entries["c"].param.is_complex() and not entries["c"].param.requires_grad and entries["e"].param.numel() == 0
    assert names(Inventory(nn.Linear(2, 3, device="meta")).entries) == ["weight", "bias"]
    with pytest.raises(LayoutError, match=r"'0\.weight'.*forward pass"):
        Inventory(nn.Sequential(nn.LazyLinear(3)))


# -------------------------------------------------------------------------------------------------------------- selectors

SELECTED = [
    ("fc*", ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]),
    ("fc[1].*", ["fc1.weight", "fc1.bias"]),
    ("*.weight", ["conv.weight", "norm.weight", "fc1.weight", "fc2.weight"]),
    ("scale", ["scale"]),
    ("re:c.*ght$", ["conv.weight", "fc1.weight", "fc2.weight"]),
    (re.compile("FC1", re.IGNORECASE), ["fc1.weight", "fc1.bias"]),
    ("role:gain", ["scale", "norm.weight"]),
    ("role:matrix", ["conv.weight", "fc1.weight", "fc2.weight"]),
    ("role:all", NAMES),
    ("class:Linear", ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]),
    ("class:torch.nn.Conv2d", ["conv.weight", "conv.bias"]),
    ("class:torch.nn.modules.batchnorm._BatchNorm", ["norm.weight", "norm.bias"]),
    (nn.modules.batchnorm._NormBase, ["norm.weight", "norm.bias"]),
    (lambda entry: entry.param.ndim == 4, ["conv.weight"]),
    (["conv.*", "role:other"], ["table", "conv.weight", "conv.bias"]),
    ((nn.Conv2d, "table"), ["table", "conv.weight", "conv.bias"]),
]


NUMBERED = [f"{i}-{repr(s)[:30]}".split(" at 0x")[0] for i, (s, _) in enumerate(SELECTED)]


@pytest.mark.parametrize(("selector", "expected"), SELECTED, ids=NUMBERED)
def test_selectors(selector: object, expected: list[str]) -> None:
    inventory = Inventory(Net())
    assert names(select(inventory, selector)) == expected
    assert [e.name for e in inventory if matches(selector, e)] == expected
    rest = [name for name in NAMES if name not in expected]
    if rest:
        assert names(select(inventory, "*", exclude=selector)) == rest


@pytest.mark.parametrize(("selector", "expected"), [(s, e) for s, e in SELECTED if not getattr(s, "__name__", "").startswith("<")])
def test_selectors_survive_yaml(selector: object, expected: list[str]) -> None:
    data = selector_to_data(selector)
    assert all(isinstance(text, str) for text in (data if isinstance(data, list) else [data]))
    read = selector_from_data(data)
    assert names(select(Inventory(Net()), read)) == expected
    assert selector_to_data(read) == data


def test_flags_of_a_compiled_pattern_survive_yaml() -> None:
    for pattern in (re.compile("(?:F)C1", re.I), re.compile("(?i)FC1"), re.compile("(?i)F C1 # (", re.X)):
        assert names(select(Inventory(Net()), selector_to_data(pattern))) == ["fc1.weight", "fc1.bias"]


def test_a_predicate_has_no_yaml() -> None:
    with pytest.raises(PolicyError, match="a predicate cannot be written to YAML"):
        selector_to_data(["fc*", lambda entry: True])


@pytest.mark.parametrize(
    ("params", "exclude", "message"),
    [
        ("fc1", None, r"params='fc1' matches no parameter\. Did you mean 'fc1\.\*'\? There are: scale \(gain\), table \(other\)"),
        ("fc1.wieght", None, "Did you mean 'fc1.weight'"),
        (["fc*", "conv9.*"], None, "params='conv9"),
        ("class:Linaer", None, "Did you mean 'class:Linear'"),
        (nn.LSTM, None, "params=LSTM matches no parameter"),
        ("role:recurrent", None, "matches no parameter"),
        ("role:hiden", None, "Did you mean 'hidden'"),
        ("re:(", None, "no regular expression"),
        ("*", "fc9*", r"exclude='fc9\*' matches no parameter"),
        ("*", ["fc1*", "zzz"], "exclude='zzz' matches no parameter"),
        ("fc*", "class:Linear", "leaves nothing"),
        ([], None, "names nothing"),
        (3, None, "selects no parameters"),
        (int, None, "selects no parameters"),
        (nn.Linear(1, 1), None, "selects no parameters"),
    ],
)
def test_what_selects_nothing_is_an_error(params: object, exclude: object, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        select(Inventory(Net()), params, exclude)


def test_a_long_model_is_listed_in_part() -> None:
    with pytest.raises(PolicyError, match=r"29\.weight \(hidden\), \.\.\. and 5 more\.") as error:
        select(Inventory(nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(35)])), "x")
    assert str(error.value).count("(hidden)") == 30


def test_bad_data_is_found_without_a_model() -> None:
    for data in (3, ["a", 3], None, {"a": 1}, "re:(", ["role:nothing"]):
        with pytest.raises(PolicyError):
            selector_from_data(data)
    check_selector(["fc*", nn.Linear, "role:all"])
    assert set(GROUPS["matrix"]) < set(GROUPS["all"]) == set(ROLES)


def test_custom_norm_layers_have_gains() -> None:
    class RootNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    assert find_roles(nn.Sequential(RootNorm(), nn.Linear(4, 4)))["0.weight"] == "gain"
