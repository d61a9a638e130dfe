"""Policies: what they are made of, how they compare, and the table that explains them."""

import copy
import inspect

import pytest
import torch
from torch import nn

import normwise as nw
from normwise.errors import LayoutError, PolicyError
from normwise.norms import NORMS
from normwise.parameters.layouts import Layout
from normwise.policy import NAMED, Policy, Rule, named


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc1 = nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)
        self.fc2 = nn.Linear(8, 3)


def test_a_policy_flattens_and_compares_by_value():
    nested = Policy([named.max_norm(3), [named.elastic_net(1, 2)], Policy(named.agc(), roles={"fc2.weight": "hidden"})])
    assert len(nested) == 4 and nested[0] == named.max_norm(3) and list(nested)[3] == named.agc()
    assert nested.roles == {"fc2.weight": "hidden"}
    assert nested == Policy(list(nested), roles=nested.roles) and hash(nested) == hash(copy.deepcopy(nested))
    assert nested != Policy(list(nested)) and Policy([]) == Policy() and len(Policy()) == 0
    assert Policy(nested) == nested and Policy(named.agc()) == Policy([named.agc()])
    assert eval(repr(nested), {**vars(named), "Policy": Policy, **{type(n).__name__: type(n) for n in NORMS.values()}}) == nested


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Policy("max_norm"), "For a policy file use nw.Policy.load"),
        (lambda: Policy([3.0]), "holds rules and lists of rules, given 3.0"),
        (lambda: Policy({"action": "clip_norm"}), "holds rules and lists of rules"),
        (lambda: Policy(None), "given None"),
        (lambda: Policy([], roles={"fc*": "heed"}), "unknown role 'heed'. Did you mean 'head'"),
        (lambda: Policy([], roles={"role:hed": "head"}), "is no role"),
        (lambda: Policy([], roles=["head"]), "roles must be a mapping"),
    ],
)
def test_no_policy(make, message):
    with pytest.raises(PolicyError, match=message):
        make()


def test_a_list_that_holds_itself_is_no_policy():
    endless = []
    endless.append(endless)
    with pytest.raises(PolicyError, match="lists of rules"):
        Policy(endless)


def test_explain_shows_every_parameter_and_who_is_left():
    policy = Policy([named.max_norm(3), named.spectral_cap(1, "fc*.weight"), named.weight_decay(0.1), named.clip_grad_norm(1, "conv*")])
    table = policy.explain(Net())
    rows = {row.name: row for row in table.rows}
    assert list(rows) == [name for name, _ in Net().named_parameters()]
    assert rows["conv.weight"].blocks == {1: "4 of 9", 3: "all", 4: "global"} and rows["conv.weight"].role == "conv"
    assert rows["fc2.weight"].blocks == {1: "3 of 8", 2: "1 of 3x8", 3: "all"}
    assert table.untouched == ("fc1.bias", "norm.weight", "norm.bias", "fc2.bias")
    text = str(table).splitlines()
    assert text[0] == "rule 1: clip_norm l2/unit <= 3" and text[4].split() == ["parameter", "shape", "role", "axes", "rule:", "blocks"]
    assert text[-1] == "4 parameters are touched by no rule: fc1.bias, norm.weight, norm.bias, fc2.bias."
    assert text[8].startswith("fc1.bias") and text[8].split()[-1] == "-"
    roles_column = {line.index(rows[line.split()[0]].role, 12) for line in text[5:-1]}
    assert len(roles_column) == 1, "the columns are aligned"


def test_explain_heeds_roles_layouts_and_shared_weights():
    net = Net()
    rule = Rule(params="role:other", action="clip_norm", radius=1, per="head", layout=Layout("hoi", (2, 4, 16)))
    policy = Policy(rule, {"fc1.weight": "other"})
    [row] = [row for row in policy.explain(net).rows if row.blocks]
    assert (row.name, row.role, row.blocks) == ("fc1.weight", "other", {1: "2 of 64"})
    assert "Every one of the" in str(Policy(named.clip_grad_norm(1)).explain(net))
    tied = nn.ModuleDict({"emb": nn.Embedding(5, 4), "out": nn.Linear(4, 5, bias=False)})
    tied["out"].weight = tied["emb"].weight
    assert "emb.weight (= out.weight)" in str(Policy([]).explain(tied))


