"""Episodes in windows: which copies begin anew when, and running what was planned.

Copies have a dimension of signs beside them: state leaves are [n, S, ...] and thetas [n, S, D], where the S runs of a
copy share seed and clock and differ in theta only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.learned import Theta, from_vector, to_vector
from metaopt.meta.estimator import copy_noise, episode_seeds
from metaopt.meta.inner import InnerProblem, write_copies


@dataclass(frozen=True)
class Stretch:
    """``steps`` inner steps without an episode's end in between.

    Attributes:
        begin: int64 [b], the copies that begin an episode before the first step.
        seeds, lengths: of their episodes, int64 [b].
        running: int64 [r], the copies that take the steps.
        begun: int64 [n], how many episodes each copy has begun.
    """

    steps: int
    begin: Tensor
    seeds: Tensor
    lengths: Tensor
    running: Tensor
    begun: Tensor

    def pieces(self, longest: int) -> list[Stretch]:
        """The same in pieces of at most ``longest`` steps."""
        none = self.begin[:0]
        counts = [longest] * (self.steps // longest) + [self.steps % longest] * (self.steps % longest > 0)
        first, *rest = (replace(self, steps=steps) for steps in counts)
        return [first, *(replace(piece, begin=none, seeds=none, lengths=none) for piece in rest)]


def first_carry(
    inner: InnerProblem, theta: Theta, seed: int, n: int, signs: int, memory: dict[str, Any]
) -> dict[str, Any]:
    """The carry before the first window, of n copies that all begin with it.

    Its copies are those of the clock (int64 [n]: steps ``left`` of the episode, 0 if the next step begins another, and
    episodes ``begun``), ``state`` [n, S, ...] of the runs, and whatever the estimator remembers of each copy besides.
    """
    zeros = torch.zeros(n, dtype=torch.int64)
    thetas = to_vector(theta).expand(n, signs, -1)
    # what these runs are does not matter, only how their state looks
    state = fresh_state(inner, thetas, theta, zeros, inner.lengths(zeros, 0))
    state = tree.map_tree(lambda leaf: leaf.clone(memory_format=torch.contiguous_format), state)
    copies = {"left": zeros, "begun": zeros, "state": state, **memory}
    return {"seed": torch.tensor(seed), "windows": torch.tensor(0), "copies": copies}


def next_carry(
    carry: dict[str, Any], clock: dict[str, Tensor], survives: Tensor, state: dict[str, Any], memory: dict[str, Any]
) -> dict[str, Any]:
    """The carry after a window; copies that do not survive (bool [n]) begin an episode with the next."""
    clock = {**clock, "left": torch.where(survives.cpu(), clock["left"], 0)}
    return {**carry, "windows": carry["windows"] + 1, "copies": {**clock, "state": state, **memory}}


def plan_window(
    inner: InnerProblem, carry: dict[str, Any], steps: int, streams: Tensor, stagger: int
) -> tuple[list[Stretch], dict[str, Tensor]]:
    """The stretches of one window, and the clock after it.

    Args:
        inner: tells how long episodes are.
        carry: an estimator's, with the clock among its copies.
        steps: of the window.
        streams: int64 [n]; copies of one stream have the same episodes.
        stagger: over how many streams first episodes are cut evenly, so that ends do not coincide; 0: no cut.
    """
    seed, window = int(carry["seed"]), int(carry["windows"])
    left, begun = carry["copies"]["left"], carry["copies"]["begun"]
    stretches, done = [], 0
    while done < steps:
        begin = (left == 0).nonzero().squeeze(1)
        begun = begun + (left == 0)
        seeds = episode_seeds(seed, streams[begin], begun[begin])
        lengths = inner.lengths(seeds, window)
        planned = lengths
        if stagger:
            cut = 1 + streams[begin] * lengths // stagger
            planned = torch.where(begun[begin] == 1, torch.minimum(cut, lengths), lengths)
        left = left.index_copy(0, begin, planned)
        count = min(int(left.min()), steps - done)
        stretches.append(Stretch(count, begin, seeds, lengths, torch.arange(len(left)), begun))
        left, done = left - count, done + count
    return stretches, {"left": left, "begun": begun}


def plan_episodes(
    inner: InnerProblem, carry: dict[str, Any], streams: Tensor, longest: int
) -> tuple[list[Stretch], Tensor]:
    """One whole episode of every copy, in stretches of at most ``longest`` steps; and the lengths [n]."""
    seeds = episode_seeds(int(carry["seed"]), streams, int(carry["windows"]))
    lengths = inner.lengths(seeds, int(carry["windows"]))
    begin, begun = torch.arange(len(streams)), torch.ones_like(streams)
    stretches: list[Stretch] = []
    done = 0
    for end in sorted(set(lengths.tolist())):
        running = (lengths >= end).nonzero().squeeze(1)
        stretch = Stretch(end - done, begin, seeds, lengths[begin], running, begun)
        stretches += stretch.pieces(longest)
        begin, seeds, done = begin[:0], seeds[:0], end
    return stretches, lengths


def portions(stretches: list[Stretch]) -> Tensor:
    """int64 [n, K]: how many episodes a copy has begun in this window after the first step's, before each step."""
    return torch.stack([s.begun - stretches[0].begun for s in stretches for _ in range(s.steps)], 1)


