"""Policies: what they are made of, how they compare, and the table that explains them."""

import copy

import pytest
from torch import nn

from normwise.errors import LayoutError, PolicyError
from normwise.norms import NORMS
from normwise.parameters.layouts import Layout
from normwise.policy import Policy, Rule, as_policy, named


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
    assert as_policy(nested) is nested and as_policy(named.agc()) == Policy([named.agc()])
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
