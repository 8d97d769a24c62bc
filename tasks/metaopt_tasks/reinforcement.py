"""Reinforcement learning with environments in plain torch: every inner step plays a batch of episodes.

Actions, slips and starts are drawn from the step's key (`metaopt.random`), by inverse distribution functions, so an inner
step is a pure function. Training follows the policy gradient with a baseline; ``loss`` judges the return.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from metaopt import tree
from metaopt.random import uniform
from metaopt.rule import ParamInfo, Params, infer_info
from metaopt.task import Batch, Split
from metaopt_tasks.layers import mlp, mlp_params
from metaopt_tasks.scales import ScaledTask

Objective = Callable[[Tensor, Tensor], Tensor]
"""(log-probability of an action, advantage) -> loss, entry by entry; advantages are constants."""


def score_function(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """-log_prob advantage, whose mean gradient is minus that of the expected return (Williams 1992)."""
    return -log_prob * advantage


def advantages(rewards: Tensor, discount: float) -> tuple[Tensor, Tensor]:
    """Rewards [T, B] -> (discounted returns to go, these minus the mean of the other episodes at that time), each [T, B].

    An episode's baseline does not depend on its own actions, so the policy gradient stays unbiased.
    """
    steps, episodes = rewards.shape
    time = torch.arange(steps, device=rewards.device, dtype=rewards.dtype)
    returns = (discount ** (time - time[:, None]).clamp_min(0)).triu() @ rewards
    others = (returns.sum(1, keepdim=True) - returns) / max(1, episodes - 1)
    return returns, returns - others


@dataclass(eq=False)
class CartPole(ScaledTask):
    """A pole on a cart, pushed left or right: balance it (Barto, Sutton and Anderson 1983, with Florian's 2007 dynamics).

    State: cart position (m) and velocity, pole angle (rad, 0 is upright) and velocity; Euler steps of 0.02 s. An episode
    earns 1 for every step after which the cart is within 2.4 m and the pole within 12 degrees, until it first is not.
    The policy's network gives the logit of a push to the right. Data: starts ``state`` [N, 4], uniform in +-0.05.

    Attributes:
        hidden: widths of the policy's tanh network; empty for a linear one.
        steps: of an episode.
        pole: half the pole's length, m.
        force: of a push, N.
        discount: of later rewards, in training.
        objective: see `Objective`.
    """

    stochastic: ClassVar[bool] = True
    hidden: tuple[int, ...] = ()
    steps: int = 50
    pole: float = 0.5
    force: float = 10.0
    discount: float = 0.98
    objective: Objective = score_function

    def __post_init__(self) -> None:
        self._limits = torch.tensor([2.4, math.inf, math.pi / 15, math.inf], dtype=torch.float64, device=self.device)

    def init(self, generator: Generator) -> Params:
        """LeCun normal weights, a small head, zero biases: pushes are about even at first."""
        return mlp_params((4, *self.hidden, 1), generator)

    def acceleration(self, state: Tensor, push: Tensor) -> Tensor:
        """Time derivative [B, 4] of states [B, 4] under forces [B]; cart 1 kg, pole 0.1 kg, no friction."""
        _, speed, angle, spin = state.unbind(-1)
        sin, cos = angle.sin(), angle.cos()
        lever = 0.1 * self.pole
        pull = (push + lever * spin * spin * sin) / 1.1
        spin_rate = (9.8 * sin - cos * pull) / (self.pole * 4 / 3 - lever / 1.1 * cos * cos)
        return torch.stack([speed, pull - lever / 1.1 * spin_rate * cos, spin, spin_rate], -1)

    @torch.no_grad()
    def play(self, params: Params, state: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Episodes from starts [B, 4]: states seen [T, B, 4], whether each push was to the right, and rewards, [T, B]."""
        params, draws = tree.detach(params), uniform(key, (self.steps, len(state)), dtype=state.dtype)
        # a push to the right iff the logit exceeds that of the draw; logits need no sigmoid this way
        thresholds = (draws / (1 - draws)).log()
        limits = self._limits.to(state.dtype)
        states, rights, inside = [], [], []
        for threshold in thresholds.unbind(0):
            right = mlp(params, state, torch.tanh).squeeze(-1) > threshold
            states.append(state)
            rights.append(right)
            push = self.force * (2 * right.to(state.dtype) - 1)
            state = torch.add(state, self.acceleration(state, push), alpha=0.02)
            inside.append((state.abs() <= limits).all(-1))
        rewards = torch.stack(inside).to(state.dtype).cumprod(0)
        return torch.stack(states), torch.stack(rights), rewards

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Minus the mean undiscounted return of one episode from each of ``state`` [B, 4]."""
        state = batch["state"].to(params["head.weight"].dtype)
        return -self.play(params, state, batch["random"])[2].sum(0).mean()

    def training_loss(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        """Minus the mean return, a constant, plus what has the policy gradient, per step of an episode.

        As usual, the discount is in the advantages only.
        """
        states, right, rewards = self.play(params, batch["state"].to(params["head.weight"].dtype), batch["random"])
        logit = mlp(params, states, torch.tanh).squeeze(-1)
        log_prob = F.logsigmoid(torch.where(right, logit, -logit))
        _, advantage = advantages(rewards, self.discount)
        alive = torch.cat([torch.ones_like(rewards[:1]), rewards[:-1]])
        surrogate = self.objective(log_prob, advantage) * alive
        return surrogate.sum(0).mean() / self.steps - rewards.sum(0).mean(), buffers

    def info(self) -> dict[str, ParamInfo]:
        """The first hidden layer is the input, the head the output."""
        roles = {"fc1.weight": "input", "head.weight": "output"}
        return infer_info(self.init(Generator().manual_seed(0)), roles)


def cartpole(
    name: str = "cartpole",
    hidden: Sequence[int] = (),
    steps: int = 50,
    pole: float = 0.5,
    force: float = 10.0,
    discount: float = 0.98,
    objective: Objective = score_function,
    batch_size: int = 32,
    horizon: int = 200,
    device: Any = "cpu",
) -> CartPole:
    """A `CartPole` with ``batch_size`` episodes per step; normalised, 1 is pushing at random and 0 never to fall."""
    made = Generator().manual_seed(0)
    starts = {
        part: Split({"state": (torch.rand(size, 4, generator=made) * 0.1 - 0.05).to(device)})
        for part, size in {"train": 4096, "valid": 256, "test": 256}.items()
    }
    task = CartPole(
        name, starts["train"], starts["valid"], starts["test"], batch_size, horizon, hidden=tuple(hidden),
        steps=steps, pole=pole, force=force, discount=discount, objective=objective, floor=-float(steps),
    )  # fmt: skip
    even = {"head.weight": torch.zeros(1, 4, device=device), "head.bias": torch.zeros(1, device=device)}
    batch = starts["train"].take(torch.arange(512, device=device))
    at_random = task.loss(even, batch | {"random": torch.tensor(0, device=device)})
    task.scale = float(at_random) - task.floor
    return task


LAYOUTS = {
    "open": ("S....", ".....", ".....", ".....", "....G"),
    "cliff": ("......", "......", "S.XX.G"),
    "rooms": ("S..#...", "...#...", ".......", "#.###.#", "...#...", ".......", "...#..G"),
    "bridge": ("XXXXX", "S...G", "XXXXX"),
    "fork": ("..#..", ".S#.G", "..#..", ".....", "..X.."),
    "lake": ("S...", ".X.X", "...X", "X..G"),
}  # fmt: skip
"""Name -> rows of cells: ``S`` start, ``.`` free, ``#`` wall, ``G`` goal (+1, ends), ``X`` pit (-1, ends)."""
_MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))


