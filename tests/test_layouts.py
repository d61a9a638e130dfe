"""Blocks are what the module's forward pass uses: a unit whose block is zero gives a zero output, and so on for inputs and heads."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from normwise.errors import LayoutError
from normwise.parameters.layouts import BlockView, Layout, block_view, layout_of


class Conv1D(nn.Module):
    """Hugging Face's GPT-2 layer: a Linear that stores its weight (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def view_of(module: nn.Module, name: str, per: str, *, matrix: bool = False, parent: nn.Module | None = None) -> BlockView:
    return block_view(layout_of(module, name, getattr(module, name), parent), per, matrix, name=name)


def with_zero_block(module: nn.Module, name: str, per: str, index: int) -> nn.Module:
    """A copy of the module in which one block is zero, written through the view."""
    module = copy.deepcopy(module)
    t, view = getattr(module, name).detach(), view_of(module, name, per)
    blocks = view.blocks(t).clone()
    blocks[index] = 0
    view.write_(t, blocks)
    return module


CHANNEL_MODULES = {
    "linear": (lambda: nn.Linear(5, 7, bias=False), (3, 5)),
    "hf-conv1d": (lambda: Conv1D(7, 5), (3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, bias=False), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), bias=False), (2, 4, 7, 8)),
    "conv2d-grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 7, 8)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (2, 4, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2, groups=2, bias=False), (2, 4, 5, 6, 4)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, bias=False), (2, 4, 9)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, bias=False), (2, 4, 7, 8)),
    "transposed2d-grouped": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), groups=2, bias=False), (2, 4, 7, 8)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, 2, groups=2, bias=False), (2, 4, 5, 6, 4)),
    "lazy-conv2d": (lambda: nn.LazyConv2d(6, 3, groups=2, bias=False), (2, 4, 7, 8)),
}


def channels(module: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, int]:
    """Input, output, and the axis of the channels in both."""
    x = torch.randn(shape)
    return x, module(x), 1 if len(shape) > 2 else -1


@pytest.mark.parametrize("kind", CHANNEL_MODULES)
def test_a_unit_is_what_one_output_channel_uses(kind: str) -> None:
    torch.manual_seed(0)
    make, shape = CHANNEL_MODULES[kind]
    module = make()
    x, before, axis = channels(module, shape)
    assert view_of(module, "weight", "unit").count == before.shape[axis]
    for unit in range(before.shape[axis]):
        expected = before.clone()
        expected.select(axis, unit).zero_()
        torch.testing.assert_close(with_zero_block(module, "weight", "unit", unit)(x), expected)


@pytest.mark.parametrize("kind", CHANNEL_MODULES)
def test_an_input_block_is_what_one_input_channel_feeds(kind: str) -> None:
    torch.manual_seed(0)
    make, shape = CHANNEL_MODULES[kind]
    module = make()
    x, _, axis = channels(module, shape)
    assert view_of(module, "weight", "input").count == x.shape[axis]
    for channel in range(x.shape[axis]):
        silent = x.clone()
        silent.select(axis, channel).zero_()
        torch.testing.assert_close(with_zero_block(module, "weight", "input", channel)(x), module(silent))


@pytest.mark.parametrize("kind", CHANNEL_MODULES)
def test_matrices_are_outputs_by_inputs(kind: str) -> None:
    torch.manual_seed(0)
    make, shape = CHANNEL_MODULES[kind]
    module = make()
    _, y, axis = channels(module, shape)
    groups = getattr(module, "groups", 1)
    weight = module.weight.detach()
    view = view_of(module, "weight", "matrix", matrix=True)
    assert view.count == groups
    assert view.block_shape == (y.shape[axis] // groups, weight.numel() // y.shape[axis])
    whole = view_of(module, "weight", "tensor", matrix=True)
    assert (whole.count, math.prod(whole.block_shape)) == (1, weight.numel())
    units = view_of(module, "weight", "unit").blocks(weight)
    torch.testing.assert_close(view.blocks(weight).norm(dim=2).flatten(), units.norm(dim=1))


def test_transposed_grouped_units_are_these_slices() -> None:
    weight = torch.randn(4, 3, 3, 3)  # (in, out per group, kernel): output 4 is entry 1 of group 1, fed by inputs 2 and 3
    module = nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False)
    units = block_view(layout_of(module, "weight", weight), "unit", False).blocks(weight)
    torch.testing.assert_close(units[4], weight[2:4, 1].flatten())


