"""Transfer: adversarial examples of one model, tried on another (gray-box).

x_adv = search(source, x)        judged on the target
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jr_onnx.attacks.attack import Attack, Classifier
from jr_onnx.attacks.threat import ThreatModel

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Transfer(Attack):
    """An attack on another model, whose gradient nothing masks.

    Attributes:
        attack: the search.
        source: the model it searches on, of the same inputs and classes.
    """

    name = "transfer"
    attack: Attack
    source: Classifier

    @property
    def norms(self) -> tuple[str, ...]:  # type: ignore[override]
        """As the attack's own."""
        return self.attack.norms

    @property
    def uses_gradients(self) -> bool:  # type: ignore[override]
        """As the attack's own."""
        return self.attack.uses_gradients

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
        """Returns what the attack finds on the source."""
        return self.attack.search(self.source, x, y, threat, seed=seed, indices=indices)
