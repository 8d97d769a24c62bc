"""Which of several proposers to ask: a bandit whose reward is improvement, and which minds the cost."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class _Arm:
    asked: int = 0
    told: int = 0
    reward: float = 0.0  # decayed sum
    weight: float = 0.0  # decayed number
    cost: float = 0.0

    @property
    def mean_reward(self) -> float:
        return self.reward / self.weight if self.weight else 0.0

    @property
    def mean_cost(self) -> float:
        return self.cost / self.told if self.told else 0.0


class Bandit:
    """Asymmetric UCB, as in ShinkaEvolve (Lange et al., 2025, https://arxiv.org/abs/2509.19349), with linear rewards.

    The reward of a proposal is its improvement over its parent, u = max(0, parent - child), scores being losses: a bad
    child costs a proposer no more than a useless one, so that bold ones are not punished. With all sums decayed by ``decay`` at
    every result,

        value_a = (mean u of a) / (largest mean of all)          in [0, 1]
        bonus_a = exploration sqrt(2 ln n / n_a)                 n_a: times asked, those under way included; n their sum
        cheap_a = (smallest mean cost of all) / (mean cost of a) in [0, 1]; costs are not decayed
        index_a = (1 - thrift) (value_a + bonus_a) + thrift cheap_a

    An arm never asked comes first; else, with probability 1 - ``epsilon`` the largest index, and any other one otherwise.
    Draws are functions of the seed and n, so a bandit restored from `state` goes on as it would have.

    Args:
        arms: names.
        exploration: weight of the bonus.
        thrift: weight of the cost, in [0, 1].
        decay: of rewards per result, in (0, 1].
        epsilon: probability of another arm than the best, in [0, 1].
        seed: of the draws.

    Raises:
        ValueError: no arms, two of one name, or a number outside its range.
    """

    def __init__(
        self,
        arms: Sequence[str],
        exploration: float = 1.0,
        thrift: float = 0.3,
        decay: float = 0.95,
        epsilon: float = 0.2,
        seed: int = 0,
    ) -> None:
        if not arms or len(set(arms)) < len(arms):
            raise ValueError(f"a bandit needs arms of different names, got {list(arms)}")
        if not (exploration >= 0 and 0 <= thrift <= 1 and 0 < decay <= 1 and 0 <= epsilon <= 1):
            raise ValueError(
                f"exploration must be at least 0, thrift and epsilon in [0, 1] and decay in (0, 1], got {exploration}, "
                f"{thrift}, {epsilon} and {decay}"
            )
        self._arms = {name: _Arm() for name in arms}
        self._exploration, self._thrift, self._decay = exploration, thrift, decay
        self._epsilon, self._seed = epsilon, seed
        self._lock = threading.Lock()

    def choose(self, among: Sequence[str] | None = None) -> str:
        """The arm to ask next, which counts as asked from now on.

        Args:
            among: those that can be asked; None: all.
        """
        with self._lock:
            names = list(self._arms if among is None else among)
            draws = np.random.default_rng([self._seed, sum(arm.asked for arm in self._arms.values())])
            index = self._indices(names)
            best = [name for name in names if index[name] == max(index.values())]
            others = [name for name in names if name not in best]
            explore = others and math.isfinite(max(index.values())) and draws.random() < self._epsilon
            chosen = str(draws.choice(others if explore else best))
            self._arms[chosen].asked += 1
            return chosen

    def tell(self, arm: str, improvement: float, cost: float) -> None:
        """What came of asking ``arm``.

        Args:
            arm: who was asked.
            improvement: parent's score less the child's; anything not above 0, NaN included, is no improvement.
            cost: of the answer, in money or whatever all arms are counted in.

        Raises:
            ValueError: a cost or an improvement that is infinite, or a negative cost.
        """
        if math.isinf(improvement) or not 0 <= cost < math.inf:
            raise ValueError(f"improvement must be finite and cost in [0, inf), got {improvement} and {cost}")
        with self._lock:
            for other in self._arms.values():
                other.reward *= self._decay
                other.weight *= self._decay
            told = self._arms[arm]
            told.reward += improvement if improvement > 0 else 0.0
            told.weight += 1.0
            told.told += 1
            told.cost += cost

    def state(self) -> dict[str, dict[str, float]]:
        """All that was learned, as JSON holds it."""
        with self._lock:
            return {name: dataclasses.asdict(arm) for name, arm in self._arms.items()}

    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on as the bandit of the same arms whose `state` this is; what was under way then counts as asked.

        Raises:
            ValueError: other arms.
        """
        if state.keys() != self._arms.keys():
            raise ValueError(
                f"the state is of the arms {list(state)}, not of {list(self._arms)}; name the same proposers"
            )
        with self._lock:
            self._arms = {name: _Arm(**arm) for name, arm in state.items()}

    def _indices(self, names: Sequence[str]) -> dict[str, float]:
        asked = sum(arm.asked for arm in self._arms.values())
        most = max(arm.mean_reward for arm in self._arms.values())
        least = min((arm.mean_cost for arm in self._arms.values() if arm.told), default=0.0)
        index = {}
        for name in names:
            arm = self._arms[name]
            if not arm.asked:
                index[name] = math.inf
                continue
            value = arm.mean_reward / most if most > 0 else 0.0
            bonus = self._exploration * math.sqrt(2 * math.log(max(asked, 2)) / arm.asked)
            cheap = least / arm.mean_cost if arm.mean_cost > least else 1.0
            index[name] = (1 - self._thrift) * (value + bonus) + self._thrift * cheap
        return index
