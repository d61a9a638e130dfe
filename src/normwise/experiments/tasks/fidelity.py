"""How good drawn images are: Fréchet distance, precision and recall, in the features of a classifier trained for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normwise.errors import StudyError
from normwise.experiments.tasks.data.splits import ImageData
from normwise.experiments.tasks.models.dcgan import brightest, scaled
from normwise.norms.decompose import eigh, eigvalsh

NEIGHBOURS = 3
FEATURES = 32
# Images of each side for precision and recall: their values depend on the number, so that it is the same everywhere.
MANIFOLD = 1000
_CHUNK = 500
_PER_CLASS = 500


# --------------------------------------------------------------------------------------------------------- the measures


@dataclass(frozen=True)
class Gaussian:
    """A fit to features: mean ``(d,)``, covariance ``(d, d)``, in float64."""

    mean: Tensor
    covariance: Tensor

    @staticmethod
    def of(features: Tensor) -> Gaussian:
        """The fit to features ``(n, d)``, the covariance with n - 1. Raises StudyError for fewer than two."""
        if len(features) < 2:
            raise StudyError(f"A Gaussian needs 2 or more points, given {len(features)}; draw more images.")
        return Gaussian(features.double().mean(0), torch.cov(features.double().T))


def frechet(one: Gaussian, other: Gaussian) -> float:
    """‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁^½ Σ₂ Σ₁^½)^½): the squared Wasserstein-2 distance of two Gaussians (Dowson and Landau, 1982),
    which with Inception's features is the FID of Heusel et al. (2017). In float64; the root of the product is taken in its symmetric
    form, whose eigenvalues are real and, but for rounding, not negative. nan where a fit is not finite."""
    if not all(bool(part.isfinite().all()) for fit in (one, other) for part in (fit.mean, fit.covariance)):
        return math.nan
    values, vectors = (part[0] for part in eigh(one.covariance[None]))
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
    crossed = eigvalsh((root @ other.covariance @ root)[None]).clamp(min=0).sqrt().sum()
    traces = one.covariance.trace() + other.covariance.trace()
    return float((one.mean - other.mean).square().sum() + traces - 2 * crossed)


def precision_recall(real: Tensor, drawn: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019) of features ``(n, d)`` and ``(m, d)``.

    A set's manifold is the union of balls around its points, each reaching to the point's k-th nearest neighbour in the set
    (default k = 3, as there). Precision: the share of drawn points in the real manifold. Recall: of real points in the drawn one.
    Raises StudyError where a set has no k neighbours.
    """
    if min(len(real), len(drawn)) <= neighbours:
        raise StudyError(f"{neighbours} neighbours need more than {neighbours} images of each side, given {len(real)} and {len(drawn)}.")
    return _covered(drawn, real, neighbours), _covered(real, drawn, neighbours)


def _covered(points: Tensor, others: Tensor, neighbours: int) -> float:
    radii = _distances(others, others).kthvalue(neighbours + 1, dim=1).values  # the nearest of all is the point itself
    return float((_distances(points, others) <= radii).any(1).double().mean())


def _distances(rows: Tensor, columns: Tensor) -> Tensor:
    # Not through products of the points, which would put a point away from itself.
    return torch.cdist(rows.double(), columns.double(), compute_mode="donot_use_mm_for_euclid_dist")


# ------------------------------------------------------------------------------------------------------ the classifier


