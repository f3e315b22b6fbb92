"""What the server knows of how clients train: the update rule of the bundle, and its settings in a task."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from edge_client.errors import ConfigError
from edge_client.manifest import Manifest

_LINEAR = ("sgd", "momentum", "nesterov")


@dataclass(frozen=True, slots=True)
class LocalTraining:
    """A client's optimizer, by the name that the bundle has for it, and the hyperparameters of its steps."""

    optimizer: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.0
    proximal: float = 0.0
    """Strength of the pull to the model as received (FedProx)."""
    falls: bool = False
    """Whether the learning rate is another one in each step of a task."""
    decays: bool = False
    """Whether tasks of other rounds start with another one."""

    @classmethod
    def of(cls, manifest: Manifest, hypers: Mapping[str, float], *, falls: bool = False, decays: bool = False) -> Self:
        """With a bundle, where ``[train.hypers]`` says this."""
        known = {**manifest.defaults(), **hypers}
        name = manifest.optimizer.name
        momentum = known.get("momentum", 0.0) if name != "sgd" else 0.0
        proximal = known.get("mu", 0.0) if manifest.proximal else 0.0
        return cls(name, known.get("lr", 0.0), momentum, proximal, falls, decays)

    def rate(self, algorithm: str) -> float:
        """The learning rate.

        Raises:
            ConfigError: there is none.
        """
        if not self.learning_rate > 0:
            raise ConfigError(f"train.hypers.lr is {self.learning_rate:g}; {algorithm} expects a learning rate above 0")
        return self.learning_rate

    def linear(self, algorithm: str) -> None:
        """Refuse a rule whose steps are no sums of gradients.

        Raises:
            ConfigError: it is one.
        """
        if self.optimizer not in _LINEAR:
            raise ConfigError(
                f"{algorithm} cannot be combined with the bundle's optimizer {self.optimizer!r}, whose steps are no "
                f"sums of gradients; expected one of {', '.join(_LINEAR)}, or another aggregation.algorithm"
            )

    def distance(self, steps: float) -> float:
        """How far so many steps go, in learning rates, where each gradient is 1: ``||a||_1`` of Wang et al. 2020.

        Of a rule that is linear in the gradients. With plain SGD it is ``steps``; momentum makes it more, the proximal
        term less. Weight decay is left out of it, as it is in the paper.

        Raises:
            ConfigError: the rule is not linear.
        """
        self.linear("fednova")
        momentum = self.momentum if self.optimizer != "sgd" else 0.0
        pull = -self.learning_rate * self.proximal
        # One step of (distance, velocity, 1): the gradient is 1 less the pull.
        velocity = np.array([pull, momentum, 1.0])
        step = np.array([pull, 0.0, 1.0]) + momentum * velocity if self.optimizer == "nesterov" else velocity
        once = np.array([step, velocity, [0.0, 0.0, 1.0]])
        once[0, 0] += 1.0
        return float(np.linalg.matrix_power(once, round(steps))[0, 2])
