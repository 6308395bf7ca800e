"""Random noise: the control that any attack must beat, and that no honest defence fails.

uniform          x + a random point of the ball
gaussian         x + epsilon g / norm(g), or x + std g,  g normal
salt_and_pepper  a share of the elements at the lowest or highest value
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from jr_onnx.attacks.attack import Attack, Classifier
from jr_onnx.attacks.batch import generators, radius
from jr_onnx.attacks.nearest import check_at_least, check_positive, misclassified
from jr_onnx.attacks.threat import NORMS, ThreatModel
from jr_onnx.errors import ParameterError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Noise(Attack):
    """Draws points until one is misclassified.

    Attributes:
        draws: points for each example, at most.
    """

    uses_gradients = False
    draws: int = 1000

    def __post_init__(self) -> None:
        check_at_least(1, draws=self.draws)

    def search(
        self,
        target: Classifier,
        x: Array,
        y: Array,
        threat: ThreatModel,
        *,
        seed: int,
        indices: Array,
    ) -> Array:
        """Returns the first misclassified point of each example, or its last.

        Raises:
            ParameterError: the noise is in units of epsilon, and epsilon is inf.
        """
        streams, x_adv = generators(seed, indices), x.copy()
        alive = np.arange(len(x))
        for number in range(self.draws):
            drawn = [self._draw(x[row], threat, streams[row], number) for row in alive]
            x_adv[alive] = threat.project(np.stack(drawn), x[alive])
            alive = alive[~misclassified(target.logits(x_adv[alive]), y[alive])]
            if not len(alive):
                break
        return x_adv

    @abstractmethod
    def _draw(self, x: Array, threat: ThreatModel, rng: np.random.Generator, number: int) -> Array:
        """Returns a point near one example."""


@dataclass(frozen=True, kw_only=True)
class UniformNoise(Noise):
    """Uniform in the ball; in the box of the bounds where epsilon is inf."""

    name = "uniform-noise"

    def _draw(self, x: Array, threat: ThreatModel, rng: np.random.Generator, number: int) -> Array:
        if np.isinf(threat.epsilon):
            return np.asarray(rng.uniform(*threat.bounds, x.shape))
        return x + NORMS[threat.norm].sample(x.shape, threat.epsilon, rng)


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(Noise):
    """Normal noise.

    Attributes:
        std: in input units; None scales each draw to the surface of the ball.
    """

    name = "gaussian-noise"
    std: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.std is not None:
            check_positive(std=self.std)

    def _draw(self, x: Array, threat: ThreatModel, rng: np.random.Generator, number: int) -> Array:
        noise = np.asarray(rng.standard_normal(x.shape))
        if self.std is not None:
            return x + self.std * noise
        length = float(NORMS[threat.norm].distance(noise[None])[0])
        epsilon = radius(f"{self.name} without std", threat)
        return x + noise * (epsilon / max(length, np.finfo(np.float64).tiny))


@dataclass(frozen=True, kw_only=True)
class SaltAndPepperNoise(Noise):
    """Elements set to the lowest or the highest value, more of them in each draw.

    Attributes:
        share: of the elements, in the last draw.
    """

    name = "salt-and-pepper-noise"
    draws: int = 100
    share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ParameterError(f"share must be in (0, 1], got {self.share}")

    def _draw(self, x: Array, threat: ThreatModel, rng: np.random.Generator, number: int) -> Array:
        drawn, share = np.asarray(rng.random(x.shape)), self.share * (number + 1) / self.draws
        salted = np.where(drawn < share / 2, threat.bounds[0], x.astype(np.float64))
        return np.where(drawn >= 1 - share / 2, threat.bounds[1], salted)