def test_bilinear_units_and_inputs() -> None:
    torch.manual_seed(0)
    module = nn.Bilinear(3, 4, 5, bias=False)
    x, y = torch.randn(6, 3), torch.randn(6, 4)
    expected = module(x, y)
    expected[:, 2] = 0
    torch.testing.assert_close(with_zero_block(module, "weight", "unit", 2)(x, y), expected)
    lonely = torch.zeros(1, 3).index_fill(1, torch.tensor([2]), 1.0), torch.zeros(1, 4).index_fill(1, torch.tensor([1]), 1.0)
    assert with_zero_block(module, "weight", "input", 2 * 4 + 1)(*lonely).abs().max() == 0
    assert with_zero_block(module, "weight", "input", 2 * 4)(*lonely).abs().max() > 0


@pytest.mark.parametrize("make", [lambda: nn.Embedding(7, 3), lambda: nn.EmbeddingBag(7, 3, mode="sum")])
def test_an_embedding_unit_is_a_token(make) -> None:
    torch.manual_seed(0)
    module = make()
    tokens = torch.arange(7).reshape(7, 1)
    expected = module(tokens).clone()
    expected[4] = 0
    torch.testing.assert_close(with_zero_block(module, "weight", "unit", 4)(tokens), expected)


RECURRENT = {
    "rnn": (lambda: nn.RNN(3, 5, bias=False), 1, "weight_ih_l0", "weight_hh_l0"),
    "gru": (lambda: nn.GRU(3, 5, bias=False), 3, "weight_ih_l0", "weight_hh_l0"),
    "lstm": (lambda: nn.LSTM(3, 5, bias=False), 4, "weight_ih_l0", "weight_hh_l0"),
    "rnn-cell": (lambda: nn.RNNCell(3, 5, bias=False), 1, "weight_ih", "weight_hh"),
    "gru-cell": (lambda: nn.GRUCell(3, 5, bias=False), 3, "weight_ih", "weight_hh"),
    "lstm-cell": (lambda: nn.LSTMCell(3, 5, bias=False), 4, "weight_ih", "weight_hh"),
}


def run_recurrent(module: nn.Module, x: Tensor) -> Tensor:
    out = module(x[0] if isinstance(module, nn.RNNCellBase) else x)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_inputs(kind: str) -> None:
    torch.manual_seed(0)
    make, gates, name, _ = RECURRENT[kind]
    module, x = make(), torch.randn(4, 2, 3)
    view = view_of(module, name, "input")
    assert (view.count, view.block_shape) == (gates * 3, (5,))
    for channel in range(3):
        silenced = module
        for gate in range(gates):
            silenced = with_zero_block(silenced, name, "input", gate * 3 + channel)
        silent = x.clone()
        silent[..., channel] = 0
        torch.testing.assert_close(run_recurrent(silenced, x), run_recurrent(module, silent))


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_matrices_are_the_gates(kind: str) -> None:
    torch.manual_seed(0)
    make, gates, ih, hh = RECURRENT[kind]
    module = make()
    for name, columns in ((ih, 3), (hh, 5)):
        weight = getattr(module, name).detach()
        view = view_of(module, name, "matrix", matrix=True)
        assert (view.count, view.block_shape) == (gates, (5, columns))
        torch.testing.assert_close(view.blocks(weight), torch.stack(weight.chunk(gates)))
        assert view_of(module, name, "unit").count == gates * 5


def test_an_lstm_unit_is_one_row_of_one_gate() -> None:
    torch.manual_seed(0)
    module, x = nn.LSTM(3, 5, bias=False), torch.randn(6, 2, 3)
    cell_gate = 2 * 5 + 3  # gates are i, f, g, o: with g of unit 3 zero its cell stays zero, and so does its output
    silenced = with_zero_block(with_zero_block(module, "weight_ih_l0", "unit", cell_gate), "weight_hh_l0", "unit", cell_gate)
    units = silenced(x)[0].abs().amax(dim=(0, 1))
    assert (units == 0).tolist() == [False, False, False, True, False]


