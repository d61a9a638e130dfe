"""Removing zero units: outputs against the full model's, counts against those worked out by hand, and what must stay."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normwise as nw
from normwise.errors import MissingExtraError, NormwiseError, StudyError
from normwise.experiments.tasks.models.cnn import CNN
from normwise.experiments.tasks.models.resnet import ResNet
from normwise.prune import cut, shrink

IMAGES = torch.zeros(1, 1, 8, 8)
COLOURS = torch.zeros(2, 3, 8, 8)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Float64, evaluation mode, every weight, bias, gain, shift and running statistic away from its default."""
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(0.3, 0.5, generator=generator)
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
    return model


def images(shape: tuple[int, ...], count: int = 5) -> Tensor:
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def furthest(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    return float((a(x) - b(x)).abs().max())


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def zero(model: nn.Module, name: str, units: list[int]) -> None:
    with torch.no_grad():
        model.get_parameter(name)[units] = 0


def small_cnn() -> nn.Module:
    """8 and 12 channels on 8×8 images: kernels 3 and 2, so that the head reads one pixel of each channel of conv2."""
    return randomised(CNN((1, 8, 8), 10, (8, 12)))


# ------------------------------------------------------------------------------------------------------- plain networks


def test_the_cnn_without_its_zero_units_gives_the_same_outputs():
    full = small_cnn()
    zero(full, "conv1.weight", [1, 5])  # their biases stay: relu(bias) is what must move
    zero(full, "conv2.weight", [0, 3, 7])
    assert (full.conv1.bias[[1, 5]] > 0.1).any()
    small, report = shrink(full, IMAGES)
    assert furthest(full, small, images((1, 8, 8))) < 1e-6
    assert count(small) == (6 * 9 + 6) + (9 * 6 * 4 + 9) + (10 * 9 + 10) == report.parameters[1]
    assert report.parameters[0] == (8 * 9 + 8) + (12 * 8 * 4 + 12) + (10 * 12 + 10)
    assert report.removed == {"conv1": (1, 5), "conv2": (0, 3, 7)}
    assert report.units == {"conv1": (8, 6), "conv2": (12, 9)}
    assert report.exact and report.difference < 1e-12 and report.kept == {}
    assert "conv1: 8 units, now 6" in str(report)


def test_the_constants_are_needed():
    """Cutting the same units without moving what they give changes the outputs: the test above can fail."""
    full = small_cnn()
    zero(full, "conv1.weight", [1, 5])
    assert furthest(full, cut(full, IMAGES, {"conv1": [1, 5]}), images((1, 8, 8))) > 1e-3


def test_a_flattened_image_loses_all_pixels_of_its_channel():
    full = randomised(CNN((1, 28, 28), 10, (3, 4)))
    zero(full, "conv2.weight", [2])
    small, report = shrink(full, torch.zeros(1, 1, 28, 28))
    assert small.head.weight.shape == (10, 3 * 16)
    assert furthest(full, small, images((1, 28, 28))) < 1e-6 and report.exact


def test_zeros_of_the_prox_are_removed():
    """Units are counted here from the weights alone; the task is to tell ten noisy patterns apart."""
    torch.manual_seed(0)
    full = CNN((1, 8, 8), 10, (8, 12))
    for layer in (full.conv1, full.conv2, full.head):
        layer.reset_parameters()
    optimizer = torch.optim.SGD(full.parameters(), lr=0.1)
    nw.attach(full, optimizer, nw.group_lasso(0.08, params=["conv1.weight", "conv2.weight"]))
    patterns = torch.randn(10, 1, 8, 8)
    for _ in range(200):
        labels = torch.randint(10, (32,))
        optimizer.zero_grad()
        F.cross_entropy(full(patterns[labels] + 0.3 * torch.randn(32, 1, 8, 8)), labels).backward()
        optimizer.step()
    zeros = {name: int((full.get_parameter(f"{name}.weight").flatten(1).norm(dim=1) == 0).sum()) for name in ("conv1", "conv2")}
    assert 0 < zeros["conv1"] < 8 and 0 < zeros["conv2"] < 12
    small, report = shrink(full, IMAGES)
    assert {name: was - now for name, (was, now) in report.units.items()} == zeros
    assert report.exact and furthest(full.double(), small.double(), images((1, 8, 8))) < 1e-6


def test_without_zeros_nothing_changes():
    full = small_cnn()
    small, report = shrink(full, IMAGES)
    assert report.units == {} == report.removed == report.kept and report.parameters[0] == report.parameters[1]
    assert report.difference == 0 and "nothing was removed" in str(report)
    for name, tensor in full.state_dict().items():
        assert torch.equal(tensor, small.state_dict()[name])


def test_units_that_nobody_reads_go_and_take_with_them_what_only_they_read():
    full = randomised(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)))
    with torch.no_grad():
        full[4].weight[:, [0, 1]] = 0  # nobody reads units 0 and 1 of the second layer,
        full[2].weight[2:, 4] = 0  # and only they read unit 4 of the first
    zero(full, "0.weight", [1])  # which goes at once, before unit 4 of the same layer does
    small, report = shrink(full, torch.zeros(1, 3))
    assert report.removed == {"2": (0, 1), "0": (1, 4)} and report.units == {"2": (5, 3), "0": (6, 4)}
    assert furthest(full, small, images((3,))) < 1e-12