class Classifier(nn.Module):
    """Images ``(n, channels, height, width)`` in [-1, 1] to logits ``(n, classes)``; 8×8 or larger."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.body = nn.Sequential(
            nn.Conv2d(channels, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten(),
            nn.Linear(32 * (height // 4) * (width // 4), FEATURES),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images.contiguous(memory_format=torch.channels_last)).relu())
        return logits


@dataclass(frozen=True)
class Fidelity:
    """distance: Fréchet, None where it is not finite, and then precision and recall are 0."""

    distance: float | None
    precision: float
    recall: float


@dataclass(frozen=True)
class Reference:
    """Real images of one part as features. fit: to all of them. manifold: the first thousand. one_class: see :meth:`collapsed`."""

    fit: Gaussian
    manifold: Tensor
    one_class: float
    classes: int

    def judged(self, features: Tensor) -> Fidelity:
        """Drawn images, by their features."""
        if not bool(features.isfinite().all()):
            return Fidelity(None, 0.0, 0.0)
        distance = frechet(self.fit, Gaussian.of(features))
        return Fidelity(distance, *precision_recall(self.manifold, features[: len(self.manifold)]))

    def collapsed(self, found: Fidelity) -> bool:
        """Whether a generator that draws perfect images of one class only would do at least as well by one of two measures: such a
        generator covers about 1/classes of the real images, and its Fréchet distance, with the class that suits best, is
        ``one_class``. Images that are not finite are collapsed too."""
        return found.distance is None or found.distance > self.one_class or found.recall < 1 / self.classes


@dataclass(frozen=True)
class Judge:
    """A classifier trained on the training part, and the real images seen through it.

    accuracy: on the test part. references: by part, ``"validation"`` and ``"test"``. floor: the Fréchet distance between those two
    parts, which are real: a generator cannot be told from the truth below it.
    """

    classifier: Classifier
    accuracy: float
    references: dict[str, Reference]
    floor: float
    scale: float

    def features(self, images: Tensor) -> Tensor:
        """``(n, 32)``: the hidden layer before its ReLU, where a Gaussian fits better than behind it, divided by ``scale``, the root
        of the training images' total variance: a Fréchet distance of 1 is that of a generator that draws one average image only."""
        return _hidden(self.classifier, images) / self.scale


def train_judge(data: ImageData, *, epochs: int | None = None, seed: int = 0) -> Judge:
    """Trains the classifier on the training part; the seed decides it (on one thread, on one machine).

    Adam, rate 2e-3 falling linearly to zero, batches of 64, as many ``epochs`` as make about 2000 steps, 3 at least (default): seconds
    on scikit-learn's digits, about 15 s on MNIST on one thread.
    """
    size = min(64, len(data.train))
    steps = len(data.train) // size
    epochs = epochs or max(3, round(2000 / steps))
    before = torch.get_rng_state()
    torch.manual_seed(seed)
    classifier = Classifier(data.shape, data.classes)
    torch.set_rng_state(before)
    top = brightest(data)
    images, labels = scaled(data.train.images, top), torch.from_numpy(data.train.labels)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * steps)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(labels), generator=order)[: steps * size], size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(classifier(images[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    classifier.eval().requires_grad_(False)
    # Real training images of each class, 500 at most.
    members = [(labels == label).nonzero().flatten()[:_PER_CLASS] for label in range(data.classes)]
    groups = [_hidden(classifier, images[rows]) for rows in members if len(rows) > 1]
    scale = float(torch.cat(groups).double().var(0).sum().sqrt())
    classes = [Gaussian.of(features / scale) for features in groups]
    real = {"validation": data.validation, "test": data.test}
    parts = {name: _hidden(classifier, scaled(part.images, top)) for name, part in real.items()}
    references = {}
    for name, features in parts.items():
        fit = Gaussian.of(features / scale)
        references[name] = Reference(fit, (features / scale)[:MANIFOLD], min(frechet(fit, one) for one in classes), len(classes))
    right = classifier.head(parts["test"].relu()).argmax(1) == torch.from_numpy(data.test.labels)
    floor = frechet(references["validation"].fit, references["test"].fit)
    return Judge(classifier, float(right.double().mean()), references, floor, scale)


@torch.no_grad()
def _hidden(classifier: Classifier, images: Tensor) -> Tensor:
    chunks = torch.split(images, _CHUNK)
    return torch.cat([classifier.body(chunk.contiguous(memory_format=torch.channels_last)) for chunk in chunks])
