"""Laws of the block views, and parameters whose axes nobody stated. What a block means is checked in test_layouts.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from normwise.errors import LayoutError
from normwise.parameters.layouts import PER, BlockView, Layout, block_view, layout_of, register_layout

TENSORS = {
    "contiguous": lambda: torch.randn(6, 4, 3, 3),
    "channels-last": lambda: torch.randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last),
    "sliced": lambda: torch.randn(12, 8, 3, 6)[::2, ::2, :, ::2],
    "permuted": lambda: torch.randn(3, 4, 6, 3).permute(2, 1, 0, 3),
    "expanded": lambda: torch.randn(6, 1, 3, 3).expand(6, 4, 3, 3),
    "no-outputs": lambda: torch.randn(0, 4, 3, 3),
}
LAYOUTS = {
    "plain": Layout("oikk", (6, 4, 3, 3)),
    "groups": Layout("soikk", (2, 3, 4, 3, 3)),
    "heads": Layout("sehHoikk", (1, 1, 2, 3, 1, 4, 3, 3)),
    "transposed": Layout("iHohe", (3, 2, 4, 3, 3)),
    "experts": Layout("eokik", (2, 3, 4, 3, 3)),
}
CASES = [(per, matrix) for per in PER for matrix in (False, True)]


def possible(layout: Layout, per: str, matrix: bool) -> BlockView | None:
    try:
        return block_view(layout, per, matrix)
    except LayoutError:
        return None


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("axes", LAYOUTS)
def test_views_hold_every_entry_once_and_write_it_back(kind: str, axes: str) -> None:
    torch.manual_seed(0)
    t, layout = TENSORS[kind](), LAYOUTS[axes]
    if t.numel() == 0:
        layout = Layout("oikk", tuple(t.shape))
    views = [view for per, matrix in CASES if (view := possible(layout, per, matrix))]
    assert len(views) >= 6
    for view in views:
        opened, blocks = view.open(t), view.blocks(t)
        assert opened.shape == view.shape and opened.data_ptr() == t.data_ptr()
        assert blocks.shape == (view.count, *view.block_shape)
        assert torch.equal(blocks.flatten().sort().values, t.flatten().sort().values)
        target = torch.full_like(t, torch.nan, memory_format=torch.preserve_format)
        view.write_(target, blocks)
        assert torch.equal(target, t)


def test_open_writes_through_for_every_stride() -> None:
    for kind in ("contiguous", "channels-last", "sliced", "permuted"):
        t = TENSORS[kind]()
        block_view(LAYOUTS["heads"], "unit", False).open(t)[...] = 7
        assert (t == 7).all()


@pytest.mark.parametrize("axes", LAYOUTS)
def test_expand_scales_each_block_by_its_own_value(axes: str) -> None:
    torch.manual_seed(0)
    t = TENSORS["channels-last"]()
    seen = 0
    for per, matrix in CASES:
        if view := possible(LAYOUTS[axes], per, matrix):
            values = torch.randn(view.count)
            expected = view.blocks(t) * values.reshape(-1, *[1] * len(view.block_shape))
            scaled = t.clone()
            view.open(scaled).mul_(view.expand(values))
            assert torch.equal(view.blocks(scaled), expected)
            seen += 1
    assert seen >= 6


def test_views_compare_by_value_and_round_to_the_tensor_dtype() -> None:
    layout = Layout("oi", (3, 4))
    assert block_view(layout, "unit", False) == block_view(layout, "unit", False)
    assert len({block_view(layout, per, False) for per in ("unit", "input", "tensor", "global")}) == 3
    t = torch.zeros(3, 4, dtype=torch.bfloat16)
    block_view(layout, "unit", False).write_(t, torch.full((3, 4), 1.003))
    assert (t == 1).all()


def test_tensor_and_global_and_element() -> None:
    layout = Layout("soi", (2, 3, 4))
    assert block_view(layout, "tensor", True).block_shape == (6, 4)
    assert block_view(layout, "global", False).block_shape == (24,)
    view = block_view(layout, "element", False)
    assert (view.count, view.block_shape) == (24, (1,))


def test_experts_and_their_matrices() -> None:
    t = torch.randn(3, 4, 5)
    view = block_view(Layout("eio", (3, 4, 5)), "expert", True)
    torch.testing.assert_close(view.blocks(t), t.transpose(1, 2))
    assert block_view(Layout("eio", (3, 4, 5)), "unit", False).count == 15


# ------------------------------------------------------------------------------------------------------------- unknown axes


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 5))
        self.scale = nn.Parameter(torch.tensor(1.0))


def test_a_bare_parameter_is_not_guessed() -> None:
    module = Experts()
    layout = layout_of(module, "weight", module.weight)
    assert layout == Layout("oik", (3, 4, 5), certain=False)
    for per in ("unit", "input", "head", "expert", "matrix"):
        with pytest.raises(LayoutError, match=r"register_layout\(Experts, .*eoi.*register_layout\(Experts, .*eio"):
            block_view(layout, per, False, name="experts.weight")
    with pytest.raises(LayoutError, match=r"layout=nw\.Layout"):
        block_view(layout, "tensor", True)
    for per in ("tensor", "global", "element"):
        assert block_view(layout, per, False).count in (1, 60)


def test_two_bare_dimensions_have_a_spectral_norm_but_no_units() -> None:
    layout = layout_of(nn.Module(), "w", torch.randn(3, 4))
    assert block_view(layout, "tensor", True).block_shape == (3, 4)
    with pytest.raises(LayoutError, match="Nothing states"):
        block_view(layout, "tensor", True, oriented=True)
    assert block_view(Layout("oi", (3, 4)), "tensor", True, oriented=True).block_shape == (3, 4)


def test_scalars_and_empty_parameters() -> None:
    module = Experts()
    layout = layout_of(module, "scale", module.scale)
    assert layout == Layout("o", (1,))
    view = block_view(layout, "unit", False)
    view.write_(module.scale.detach(), torch.tensor([[5.0]]))
    assert module.scale.item() == 5.0
    for empty in (torch.empty(0), torch.empty(0, 3), torch.empty(3, 0)):
        layout = layout_of(nn.Linear(3, 3), "weight" if empty.ndim == 2 else "bias", empty)
        assert block_view(layout, "unit", False).blocks(empty).numel() == 0


def test_registered_layouts_are_inherited_and_the_latest_wins() -> None:
    class Base(Experts):
        pass

    class Child(Base):
        pass

    module = Child()
    register_layout(Base, lambda m, name, t: Layout("eio", tuple(t.shape)) if name == "weight" else None)
    assert layout_of(module, "weight", module.weight).axes == "eio"
    register_layout(Base, lambda m, name, t: Layout("eoi", tuple(t.shape)) if t.shape[0] == 3 else None)
    assert layout_of(module, "weight", module.weight).axes == "eoi"
    assert layout_of(module, "weight", torch.randn(2, 2, 2)).axes == "eio"  # None leaves it to the earlier one
    register_layout(Child, lambda m, name, t: Layout("oi", (12, 5)) if name == "weight" else None)
    with pytest.raises(LayoutError, match="does not fit"):
        layout_of(module, "weight", module.weight)
    assert not layout_of(Experts(), "weight", module.weight).certain


@pytest.mark.parametrize(
    ("fine", "coarse", "fits"),
    [
        ((2, 3, 4), (6, 4), True),
        ((6, 4), (6, 4), True),
        ((1, 6, 1, 4), (6, 4), True),
        ((1,), (), True),
        ((3, 2, 4), (2, 12), False),
        ((24,), (6, 4), False),
        ((6, 4, 2), (6, 4), False),
        ((6,), (6, 4), False),
        ((2, 0), (0,), True),
    ],
)
def test_a_layout_splits_and_never_merges(fine: tuple[int, ...], coarse: tuple[int, ...], fits: bool) -> None:
    layout = Layout("oikkk"[: len(fine)], fine)
    if fits:
        assert layout.check(coarse) is layout
    else:
        with pytest.raises(LayoutError, match="does not fit"):
            layout.check(coarse)


@pytest.mark.parametrize(("axes", "shape"), [("ox", (1, 2)), ("ss", (1, 2)), ("oi", (1,)), ("", ())])
def test_layouts_that_mean_nothing(axes: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError):
        Layout(axes, shape)


def test_errors_name_the_parameter_and_the_way_out() -> None:
    linear = Layout("oi", (3, 4))
    with pytest.raises(LayoutError, match=r"'fc.weight'.*Layout\(\"hoi\""):
        block_view(linear, "head", False, name="fc.weight")
    with pytest.raises(LayoutError, match=r"'fc.weight'.*Layout\(\"eoi\""):
        block_view(linear, "expert", True, name="fc.weight")
    with pytest.raises(LayoutError, match="no singular values"):
        block_view(linear, "unit", True)
    with pytest.raises(LayoutError, match="'unit'"):
        block_view(linear, "units", False)
    with pytest.raises(LayoutError, match="no input axis"):
        block_view(Layout("o", (3,)), "input", False)


def test_a_lazy_parameter_asks_for_a_forward_pass() -> None:
    module = nn.LazyLinear(3)
    with pytest.raises(LayoutError, match="forward pass"):
        layout_of(module, "weight", module.weight)


def test_parametrizations_of_torch_keep_the_axes() -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3, groups=2))
    owner = conv.parametrizations["weight"]
    assert layout_of(owner, "original1", owner.original1, conv) == Layout("soikk", (2, 3, 2, 3, 3))
    assert layout_of(owner, "original0", owner.original0, conv) == Layout("soikk", (2, 3, 1, 1, 1))
    assert not layout_of(owner, "original1", owner.original1).certain

    class Flip(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.T

        def right_inverse(self, x: Tensor) -> Tensor:
            return x.T

    linear = nn.Linear(3, 3)
    nn.utils.parametrize.register_parametrization(linear, "weight", Flip())
    owner = linear.parametrizations["weight"]
    assert not layout_of(owner, "original", owner.original, linear).certain


def test_pruned_and_flattened_weights() -> None:
    pruned = prune.random_unstructured(nn.Linear(4, 3), "weight", amount=2)
    assert layout_of(pruned, "weight_orig", pruned.weight_orig) == Layout("oi", (3, 4))
    assert not layout_of(nn.Linear(4, 3), "weight", torch.randn(12)).certain