def episode_noise(seed: int, stretches: list[Stretch], own: Tensor, size: int, like: Tensor) -> Tensor:
    """Standard normal numbers [P, n, size]: for each portion of the window those of the episode that it belongs to.

    Rows of copies that have no such portion are 0.
    """
    first, last = stretches[0].begun, stretches[-1].begun
    noise = like.new_zeros(1 + int((last - first).max()), len(own), size)
    for p, rows in enumerate(noise):
        at = (last - first >= p).nonzero().squeeze(1)
        rows[at.to(like.device)] = copy_noise(seed, first[at] + p, own[at], size, like)
    return noise


def fresh_state(inner: InnerProblem, thetas: Tensor, like: Theta, seeds: Tensor, lengths: Tensor) -> dict[str, Any]:
    """State at step 0; thetas [b, S, D], seeds and lengths [b]."""
    b, signs = thetas.shape[:2]
    state = inner.start(
        from_vector(thetas.flatten(0, 1), like), seeds.repeat_interleave(signs), lengths.repeat_interleave(signs)
    )
    return _unflatten(state, b)


def run_stretch(
    inner: InnerProblem, thetas: Tensor, like: Theta, state: dict[str, Any], stretch: Stretch
) -> tuple[Tensor, dict[str, Any]]:
    """Losses [n, S, steps], 0 for copies that do not run, and the new state; differentiable in thetas and state."""
    n = len(thetas)
    if len(stretch.begin):
        at = stretch.begin.to(thetas.device)
        fresh = fresh_state(inner, thetas[at], like, stretch.seeds, stretch.lengths)
        state = fresh if len(at) == n else write_copies(state, at, fresh)
    if len(stretch.running) == n:
        return _run(inner, thetas, like, state, stretch.steps)
    at = stretch.running.to(thetas.device)
    some, ended = _run(inner, thetas[at], like, tree.index(state, at), stretch.steps)
    losses = some.new_zeros(n, *some.shape[1:]).index_copy(0, at, some)
    return losses, write_copies(state, at, ended)


def _run(
    inner: InnerProblem, thetas: Tensor, like: Theta, state: dict[str, Any], steps: int
) -> tuple[Tensor, dict[str, Any]]:
    flat = tree.map_tree(lambda leaf: leaf.flatten(0, 1), state)
    losses, new = inner.run(from_vector(thetas.flatten(0, 1), like), flat, steps)
    return losses.unflatten(0, thetas.shape[:2]), _unflatten(new, len(thetas))


def _unflatten(state: dict[str, Any], n: int) -> dict[str, Any]:
    unflattened: dict[str, Any] = tree.map_tree(lambda leaf: leaf.unflatten(0, (n, -1)), state)
    return unflattened