def test_tokens_and_a_smooth_activation():
    full = randomised(nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)))
    zero(full, "0.weight", [2, 3])
    small, report = shrink(full, torch.zeros(2, 7, 4))
    assert report.units == {"0": (6, 4)} and furthest(full, small, images((7, 4))) < 1e-12


def test_a_reader_without_a_bias_gets_one_only_where_it_needs_it():
    full = randomised(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4, bias=False)))
    zero(full, "0.weight", [2, 3])
    with torch.no_grad():
        full[0].bias[[2, 3]] = -1.0
    small, _ = shrink(full, torch.zeros(1, 4))
    assert small[2].bias is None
    with torch.no_grad():
        full[0].bias[[2, 3]] = 1.0
    small, report = shrink(full, torch.zeros(1, 4))
    assert torch.allclose(small[2].bias, full[2].weight[:, [2, 3]].sum(1)) and report.exact
    assert furthest(full, small, images((4,))) < 1e-12


def test_tolerance_takes_short_rows_too_and_tells_what_it_costs():
    full = small_cnn()
    with torch.no_grad():
        full.conv1.weight[4] *= 1e-3 / full.conv1.weight[4].norm()
    assert shrink(full, IMAGES, tolerance=0.9e-3)[1].units == {}
    small, report = shrink(full, IMAGES, tolerance=1.1e-3)
    assert report.removed == {"conv1": (4,)} and not report.exact
    assert 1e-6 < report.difference < 0.1
    assert furthest(full, small, images((1, 8, 8))) < 10 * report.difference


# ---------------------------------------------------------------------------------------------------- residual networks


def residual() -> nn.Module:
    """Width 6, then 8: two blocks each, so that the stem and both second convolutions of the first stage write one group."""
    return randomised(ResNet(3, 10, (6, 8), depth=2))


def test_channels_joined_by_shortcuts_go_only_where_all_are_zero():
    full = residual()
    zero(full, "stem.weight", [1, 2, 3])
    for block, units in (("blocks.0", [1, 2]), ("blocks.1", [1, 2, 3])):
        zero(full, f"{block}.norm2.weight", units)
        zero(full, f"{block}.norm2.bias", units)
    before = count(full)
    small, report = shrink(full, COLOURS)
    assert report.removed == dict.fromkeys(("stem", "blocks.0.conv2", "blocks.1.conv2"), (1, 2)), "3 is alive in the first block"
    assert report.exact and furthest(full, small, images((3, 8, 8))) < 1e-6
    # each channel: 27 in the stem; in both blocks a row of 54 and gain and shift in conv2, 54 columns in conv1; in the third block
    # 8·9 columns in conv1 and 8 in the shortcut's 1×1
    rows = 27 + 2 * (54 + 2 + 54) + 72 + 8
    assert before - count(small) == 2 * rows


