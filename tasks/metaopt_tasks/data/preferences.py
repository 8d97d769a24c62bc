"""Procedural preference data: pairs of answers to random questions, ranked by a hidden reward."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor

from metaopt.task import Split
from metaopt_tasks.choices import require_choice
from metaopt_tasks.data.draws import categorical, normal, uniform
from metaopt_tasks.data.load import moved, split_rows

KINDS = ("clean", "noisy", "shuffled", "bradley_terry")
REWARDS = ("linear", "curved")
FLIPS = 0.2
"""Share of pairs that ``noisy`` data rank the wrong way round, unless they are told another."""
_DEMONSTRATIONS = 512
_FIT_STEPS, _FIT_RATE = 200, 0.5


def preferences(
    device: Any = "cpu",
    features: int = 8,
    actions: int = 4,
    kind: str = "clean",
    reward: str = "linear",
    examples: int = 3000,
    seed: int = 0,
    flips: float = FLIPS,
    noise: float = 1.0,
) -> dict[str, Split]:
    """Pairs of a preferred and a rejected answer, with all that is needed to train a policy on them and to judge it.

    Questions are standard normal, answers are drawn uniformly. The reference policy is a softmax regression that was
    fitted to demonstrations of a mediocre demonstrator, as in supervised fine-tuning. Rewards count from the best
    answer to each question (so 0 is best) in units of the reference's mean shortfall on train: a policy's mean reward
    is about -1 for the reference, 0 at best.

    Tensors: ``input``, ``rejected_input`` [N, features]; ``chosen``, ``rejected`` int64 [N]; ``reference``,
    ``rejected_reference`` [N, actions] log-probabilities at the two inputs; ``reward`` [N, actions] at ``input``.

    Args:
        device: of the tensors.
        features: of a question.
        actions: answers to choose from.
        kind: ``clean``: the better answer is the preferred one; ``noisy``: except in a share ``flips`` of the pairs;
            ``shuffled``: the two answers are to different questions, and ranked without regard to how easy those are;
            ``bradley_terry``: an answer is preferred with probability sigmoid(difference in reward / noise).
        reward: ``linear`` in the question, or ``curved``: a random network with one hidden layer.
        examples: pairs in all.
        seed: of everything.
        flips: share of pairs that ``noisy`` data rank the wrong way round, in [0, 0.5].
        noise: of ``bradley_terry``, in units of the hidden reward, whose standard deviation over questions is about 1; the
            share of pairs that are ranked the wrong way round is 16 % at 0.5, 26 % at 1, 35 % at 2.

    Raises:
        ValueError: an unknown kind or reward, flips outside [0, 0.5], or a noise that is not above 0.
    """
    require_choice("kind", kind, KINDS)
    require_choice("reward", reward, REWARDS)
    if not 0 <= flips <= 0.5:
        raise ValueError(f"flips must be in [0, 0.5], got {flips}; above a half the pairs say the opposite")
    if not noise > 0:
        raise ValueError(f"noise must be above 0, got {noise}; for none, choose kind='clean'")
    return moved(_preferences(features, actions, kind, reward, examples, seed, flips, noise), device)


@cache
def _preferences(
    features: int, actions: int, kind: str, reward: str, examples: int, seed: int, flips: float, noise: float
) -> dict[str, Split]:
    generator = Generator().manual_seed(seed)

    width = 4 * features
    inner = normal(generator, features, width) / math.sqrt(features)
    outer = normal(generator, width, actions) / math.sqrt(width)
    direct = normal(generator, features, actions) / math.sqrt(features)

    def score(x: Tensor) -> Tensor:
        return x @ direct if reward == "linear" else 2 * torch.sin(2 * x @ inner) @ outer

    questions = normal(generator, _DEMONSTRATIONS, features)
    shown = categorical(generator, score(questions))
    weight = _softmax_regression(questions, shown, actions)

    x = normal(generator, examples, features)
    other = x.roll(1, 0) if kind == "shuffled" else x
    one = torch.randint(actions, (examples,), generator=generator)
    step = torch.randint(1, actions, (examples,), generator=generator)
    two = (one + step) % actions  # never the same answer twice
    ahead = (score(x).gather(1, one[:, None]) - score(other).gather(1, two[:, None])).squeeze(1)
    first = ahead > 0
    if kind == "bradley_terry":
        first = uniform(generator, examples) < torch.sigmoid(ahead / noise)
    if kind == "noisy":
        first = first ^ (uniform(generator, examples) < flips)
    preferred = torch.where(first[:, None], x, other)
    beaten = torch.where(first[:, None], other, x)
    shortfall = score(preferred) - score(preferred).amax(1, keepdim=True)
    data = split_rows({
        "input": preferred, "rejected_input": beaten,
        "chosen": torch.where(first, one, two), "rejected": torch.where(first, two, one),
        "reference": (preferred @ weight).log_softmax(1), "rejected_reference": (beaten @ weight).log_softmax(1),
        "reward": shortfall,
    })  # fmt: skip
    train = data["train"].tensors
    unit = -(train["reference"].exp() * train["reward"]).sum(1).mean()
    return {name: Split(_scaled(split.tensors, unit)) for name, split in data.items()}


def _scaled(tensors: dict[str, Tensor], unit: Tensor) -> dict[str, Tensor]:
    tensors = tensors | {"reward": tensors["reward"] / unit}
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def _softmax_regression(x: Tensor, label: Tensor, classes: int) -> Tensor:
    """Weights [features, classes] after some full-batch gradient steps from zero on the mean cross-entropy."""
    weight = x.new_zeros(x.shape[1], classes)
    target = torch.nn.functional.one_hot(label, classes).to(x.dtype)
    for _ in range(_FIT_STEPS):
        weight = weight - _FIT_RATE * x.T @ ((x @ weight).softmax(1) - target) / len(x)
    return weight
