"""Which tasks make the next outer step."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Generator, Tensor

from metaopt.random import hash64
from metaopt.rule import Declared
from metaopt.space import hyper


class Curriculum(Declared, ABC):
    """Probabilities of tasks, from what is known of each."""

    needs_regret = False
    """Whether it looks at regrets, for which every task needs an archived baseline."""

    @abstractmethod
    def weights(self, regret: Tensor, age: Tensor) -> Tensor:
        """Weights [n], float64, all above 0; their sum does not matter.

        Args:
            regret: float64 [n], how much worse than the baseline each task last was; infinite before its first step.
            age: int64 [n], outer steps since each task was last taken; at least 1.
        """


class Uniform(Curriculum):
    """Every task alike."""

    def weights(self, regret: Tensor, age: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(regret)


class Regret(Curriculum):
    r"""Tasks on which a tuned optimizer does better than ours come first, by rank:

    .. math:: P = \epsilon / n + (1 - \epsilon) ((1 - \rho) P_r + \rho P_a), \quad
        P_r \propto \mathrm{rank}(\text{regret})^{-1 / \beta}, \quad P_a \propto \text{age}

    with temperature beta, staleness rho and floor epsilon. Regret as the measure of what can be learned from a task: GROOVE,
    Jackson et al. 2023 (arXiv:2310.02782); ranks and staleness: prioritized level replay, Jiang et al. 2021
    (arXiv:2010.03934).
    """

    needs_regret = True

    temperature: float = hyper(1.0, 0.0, open_low=True, doc="beta: towards 0 only the greatest regret counts")
    staleness: float = hyper(0.1, 0.0, 1.0, doc="rho: share of the probability that goes by age")
    floor: float = hyper(0.1, 0.0, 1.0, open_low=True, doc="epsilon: share that all tasks have alike")

    def weights(self, regret: Tensor, age: Tensor) -> Tensor:
        """The formula."""
        rank = regret.argsort(descending=True, stable=True).argsort() + 1
        by_regret = rank.double() ** (-1 / self.temperature)
        share = (1 - self.staleness) * by_regret / by_regret.sum() + self.staleness * age / age.sum()
        return self.floor / len(regret) + (1 - self.floor) * share


def draw(weights: Tensor, count: int, seed: int, step: int) -> list[int]:
    """``count`` different indices in increasing order, with probabilities by ``weights`` [n]: a function of all arguments."""
    if count == len(weights):
        return list(range(count))
    key = int(hash64(hash64(torch.tensor(seed)) + step))
    return sorted(torch.multinomial(weights, count, generator=Generator().manual_seed(key)).tolist())