def test_explain_raises_what_attach_would():
    with pytest.raises(LayoutError, match=r"norm\.weight|conv\.bias|fc1\.bias"):
        Policy(named.spectral_cap(1, "role:all")).explain(Net())
    with pytest.raises(PolicyError, match="matches no parameter"):
        Policy(named.max_norm(1, "nothing*")).explain(Net())


# ----------------------------------------------------------------------------------------------------------- rules by name


def test_a_name_is_what_logs_call_a_rule_and_goes_through_yaml():
    policy = Policy([nw.max_norm(3, "fc*", name="trunk"), nw.hyperball(name="ball"), nw.elastic_net(1e-5, 1e-4, name="net")])
    assert [rule.label() for rule in policy] == ["trunk", "ball step", "ball weight", "net l1", "net l2"]
    assert Policy.from_yaml(policy.to_yaml()) == policy
    assert Policy.from_yaml("- max_norm: {radius: 3, params: fc*, name: trunk}") == Policy(nw.max_norm(3, "fc*", name="trunk"))
    assert nw.max_norm(3, name="a").described() == nw.max_norm(3).described(), "a rule goes on from its state under another name"


def test_two_rules_of_one_name_are_refused():
    with pytest.raises(PolicyError, match=r"2 rules have the name 'cap': logs could not tell them apart. Rename one."):
        Policy([nw.max_norm(3, name="cap"), nw.agc(name="cap")])
    with pytest.raises(PolicyError, match="the policy: 2 rules have the name 'cap'"):
        Policy.from_yaml("- max_norm: {radius: 3, name: cap}\n- agc: {name: cap}")


def test_every_named_rule_is_found_at_the_top_level_and_takes_the_common_keywords():
    assert set(NAMED) <= set(nw.__all__) and all(getattr(nw, name) is make for name, make in NAMED.items())
    for name, make in NAMED.items():
        kinds = {p.kind for p in inspect.signature(make).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD in kinds, name


# ------------------------------------------------------------------------------------------------- a relative trust region


def trained(rule, model, steps=3):
    """The weights of ``model`` before and after large steps under the rule, and the steps, all in float64."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    moved = [before]
    with nw.attach(model, optimizer, rule) as control:
        for seed in range(steps):
            generator = torch.Generator().manual_seed(seed)
            model.weight.grad = torch.randn(model.weight.shape, generator=generator, dtype=torch.float64)
            by_hand = moved[-1] - model.weight.grad - before
            limit = 0.1 * before.norm(dim=1, keepdim=True)
            moved.append(before + by_hand * (limit / by_hand.norm(dim=1, keepdim=True)).clamp(max=1))
            optimizer.step()
        assert control.verify()
    return before, model.weight.detach(), moved[-1]


def test_a_relative_trust_region_is_its_formula():
    """w <- w0 + d min(1, 0.1 |w0| / |d|) with d = w - w0, for each unit, written out by hand."""
    torch.manual_seed(0)
    rule = nw.max_norm(0.1, center="init", relative=True)
    before, after, by_hand = trained(rule, nn.Linear(6, 4, dtype=torch.float64))
    assert torch.allclose(after, by_hand, rtol=1e-9, atol=0)
    assert ((after - before).norm(dim=1) <= 0.1 * before.norm(dim=1)).all()
    assert rule == nw.max_norm("0.1*init", center="init")
    assert Policy.from_yaml(Policy(rule).to_yaml()) == Policy(rule) == Policy.from_yaml(
        "- max_norm: {radius: 0.1, center: init, relative: true}"
    )  # fmt: skip


def test_a_relative_trust_region_of_a_block_of_zeros_needs_a_floor():
    model = nn.Linear(3, 2, dtype=torch.float64)
    with torch.no_grad():
        model.weight[0] = 0
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(PolicyError, match=r"1 of 2 blocks of 'weight' are zero when attached.* Give floor="):
        nw.attach(model, optimizer, nw.max_norm(0.1, center="init", relative=True))
    with nw.attach(model, optimizer, nw.max_norm(0.1, center="init", relative=True, floor=2.0)):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    assert float(model.weight[0].norm()) == pytest.approx(0.2, rel=1e-9)


@pytest.mark.parametrize("given", [{"radius": "init"}, {"radius": nw.radii.Relative(1)}, {"radius": 1, "center": {"a": torch.ones(1)}}])
def test_what_relative_cannot_mean_is_refused(given):
    with pytest.raises(PolicyError, match="relative=True counts in the norms when attached: give radius a number or a schedule"):
        nw.max_norm(**given, relative=True)