def test_lstm_projection_and_biases() -> None:
    module = nn.LSTM(3, 5, proj_size=2, bidirectional=True, num_layers=2)
    assert layout_of(module, "weight_hr_l1_reverse", module.weight_hr_l1_reverse) == Layout("oi", (2, 5))
    assert layout_of(module, "weight_hh_l0", module.weight_hh_l0) == Layout("soi", (4, 5, 2))
    assert layout_of(module, "weight_ih_l1_reverse", module.weight_ih_l1_reverse) == Layout("soi", (4, 5, 4))
    assert layout_of(module, "bias_ih_l0", module.bias_ih_l0) == Layout("so", (4, 5))


def attend(module: nn.MultiheadAttention, x: Tensor, values: Tensor) -> Tensor:
    return module(x, x, values, need_weights=False)[0]


@pytest.mark.parametrize("separate", [False, True])
def test_attention_heads(separate: bool) -> None:
    """Without a head's values its output is zero, and so without its columns of the output projection."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(6, 3, bias=False, vdim=4 if separate else None)
    x, values = torch.randn(5, 2, 6), torch.randn(5, 2, 4 if separate else 6)
    for head in range(3):
        if separate:
            silenced = with_zero_block(module, "v_proj_weight", "head", head)
        else:
            silenced = with_zero_block(module, "in_proj_weight", "head", 2 * 3 + head)
        output = copy.deepcopy(module)
        weight = output.out_proj.weight.detach()
        view = view_of(output.out_proj, "weight", "head", parent=output)
        blocks = view.blocks(weight).clone()
        blocks[head] = 0
        view.write_(weight, blocks)
        torch.testing.assert_close(attend(silenced, x, values), attend(output, x, values))
        assert (attend(output, x, values) - attend(module, x, values)).abs().max() > 1e-3


def test_attention_blocks_by_hand() -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(6, 3, add_bias_kv=True)
    weight = module.in_proj_weight.detach()
    heads = view_of(module, "in_proj_weight", "head", matrix=True).blocks(weight)
    assert heads.shape == (9, 2, 6)
    torch.testing.assert_close(heads[3 + 2], weight[6 + 4 : 6 + 6])  # head 2 of the keys
    stack = view_of(module, "in_proj_weight", "matrix", matrix=True).blocks(weight)
    torch.testing.assert_close(stack, torch.stack(weight.chunk(3)))
    inputs = view_of(module, "in_proj_weight", "input").blocks(weight)
    torch.testing.assert_close(inputs[6 + 1], weight[6:12, 1])  # what input 1 feeds in the keys
    bias = module.in_proj_bias.detach().copy_(torch.arange(18.0))
    torch.testing.assert_close(view_of(module, "in_proj_bias", "head").blocks(bias)[5], torch.tensor([10.0, 11.0]))
    assert view_of(module, "bias_k", "head").block_shape == (2,)
    with pytest.raises(LayoutError, match="spectral rule on a bias"):
        view_of(module, "bias_k", "tensor", matrix=True)
    projection = view_of(module.out_proj, "weight", "head", matrix=True, parent=module)
    out = module.out_proj.weight.detach()
    torch.testing.assert_close(projection.blocks(out), torch.stack(out.chunk(3, dim=1)))
    assert layout_of(module.out_proj, "weight", out) == Layout("oi", (6, 6))


@pytest.mark.parametrize(
    "module", [nn.BatchNorm2d(6), nn.LayerNorm(6), nn.LayerNorm((2, 3)), nn.GroupNorm(2, 6), nn.RMSNorm((2, 3)), nn.PReLU(6)]
)
def test_gains_are_one_number_per_unit(module: nn.Module) -> None:
    for name, value in module.named_parameters():
        view = view_of(module, name, "unit")
        assert (view.count, view.block_shape) == (6, (1,))
        torch.testing.assert_close(view.blocks(value.detach()).flatten(), value.detach().flatten())
        with pytest.raises(LayoutError, match="spectral rule on a bias"):
            view_of(module, name, "tensor", matrix=True)