def test_channels_within_a_block_go_where_the_gain_is_zero():
    full = residual()
    zero(full, "blocks.0.norm1.weight", [0, 4])
    with torch.no_grad():
        full.blocks[0].norm1.bias[[0, 4]] = torch.tensor([0.0, -1.0], dtype=torch.float64)  # a ReLU makes nothing of both
    small, report = shrink(full, COLOURS)
    assert report.removed == {"blocks.0.conv1": (0, 4)} and report.kept == {}
    assert count(full) - count(small) == 2 * (54 + 2 + 54)
    x = images((3, 8, 8))
    assert furthest(full, small, x) < 1e-6
    full.train(), small.train()
    assert furthest(full, small, x) < 1e-6, "in training, on the batch's own statistics"


def test_a_zero_filter_gives_what_its_running_statistics_leave():
    """In evaluation shift − gain · mean / √(var + eps), here below zero for one channel and above for the other."""
    full = residual()
    zero(full, "blocks.0.conv1.weight", [0, 4])
    norm = full.blocks[0].norm1
    with torch.no_grad():
        norm.weight[[0, 4]], norm.running_mean[[0, 4]], norm.bias[[0, 4]] = 1.0, 2.0, torch.tensor([0.5, 9.0], dtype=torch.float64)
    small, report = shrink(full, COLOURS)
    assert report.removed == {"blocks.0.conv1": (0,)} and "padded with zeros" in report.kept["blocks.0.conv1"]
    assert furthest(full, small, images((3, 8, 8))) < 1e-6


def test_a_constant_before_zero_padding_stays_and_before_other_padding_moves():
    for mode, removed in (("zeros", {}), ("reflect", {"0": (1,)}), ("replicate", {"0": (1,)})):
        full = randomised(nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1, padding_mode=mode)))
        zero(full, "0.weight", [1])
        with torch.no_grad():
            full[0].bias[1] = 0.7
        small, report = shrink(full, IMAGES)
        assert report.removed == removed and bool(report.kept) == (mode == "zeros")
        assert furthest(full, small, images((1, 8, 8))) < 1e-12


def test_a_constant_before_a_batch_norm_moves_into_its_running_mean():
    full = randomised(nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 2)))  # fmt: skip
    zero(full, "0.weight", [2])
    with torch.no_grad():
        full[0].bias[2] = 0.7
    small, report = shrink(full, IMAGES)
    assert report.removed == {"0": (2,)} and small[2].bias is None
    assert not torch.allclose(small[3].running_mean, full[3].running_mean)
    x = images((1, 8, 8))
    assert furthest(full, small, x) < 1e-12
    full.train(), small.train()
    assert furthest(full, small, x) < 1e-12


# ------------------------------------------------------------------------------------------------------- what must stay


def test_a_layer_of_zeros_is_an_error_that_names_it():
    full = small_cnn()
    zero(full, "conv2.weight", list(range(12)))
    with pytest.raises(StudyError, match=r"every unit of conv2 is zero.*smaller strength"):
        shrink(full, IMAGES)


def test_beside_a_shortcut_a_layer_of_zeros_keeps_one_unit():
    full = residual()
    zero(full, "blocks.1.conv1.weight", list(range(6)))
    zero(full, "blocks.1.norm1.bias", list(range(6)))
    full.blocks[1].norm1.running_mean.zero_()
    small, report = shrink(full, COLOURS)
    assert report.units == {"blocks.1.conv1": (6, 1)} and "needs one" in report.kept["blocks.1.conv1"]
    assert furthest(full, small, images((3, 8, 8))) < 1e-6


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(F.relu(self.up(x)))))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("model", "zeroed", "example", "why"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), "0.weight", (1, 4), "passes through"),
        (lambda: nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1), nn.Linear(6, 2)), "0.weight", (1, 4), "passes through"),
        (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 3)), "0.weight 1.weight", (1, 1, 8, 8),
         "grouped"),
        (Shared, "up.weight", (1, 4), "called 2 times"),
        (tied, "0.weight", (1, 4), "shares a parameter"),
        (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU()), "0.weight", (1, 4), "passes through|output"),
        (lambda: nn.Sequential(nn.Linear(4, 6)), "0.weight", (1, 4), "output"),
    ],
)  # fmt: skip
def test_units_that_cannot_go_stay_and_the_report_says_why(
    model: Callable[[], nn.Module], zeroed: str, example: tuple[int, ...], why: str
):
    full = randomised(model())
    for name in zeroed.split():
        zero(full, name, [1])
    small, report = shrink(full, torch.zeros(example))
    assert report.removed == {} and len(report.kept) >= 1
    assert all(any(word in reason for word in why.split("|")) for reason in report.kept.values())
    assert furthest(full, small, images(example[1:])) == 0