@dataclass(eq=False)
class GridWorld(ScaledTask):
    """A walk to a goal on a slippery grid, judged by its exact expected return.

    Moves: up, right, down, left; into a wall or off the grid, one stays. With probability ``slip`` the move is a random
    one. Entering the goal earns 1, a pit -1, and ends the episode; every move costs ``cost``.

    ``config`` holds the world: ``moves`` int64 [S, 4] (next cell), ``gain`` [S] (reward for entering a cell), ``ends`` [S]
    (1 where an episode ends), ``features`` [S, F]. Cell 0 is the start.

    Attributes:
        hidden: widths of the policy's tanh network on ``features``; empty: one logit per cell and move, a table.
        steps: of an episode, at most.
        slip, cost: see above.
        discount: of later rewards, in training and in judging.
        entropy: weight of the policy's mean entropy over cells, a bonus in training.
        objective: see `Objective`.
    """

    stochastic: ClassVar[bool] = True
    hidden: tuple[int, ...] = ()
    steps: int = 20
    slip: float = 0.1
    cost: float = 0.01
    discount: float = 0.97
    entropy: float = 0.0
    objective: Objective = score_function

    def init(self, generator: Generator) -> Params:
        """A table of small normal logits, or an `mlp`."""
        cells, features = self.config["features"].shape
        if not self.hidden:
            return {"policy.embedding": 0.1 * torch.randn(cells, 4, generator=generator)}
        return mlp_params((features, *self.hidden, 4), generator)

    def log_policy(self, params: Params, batch: Batch) -> Tensor:
        """Log-probability of each move in each cell [S, 4]."""
        if not self.hidden:
            return params["policy.embedding"].log_softmax(-1)
        features = {**self.config, **batch}["features"].to(params["head.weight"].dtype)
        return mlp(params, features, torch.tanh).log_softmax(-1)

    def value(self, policy: Tensor, batch: Batch) -> Tensor:
        """Expected return of ``steps`` moves from every cell [S], under move probabilities ``policy`` [S, 4]: exact."""
        world = {**self.config, **batch}
        moves = world["moves"]
        stays, reward = 1 - world["ends"].to(policy.dtype), world["gain"].to(policy.dtype) - self.cost
        mixed = stays[:, None] * ((1 - self.slip) * policy + self.slip / 4)
        value = torch.zeros_like(reward)
        for _ in range(self.steps):
            value = (mixed * (reward + self.discount * value)[moves]).sum(-1)
        return value

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Minus the exact expected return from the start; draws nothing."""
        return -self.value(self.log_policy(params, batch).exp(), batch)[0]

    def training_loss(self, params: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Params]:
        """Minus the mean return of ``batch_size`` episodes, a constant, plus what has the policy gradient."""
        log_policy = self.log_policy(params, batch)
        dtype = log_policy.dtype
        cells, taken, rewards, alive = self.play(log_policy.detach(), batch)
        log_prob = log_policy.flatten()[cells * 4 + taken]
        returns, advantage = advantages(rewards, self.discount)
        fade = self.discount ** torch.arange(self.steps, dtype=dtype, device=rewards.device)
        surrogate = (self.objective(log_prob, advantage) * alive * fade[:, None]).sum(0).mean()
        bonus = -(log_policy.exp() * log_policy).sum(-1).mean()
        return surrogate - returns[0].mean() - self.entropy * bonus, buffers

    def play(self, log_policy: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``batch_size`` episodes: cells, chosen moves, rewards, and whether the episode was still going, each [T, B]."""
        world, shape, dtype = {**self.config, **batch}, (self.steps, self.batch_size), log_policy.dtype
        choice = uniform(batch["random"], shape, 0, dtype)
        chance = uniform(batch["random"], shape, 1, dtype)
        slips = chance < self.slip
        blown = (chance * (4 / max(self.slip, 1e-9))).long().clamp(max=3)  # uniform over moves where it slips
        below = log_policy.exp().cumsum(-1)[:, :3]
        moves, ends = world["moves"].flatten(), world["ends"].to(dtype)
        cell, going = torch.zeros_like(blown[0]), torch.ones_like(chance[0])
        cells, taken, entered, alive = [], [], [], []
        for t in range(self.steps):
            move = (choice[t].unsqueeze(-1) > below[cell]).sum(-1)
            cells.append(cell)
            taken.append(move)
            alive.append(going)
            cell = moves[cell * 4 + torch.where(slips[t], blown[t], move)]
            entered.append(cell)
            going = going * (1 - ends[cell])
        lives = torch.stack(alive)
        rewards = (world["gain"].to(dtype)[torch.stack(entered)] - self.cost) * lives
        return torch.stack(cells), torch.stack(taken), rewards, lives

    def best_value(self) -> float:
        """The highest expected return from the start, by backward induction; policies may depend on time here."""
        moves, ends, gain = (self.config[name].cpu() for name in ("moves", "ends", "gain"))
        stays = 1 - ends.double()
        reward = gain.double() - self.cost
        value = torch.zeros_like(reward)
        for _ in range(self.steps):
            options = (reward + self.discount * value)[moves]
            value = stays * ((1 - self.slip) * options.amax(-1) + self.slip * options.mean(-1))
        return float(value[0])

    def info(self) -> dict[str, ParamInfo]:
        """A table is an embedding of cells; of a network, the first layer is the input and the head the output."""
        roles = {"fc1.weight": "input", "head.weight": "output", "policy.embedding": "embedding"}
        return infer_info(self.init(Generator().manual_seed(0)), roles)


