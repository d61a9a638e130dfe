"""Steps by a parameter's part in the model: ``role_factors``, and ``auto``, which asks the model for everything else too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from attention_cases import F64, WIDTH, Model, Parts, Recurrent, Separate, grads
from normwise.errors import PolicyError
from normwise.optim import NormOptimizer, Ridge, auto, role_factors


def test_role_factors_are_for_what_the_model_has_and_trains() -> None:
    fused = Model(nn.MultiheadAttention(WIDTH, 2))
    assert role_factors(fused) == {"attention:ov": 0.5, "attention.in_proj_weight": (3.0, 3.0, 0.5)}
    assert role_factors(Model(Separate(nn.MultiheadAttention(WIDTH, 2, dtype=F64)))) == {"attention:qk": 3.0, "attention:ov": 0.5}
    assert role_factors(Recurrent()) == {"role:head": 3.0}
    assert role_factors(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2))) == {}
    unknown = Parts(c_attn=nn.Linear(WIDTH, 3 * WIDTH), c_proj=nn.Linear(WIDTH, WIDTH))
    assert role_factors(unknown) == {"attention:ov": 0.5}    # q, k and v in one matrix that nobody has told apart
    frozen = Recurrent()
    frozen.head.requires_grad_(False)
    assert role_factors(frozen) == {}
    for model in (fused, Recurrent(), unknown):
        Ridge(model, override=role_factors(model))    # every selector matches


def test_auto_is_the_rows_that_its_page_names() -> None:
    """Against groups written out by hand: the same step, the same state."""
    torch.manual_seed(5)
    model = Model(Separate(nn.MultiheadAttention(WIDTH, 2, dtype=F64)))
    by_hand = copy.deepcopy(model)
    factors = {"attention.q": 3.0, "attention.k": 3.0, "attention.v": 0.5, "attention.out": 0.5, "up": 1.0}
    named = dict(by_hand.named_parameters())
    ridge = {"direction": "ema_nesterov", "momentum": 0.8, "act": "ridge", "damping": 0.03, "scale": "normuon", "weight_decay": 0.3}
    adam = {"lr": 0.016, "direction": "adam", "betas": (0.9, 0.99)}
    groups: list[dict[str, Any]] = [{**ridge, "lr": 0.028, "radius": f, "params": [named[f"{name}.weight"]]} for name, f in factors.items()]
    groups += [{**adam, "weight_decay": 0.1, "params": [named["head.weight"]]}]
    groups += [{**adam, "params": [named["up.bias"], named["head.bias"]]}]
    optimizers = [auto(model), NormOptimizer(groups, {"main": {}}, {}, "main")]
    for seed in range(3):
        for m, optimizer in zip((model, by_hand), optimizers, strict=True):
            grads(m, seed)
            optimizer.step()
    for (name, a), b in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


def rates(model: nn.Module, **given: Any) -> dict[str, tuple[float, float, float]]:
    """Rate, factor and decay of every parameter under auto."""
    return {name: (g["lr"], g["radius"], g["weight_decay"]) for g in auto(model, **given).param_groups for name in g["param_names"]}


def test_auto_over_gates() -> None:
    recurrent = rates(Recurrent())
    assert recurrent["tokens.weight"] == (0.016, 1.0, 0.1) and recurrent["head.weight"] == (0.016, 3.0, 0.1)
    assert recurrent["lstm.weight_hh_l0"] == (0.04, 1.0, 0.1) and recurrent["head.bias"] == (0.016, 1.0, 0.0)
    gates = next(g for g in auto(Recurrent()).param_groups if "lstm.weight_ih_l0" in g["param_names"])
    assert (gates["momentum"], gates["damping"]) == (0.85, 1.0)


def test_auto_over_convolutions_with_and_without_normalisation() -> None:
    def images(*norm: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), *norm, nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2))

    assert rates(images()) == {
        "0.weight": (0.02, 1.0, 0.3), "0.bias": (0.016, 1.0, 0.0), "2.weight": (0.028, 1.0, 0.3), "2.bias": (0.016, 1.0, 0.0),
        "3.weight": (0.016, 1.0, 1.0), "3.bias": (0.016, 1.0, 0.0),
    }  # fmt: skip
    normalised = rates(images(nn.BatchNorm2d(4)))
    assert normalised["0.weight"] == (0.04, 1.0, 0.3) and normalised["4.weight"] == (0.008, 1.0, 1.0)
    assert normalised["1.weight"] == (0.008, 1.0, 0.0) and normalised["3.weight"] == (0.028, 1.0, 0.3)
    dampings = [
        next(g["damping"] for g in auto(images(*norm)).param_groups if "0.weight" in g["param_names"]) for norm in ([], [nn.BatchNorm2d(4)])
    ]
    assert dampings == [0.03, 0.1]


def test_a_frozen_normalisation_layer_is_one_all_the_same() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    whole = rates(model)
    model[1].requires_grad_(False)
    assert rates(model) == {name: rate for name, rate in whole.items() if not name.startswith("1.")}


def test_columns_by_role_lie_over_those_of_the_roles_row() -> None:
    optimizer = Ridge(Recurrent(), by_role={"recurrent": {"damping": 0.5}, "head": {"weight_decay": 0.7}, "bias": {"lr": 0.001}})
    rows = {name: g for g in optimizer.param_groups for name in g["param_names"]}
    gates, head, bias = rows["lstm.weight_hh_l0"], rows["head.weight"], rows["head.bias"]
    assert (gates["damping"], gates["momentum"], gates["act"], gates["weight_decay"]) == (0.5, 0.9, "ridge", 0.3)
    assert (head["weight_decay"], head["lr"], head["act"]) == (0.7, 0.008, "none")
    assert (bias["lr"], bias["weight_decay"]) == (0.001, 0.0)
    with pytest.raises(PolicyError, match=r"by_role has columns for 'gates', which is no role"):
        Ridge(Recurrent(), by_role={"gates": {}})
    with pytest.raises(PolicyError, match="dampin"):
        Ridge(Recurrent(), by_role={"recurrent": {"dampin": 1.0}})


def test_auto_decays_a_head_more_over_nothing_but_convolutions() -> None:
    looking = nn.Sequential(nn.Conv2d(1, WIDTH, 1), nn.MultiheadAttention(WIDTH, 2), nn.Linear(WIDTH, 2))
    assert rates(looking)["2.weight"] == (0.016, 1.0, 0.1)


def test_the_users_override_acts_after_autos() -> None:
    assert rates(Recurrent(), override={"role:head": 2.0})["head.weight"] == (0.016, 2.0, 0.1), "in the place of the same selector"
    assert rates(Recurrent(), override={"head.weight": 2.0})["head.weight"] == (0.016, 6.0, 0.1)
    assert rates(Recurrent(), override={"role:head": "adamw_undecayed"})["head.weight"] == (0.016, 1.0, 0.0)
    plain = auto([nn.Parameter(torch.ones(3, 2))]).param_groups[0]
    assert (plain["lr"], plain["act"]) == (0.028, "ridge")
