"""The parts of the GAN: networks, losses, penalties and measures against formulas, scipy and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from normwise.errors import StudyError
from normwise.experiments.tasks import fidelity
from normwise.experiments.tasks.data.splits import load
from normwise.experiments.tasks.fidelity import Fidelity, Gaussian, Judge, Reference, frechet, precision_recall, train_judge
from normwise.experiments.tasks.models import dcgan
from normwise.experiments.tasks.models.dcgan import LOSSES, Discriminator, Generator, brightest, gradient_penalty, r1_penalty, scaled

GENERATOR = torch.Generator().manual_seed(5)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


# ------------------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 9, 14), (3, 31, 8)])
def test_any_size_is_drawn_and_judged_and_every_parameter_takes_part(shape: tuple[int, int, int]) -> None:
    generator, discriminator = Generator(shape), Discriminator(shape)
    images = generator(torch.randn(5, dcgan.NOISE))
    assert images.shape == (5, *shape)
    assert -1 <= images.min() < images.max() <= 1
    logits = discriminator(images)
    assert logits.shape == (5,)
    logits.sum().backward()
    for parameter in [*generator.parameters(), *discriminator.parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all()
    both = sum(parameter.numel() for side in (generator, discriminator) for parameter in side.parameters())
    assert 50_000 <= both <= 340_000


@pytest.mark.parametrize("shape", [(1, 7, 8), (1, 8, 33)])
@pytest.mark.parametrize("network", [Generator, Discriminator])
def test_other_sizes_are_refused(network: type, shape: tuple[int, int, int]) -> None:
    with pytest.raises(StudyError, match=f"{shape[1]}×{shape[2]}, but the GAN draws 8×8 to 32×32"):
        network(shape)


def test_an_images_logit_depends_on_that_image_alone() -> None:
    discriminator = Discriminator((1, 12, 12)).double()
    images = randn(4, 1, 12, 12)
    alone = torch.cat([discriminator(image[None]) for image in images])
    assert torch.allclose(discriminator(images), alone, atol=1e-12)


def test_images_are_scaled_to_the_range_of_tanh() -> None:
    data = load()
    images = scaled(data.train.images, brightest(data))
    assert brightest(data) == 16
    assert (images.min(), images.max()) == (-1, 1)
    assert torch.equal(images, torch.from_numpy(data.train.images).float() / 8 - 1)
    assert scaled(np.array([[[[20]]]], dtype=np.uint8), 16).item() == 1


# -------------------------------------------------------------------------------------------------------------- losses


def test_losses_are_their_formulas() -> None:
    real, fake = 3 * randn(50), 3 * randn(50)

    def log_sigmoid(x: float) -> float:
        return -math.log(1 + math.exp(-x))

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    reals, fakes = real.tolist(), fake.tolist()
    expected = {
        "non_saturating": (-mean([log_sigmoid(x) for x in reals]) - mean([math.log(1 - 1 / (1 + math.exp(-x))) for x in fakes]),
                  -mean([log_sigmoid(x) for x in fakes])),
        "wasserstein": (mean(fakes) - mean(reals), -mean(fakes)),
        "hinge": (mean([max(0.0, 1 - x) for x in reals]) + mean([max(0.0, 1 + x) for x in fakes]), -mean(fakes)),
    }  # fmt: skip
    assert expected.keys() == LOSSES.keys()
    for name, (discriminator, generator) in expected.items():
        assert LOSSES[name].discriminator(real, fake).item() == pytest.approx(discriminator, rel=1e-12)
        assert LOSSES[name].generator(fake).item() == pytest.approx(generator, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_large_logits_are_finite(name: str) -> None:
    large = torch.tensor([1e4, -1e4])
    assert LOSSES[name].discriminator(large, large).isfinite()
    assert LOSSES[name].generator(large).isfinite()


# ----------------------------------------------------------------------------------------------------------- penalties


def test_the_penalties_of_a_linear_critic_are_those_of_its_weights_norm() -> None:
    """Its slope is w everywhere: the penalty is (‖w‖ - 1)², its gradient 2 (‖w‖ - 1) w / ‖w‖; R1 is ½ ‖w‖² with the gradient w."""
    w = randn(12).requires_grad_()
    real, fake = randn(6, 1, 3, 4), randn(6, 1, 3, 4)

    def critic(images: Tensor) -> Tensor:
        return images.flatten(1) @ w + 7

    norm = w.detach().norm()
    penalty = gradient_penalty(critic, real, fake)
    penalty.backward()
    assert penalty.item() == pytest.approx((norm.item() - 1) ** 2, rel=1e-9)
    assert torch.allclose(w.grad, 2 * (norm - 1) * w.detach() / norm, rtol=1e-9)
    w.grad = None
    r1 = r1_penalty(critic, real, fake)
    r1.backward()
    assert r1.item() == pytest.approx(norm.item() ** 2 / 2, rel=1e-12)
    assert torch.allclose(w.grad, w.detach(), rtol=1e-12)


def test_the_gradient_penalty_is_taken_between_the_images_and_r1_at_the_real_ones() -> None:
    """For D(x) = ½‖x‖² the slope at x is x itself."""
    real, fake = randn(40, 1, 2, 2), randn(40, 1, 2, 2)

    def critic(images: Tensor) -> Tensor:
        return images.flatten(1).square().sum(1) / 2

    shares = torch.rand(40, 1, 1, 1, generator=torch.Generator().manual_seed(3)).double()
    norms = (shares * real + (1 - shares) * fake).flatten(1).norm(dim=1)
    found = gradient_penalty(critic, real, fake, torch.Generator().manual_seed(3))
    assert found.item() == pytest.approx((norms - 1).square().mean().item(), rel=1e-6)
    assert r1_penalty(critic, real, fake).item() == pytest.approx(real.flatten(1).square().sum(1).mean().item() / 2, rel=1e-12)


def test_a_flat_critic_gives_finite_gradients_and_none_flow_into_the_images() -> None:
    w = torch.zeros(4, requires_grad=True)
    fake = torch.ones(3, 1, 2, 2, requires_grad=True)
    gradient_penalty(lambda images: images.flatten(1) @ w, torch.ones(3, 1, 2, 2), fake).backward()
    assert w.grad is not None and w.grad.isfinite().all()
    assert fake.grad is None


# ------------------------------------------------------------------------------------------------------------ fidelity


def random_fit(size: int, rank: int | None = None) -> Gaussian:
    factor = randn(size, rank or size)
    return Gaussian(randn(size), factor @ factor.T)


@pytest.mark.parametrize("rank", [6, 2])
def test_the_frechet_distance_is_that_of_scipys_root(rank: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    one, other = random_fit(6), random_fit(6, rank)
    root = linalg.sqrtm(one.covariance.numpy() @ other.covariance.numpy())
    expected = (one.mean - other.mean).square().sum() + (one.covariance + other.covariance).trace() - 2 * np.trace(root).real
    # Of a singular product scipy's root, taken of the unsymmetric form, is the less exact.
    assert frechet(one, other) == pytest.approx(float(expected), rel=1e-10 if rank == 6 else 1e-6)
    assert frechet(other, one) == pytest.approx(frechet(one, other), rel=1e-8)


def test_the_frechet_distance_of_commuting_fits_is_the_closed_form() -> None:
    """Of covariances with the same eigenvectors: ‖μ₁ - μ₂‖² + Σ (s₁ - s₂)²."""
    basis = torch.linalg.qr(randn(5, 5)).Q
    first, second = torch.rand(5, dtype=torch.float64) + 0.1, torch.tensor([0.0, 1, 2, 0, 0.5], dtype=torch.float64)
    one, other = (Gaussian(randn(5), basis @ (s**2).diag() @ basis.T) for s in (first, second))
    expected = (one.mean - other.mean).square().sum() + (first - second).square().sum()
    assert frechet(one, other) == pytest.approx(float(expected), rel=1e-7)
    assert frechet(one, one) == pytest.approx(0, abs=1e-9)


def test_a_fit_is_numpys_and_needs_two_points() -> None:
    points = randn(30, 4)
    fit = Gaussian.of(points.float())
    assert fit.covariance.dtype == torch.float64
    assert np.allclose(fit.covariance, np.cov(points.float().double().numpy(), rowvar=False), rtol=1e-12)
    assert np.allclose(fit.mean, points.float().double().numpy().mean(0), rtol=1e-12)
    with pytest.raises(StudyError, match="2 or more points, given 1"):
        Gaussian.of(points[:1])
    assert math.isnan(frechet(fit, Gaussian.of(torch.full((5, 4), math.inf))))


def by_hand(points: Tensor, others: Tensor, neighbours: int) -> float:
    """The share of points within the reach of any other: its distance to its k-th nearest neighbour."""
    inside = 0
    for point in points:
        for index, other in enumerate(others):
            apart = sorted(math.dist(other.tolist(), third.tolist()) for place, third in enumerate(others) if place != index)
            if math.dist(point.tolist(), other.tolist()) <= apart[neighbours - 1]:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_are_those_of_a_loop_over_all_pairs(neighbours: int) -> None:
    real, drawn = randn(40, 3), randn(40, 3) + torch.tensor([1.5, 0, 0])
    found = precision_recall(real, drawn, neighbours)
    assert found == (by_hand(drawn, real, neighbours), by_hand(real, drawn, neighbours))
    assert 0 < min(found) <= max(found) < 1


def test_precision_and_recall_at_their_ends() -> None:
    real = randn(20, 4)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 1000) == (0.0, 0.0)
    one_image = real[:1].expand(20, 4)  # drawn again and again: real, and covering itself only
    assert precision_recall(real, one_image) == (1.0, 1 / 20)
    with pytest.raises(StudyError, match="3 neighbours need more than 3 images of each side, given 20 and 3"):
        precision_recall(real, real[:3])


@pytest.mark.parametrize(
    ("found", "collapsed"),
    [
        (Fidelity(0.2, 0.5, 0.5), False), (Fidelity(0.2, 0.0, 0.1), False), (Fidelity(0.2, 1.0, 0.09), True),
        (Fidelity(0.71, 1.0, 0.9), True), (Fidelity(None, 0.0, 0.0), True),
    ],
)  # fmt: skip
def test_a_seed_has_collapsed_where_one_class_would_do(found: Fidelity, collapsed: bool) -> None:
    assert Reference(random_fit(3), randn(9, 3), one_class=0.7, classes=10).collapsed(found) is collapsed


# --------------------------------------------------------------------------------------------------------------- judge


@pytest.fixture(scope="module")
def judge() -> Judge:
    return train_judge(load(), epochs=25)


def test_the_judge_knows_digits_and_tells_real_images_from_one_class_and_from_noise(judge: Judge) -> None:
    data = load()
    logits = judge.classifier(scaled(data.test.images, 16))
    assert judge.accuracy == (logits.argmax(1).numpy() == data.test.labels).mean() > 0.9
    reference = judge.references["test"]
    real = reference.judged(judge.features(scaled(data.validation.images, 16)))
    assert real.distance == pytest.approx(judge.floor, rel=1e-6)
    assert judge.floor < 0.02
    assert min(real.precision, real.recall) > 0.8
    sevens = reference.judged(judge.features(scaled(data.train.images[data.train.labels == 7], 16)))
    assert sevens.distance is not None and sevens.distance > 0.999 * reference.one_class
    assert sevens.precision > 0.8 and sevens.recall < 0.2
    noise = reference.judged(judge.features(torch.rand(300, 1, 8, 8) * 2 - 1))
    assert noise.recall < 0.05 and reference.collapsed(noise)
    assert reference.judged(torch.full((40, fidelity.FEATURES), math.nan)) == Fidelity(None, 0.0, 0.0)


def test_one_average_image_is_at_the_distance_1(judge: Judge) -> None:
    """Were its features the mean of the real ones, its distance would be their total variance, which is 1 up to sampling."""
    fit = judge.references["test"].fit
    still = Gaussian(fit.mean, torch.zeros_like(fit.covariance))
    assert frechet(fit, still) == pytest.approx(fit.covariance.trace().item(), rel=1e-12) == pytest.approx(1, abs=0.1)


def test_the_seed_decides_the_judge_and_the_global_one_stays() -> None:
    data = load().thinned(200)
    before = torch.get_rng_state()
    one, again, other = train_judge(data, epochs=1), train_judge(data, epochs=1), train_judge(data, epochs=1, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    weights = [nn.utils.parameters_to_vector(judge.classifier.parameters()) for judge in (one, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