def world(layout: Sequence[str]) -> Batch:
    """The ``config`` of a `GridWorld` from rows of cells (see `LAYOUTS`)."""
    grid = {(r, c): cell for r, row in enumerate(layout) for c, cell in enumerate(row) if cell != "#"}
    if sorted(grid.values()).count("S") != 1 or "G" not in grid.values():
        raise ValueError(f"a layout must have one start S and a goal G, got {list(layout)}")
    places = sorted(grid, key=lambda at: grid[at] != "S")  # the start first, the rest in reading order
    number = {at: i for i, at in enumerate(places)}
    moves = [[number.get((r + dr, c + dc), number[r, c]) for dr, dc in _MOVES] for r, c in places]
    open_sides = [[float((r + dr, c + dc) in number) for dr, dc in _MOVES] for r, c in places]
    span = max(1, max(max(at) for at in places))
    scaled = [[2 * r / span - 1, 2 * c / span - 1] for r, c in places]
    kinds = [grid[at] for at in places]
    return {
        "moves": torch.tensor(moves),
        "gain": torch.tensor([{"G": 1.0, "X": -1.0}.get(kind, 0.0) for kind in kinds]),
        "ends": torch.tensor([float(kind in "GX") for kind in kinds]),
        "features": torch.cat([torch.tensor(scaled), torch.tensor(open_sides)], 1),
    }


def gridworld(
    name: str = "gridworld",
    layout: str | Sequence[str] = "open",
    hidden: Sequence[int] = (),
    steps: int = 20,
    slip: float = 0.1,
    cost: float = 0.01,
    discount: float = 0.97,
    entropy: float = 0.0,
    objective: Objective = score_function,
    batch_size: int = 32,
    horizon: int = 200,
    device: Any = "cpu",
) -> GridWorld:
    """A `GridWorld` on a named or given layout; normalised, 1 is walking at random and 0 at least the best policy."""
    if isinstance(layout, str) and layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)} or rows of cells, got {layout!r}")
    config = world(LAYOUTS[layout] if isinstance(layout, str) else layout)
    empty = Split()
    task = GridWorld(
        name, empty, empty, empty, batch_size, horizon, {key: value.to(device) for key, value in config.items()},
        hidden=tuple(hidden), steps=steps, slip=slip, cost=cost, discount=discount, entropy=entropy, objective=objective,
    )  # fmt: skip
    at_random = task.value(torch.full((len(config["gain"]), 4), 0.25, dtype=torch.float64, device=device), {})
    task.floor = -task.best_value()
    task.scale = -float(at_random[0]) - task.floor
    return task