def test_a_shortcut_from_the_input_itself_holds_its_channels():
    class FromInput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.inner(x))

    full = randomised(FromInput())
    zero(full, "inner.weight", [1])
    small, report = shrink(full, torch.zeros(1, 4))
    assert report.removed == {} and "varies" in report.kept["inner"]
    assert furthest(full, small, images((4,))) == 0


# ------------------------------------------------------------------------------------------------ the model that is left


def test_the_full_model_is_not_touched_and_its_optimizer_does_not_know_the_smaller_one():
    full = small_cnn().train()
    zero(full, "conv1.weight", [1])
    before = {name: tensor.clone() for name, tensor in full.state_dict().items()}
    old = torch.optim.SGD(full.parameters(), lr=0.1)
    small, _ = shrink(full, IMAGES)
    assert all(torch.equal(before[name], tensor) for name, tensor in full.state_dict().items()) and full.training
    assert not {p.data_ptr() for p in full.parameters()} & {p.data_ptr() for p in small.parameters()}
    assert all(p.grad is None for p in small.parameters())
    for optimizer, moves in ((old, False), (torch.optim.SGD(small.parameters(), lr=0.1), True)):
        weights = small.conv2.weight.detach().clone()
        small(images((1, 8, 8))).square().sum().backward()
        optimizer.step()
        assert torch.equal(weights, small.conv2.weight) != moves


def test_dtype_mode_and_frozen_parameters_are_kept():
    full = small_cnn().float().train()
    full.conv2.eval()
    full.head.to(torch.bfloat16)
    full.conv1.weight.requires_grad_(False)
    zero(full, "conv1.weight", [1])
    small, _ = shrink(full, IMAGES)
    assert small.conv1.weight.dtype == torch.float32 and small.head.weight.dtype == torch.bfloat16
    assert small.training and small.conv1.training and not small.conv2.training
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in full.parameters()]


def test_a_policy_attaches_to_the_smaller_model():
    full = small_cnn().train()
    zero(full, "conv1.weight", [1])
    small, _ = shrink(full, IMAGES)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    control = nw.attach(small, optimizer, nw.max_norm(0.5))
    small(images((1, 8, 8))).square().sum().backward()
    optimizer.step()
    assert not control.verify().breaches
    assert (small.conv1.weight.flatten(1).norm(dim=1) <= 0.5).all()


def test_cut_gives_the_smaller_shape_from_fresh_weights():
    full = residual()
    for name in ("stem.weight", *(f"blocks.{i}.norm2.{kind}" for i in (0, 1) for kind in ("weight", "bias"))):
        zero(full, name, [1, 2])
    zero(full, "blocks.2.norm1.weight", [5])
    zero(full, "blocks.2.norm1.bias", [5])
    small, report = shrink(full, COLOURS)
    fresh = cut(ResNet(3, 10, (6, 8), depth=2), COLOURS, report.removed)
    assert set(report.removed) == {"stem", "blocks.0.conv2", "blocks.1.conv2", "blocks.2.conv1"}
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in small.parameters()]
    with pytest.raises(StudyError, match=r"units of nothing cannot be removed; layers with units to remove: blocks\.0\.conv1"):
        cut(full, COLOURS, {"nothing": [0]})


# --------------------------------------------------------------------------------------------------------------- errors


def test_without_the_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'normwise\[prune\]'") as caught:
        shrink(small_cnn(), IMAGES)
    assert isinstance(caught.value, NormwiseError) and isinstance(caught.value, ImportError)


@pytest.mark.parametrize("tolerance", [-1e-9, float("nan"), float("inf")])
def test_a_tolerance_is_finite_and_not_negative(tolerance: float):
    with pytest.raises(StudyError, match="largest L2 norm that counts as zero"):
        shrink(small_cnn(), IMAGES, tolerance)


@pytest.mark.parametrize(("example", "said"), [(torch.zeros(3), r"shape \(3,\)"), ([1], "a list")])
def test_the_example_is_a_batch(example: Tensor, said: str):
    with pytest.raises(StudyError, match=said):
        shrink(small_cnn(), example)
