"""qk_clip: attention logits measured from the weights before and after the rule, for every kind of attention layer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import normwise as nw

F64 = torch.float64


def logits(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """The attention logits (heads, queries, keys) from the module's own weights, scaled by 1/√d."""
    e, h = attention.embed_dim, attention.num_heads
    if attention.in_proj_weight is not None:
        w, b = attention.in_proj_weight.detach(), attention.in_proj_bias.detach()
        q, k = x @ w[:e].T + b[:e], x @ w[e : 2 * e].T + b[e : 2 * e]
    else:
        b = attention.in_proj_bias.detach()
        q, k = x @ attention.q_proj_weight.detach().T + b[:e], x @ attention.k_proj_weight.detach().T + b[e : 2 * e]
    if attention.bias_k is not None:
        k = torch.cat([k, attention.bias_k.detach()[0]])
    split = [t.view(-1, h, e // h).transpose(0, 1) for t in (q, k)]
    return split[0] @ split[1].mT / math.sqrt(e // h)


def still(model: nn.Module, opt: torch.optim.Optimizer) -> None:
    """A step that moves nothing by itself."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()


@pytest.mark.parametrize("more", [{}, {"kdim": 12, "vdim": 5}, {"add_bias_kv": True}], ids=str)
def test_qk_clip_brings_the_logits_of_multihead_attention_down_to_tau(more):
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(12, 3, **more), "out": nn.Linear(12, 2)}).to(F64)
    attention, x = model["attn"], 3 * torch.randn(9, 12, dtype=F64)
    if attention.in_proj_bias is not None:
        nn.init.normal_(attention.in_proj_bias)
    before, frozen = logits(attention, x), {n: p.detach().clone() for n, p in model.named_parameters()}
    maxima = before.flatten(1).max(1).values
    tau = float(maxima.sort().values[1]) * 0.9
    opt = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, opt, nw.qk_clip(tau))
    still(model, opt)
    assert torch.equal(logits(attention, x), before), "without a report nothing happens"
    control.report_max_logits(attention, maxima)
    still(model, opt)
    gamma = (tau / maxima).clamp(max=1)
    assert 0 < int((gamma < 1).sum()) < 3
    torch.testing.assert_close(logits(attention, x), before * gamma[:, None, None], rtol=1e-11, atol=1e-12)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, frozen[n])}
    assert changed <= {"attn.in_proj_weight", "attn.in_proj_bias", "attn.q_proj_weight", "attn.k_proj_weight", "attn.bias_k"}
    if "attn.in_proj_weight" in changed:
        assert torch.equal(attention.in_proj_weight[24:], frozen["attn.in_proj_weight"][24:]), "values are left alone"
    assert next(iter(control.violations().values())) > 0
    still(model, opt)
    torch.testing.assert_close(logits(attention, x), before * gamma[:, None, None], rtol=1e-11, atol=1e-12)    # the report is used up


class Attention(nn.Module):
    """Separate projections, grouped-query where ``key_heads`` is smaller; or one fused layer."""

    def __init__(self, heads: int, key_heads: int, d: int = 4, fused: bool = False) -> None:
        super().__init__()
        self.heads, self.key_heads, self.d = heads, key_heads, d
        if fused:
            self.c_attn = nn.Linear(8, 3 * heads * d)
        else:
            self.q_proj, self.k_proj = nn.Linear(8, heads * d), nn.Linear(8, key_heads * d, bias=False)

    def logits(self, x: Tensor) -> Tensor:
        q, k = self.c_attn(x).chunk(3, -1)[:2] if hasattr(self, "c_attn") else (self.q_proj(x), self.k_proj(x))
        q, k = q.view(-1, self.heads, self.d).transpose(0, 1), k.view(-1, self.key_heads, self.d).transpose(0, 1)
        return q @ k.repeat_interleave(self.heads // self.key_heads, 0).mT


LAYERS = {
    "separate": ((4, 4, 4, False), nw.qk_clip(2.0, query="*q_proj.*", key="*k_proj.*", heads=4)),
    "grouped": ((4, 2, 4, False), nw.qk_clip(2.0, query="*q_proj.*", heads=4, key_heads=2)),
    "one key": ((4, 1, 4, False), nw.qk_clip(2.0, query="*q_proj.*", key="*k_proj.*", heads=4, key_heads=1)),
    "fused": ((4, 4, 4, True), nw.qk_clip(2.0, params="*c_attn.*", heads=(3, 4))),
}


@pytest.mark.parametrize("where", ["name", "module", "layer"])
@pytest.mark.parametrize("which", LAYERS)
def test_qk_clip_of_separate_grouped_and_fused_layers(which, where):
    arguments, rule = LAYERS[which]
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([Attention(*arguments), Attention(*arguments)])}).to(F64)
    x = 2 * torch.randn(10, 8, dtype=F64)
    first, other = model["blocks"]
    before, untouched = first.logits(x).detach(), copy.deepcopy(other.state_dict())
    maxima = before.flatten(1).max(1).values
    assert int((maxima > 2.0).sum()) > 0
    opt = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, opt, rule)
    layer = "blocks.0.c_attn" if which == "fused" else "blocks.0.q_proj"
    attention = {"name": "blocks.0", "module": first, "layer": layer}[where]
    if where == "layer" and which == "separate":
        control.report_max_logits("blocks.0.k_proj", maxima)
    control.report_max_logits(attention, maxima / 2)
    control.report_max_logits(attention, maxima)    # of several, the larger
    control.report_max_logits(attention, maxima / 3)
    still(model, opt)
    gamma = (2.0 / maxima).clamp(max=1)
    torch.testing.assert_close(first.logits(x).detach(), before * gamma[:, None, None], rtol=1e-11, atol=1e-12)
    assert str(other.state_dict()) == str(untouched), "the other attention was not reported"


def test_a_report_that_fits_nothing_is_refused():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(12, 3), "out": nn.Linear(12, 2)})
    opt = SGD(model.parameters(), lr=0.1)
    with pytest.raises(nw.PolicyError, match="no rule asks for attention logits"):
        nw.attach(model, opt, nw.max_norm(3.0)).report_max_logits("attn", torch.ones(3))
    control = nw.attach(model, opt, nw.qk_clip())
    with pytest.raises(nw.PolicyError, match=r"scales nothing in 'atn'. Did you mean 'attn'"):
        control.report_max_logits("atn", torch.ones(3))
    with pytest.raises(nw.PolicyError, match="scales nothing in 'a Linear outside of the model'"):
        control.report_max_logits(nn.Linear(2, 2), torch.ones(3))
    with pytest.raises(nw.PolicyError, match=r"have the shape \(4,\), but 'attn.in_proj_weight' has 3 heads"):
        control.report_max_logits("attn", torch.ones(4))
    for bad in (torch.full((3,), math.inf), torch.full((3,), math.nan), -torch.ones(3), torch.zeros(3)):
        before = model["attn"].in_proj_weight.detach().clone()
        control.report_max_logits("attn", bad)
        still(model, opt)
        assert torch.equal(model["attn"].in_proj_weight, before)
    with pytest.raises(nw.LayoutError, match=r"no heads=5"):
        nw.attach(model, opt, nw.qk_clip(params="out.weight", heads=5))
    with pytest.raises(nw.LayoutError, match="has no head axis"):
        nw.attach(model, opt, nw.qk_clip(params="out.weight"))


def test_heads_of_a_plain_linear_are_blocks_of_any_rule():
    model = nn.Sequential(nn.Linear(6, 8, bias=False)).to(F64)
    opt = SGD(model.parameters(), lr=0.1)
    control = nw.attach(model, opt, nw.Rule(action="normalize", radius=2.0, per="head", heads=4))
    still(model, opt)
    torch.testing.assert_close(model[0].weight.view(4, -1).norm(dim=1), torch.full((4,), 2.0, dtype=F64))
    assert control.verify().blocks == 4


