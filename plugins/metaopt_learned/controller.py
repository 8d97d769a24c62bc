"""A learned policy that watches training and sets the hyperparameters of a hand-designed rule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor

from metaopt.learned import Theta
from metaopt.perparameter import random_layers, run_layers
from metaopt.rule import Context, HyperValues, ParamInfo, Params, PerParameter, State, compute_dtype, hp_of
from metaopt.space import option
from metaopt_learned.hand_designed import SteeredRule, progress

LOSS_DECAYS = (0.5, 0.9, 0.99)
SIZE_DECAY = 0.9
OBSERVATIONS = 8
LARGEST_CHANGE = math.log(1e4)
"""A hyperparameter stays within a factor of 10,000 of its start, so that a runaway policy can come back."""

# what a policy remembers, beside the steered rule's slots; prefixed because those may have any name
CHANGE, LOSS, SPREAD, SIZES, MOVED = (f"policy.{slot}" for slot in ("change", "loss", "spread", "sizes", "moved"))
SLOTS = (CHANGE, LOSS, SPREAD, SIZES, MOVED)


class Controller(SteeredRule):
    r"""Dynamic algorithm configuration: before every update a small network changes the learned hyperparameters.

    .. math::
        \Delta_t = \mathrm{clip}(\Delta_{t-1} + c \tanh(\mathrm{MLP}(o_t)), \pm \log 10^4), \qquad
        u_t = \theta_u + \Delta_t

    with u as in `SteeredRule` (multiplicative changes of lr and of 1 - beta) and c = ``max_change``. The observation o_t has:
    progress t / T; the trend of the loss, as the differences between it and three of its moving averages (decays 0.5, 0.9,
    0.99) over their spread; the logarithms of the root mean squares of the gradient and of the last update, and their
    differences from moving averages; and :math:`\Delta_{t-1}`.
    ``scope``: one policy state for the whole run, or one for each tensor, observing that tensor's gradient and update.
    Theta starts as a policy that changes nothing. Biedenkapp et al., 2020
    (https://doi.org/10.3233/FAIA200122); Daniel, Taylor and Nowozin, 2016,
    "Learning step size controllers for robust neural network training" (https://doi.org/10.1609/aaai.v30i1.10187).

    State: the steered rule's, and per parameter (equal for all of them where the scope is the run) ``policy.change`` [H],
    ``policy.loss`` [3], ``policy.spread`` [], ``policy.sizes`` [2] and ``policy.moved`` []; float32 or better.
    """

    needs_loss = True
    needs_horizon = True
    scope: str = option("run", choices=("run", "tensor"), doc="one policy for all tensors, or one for each")
    hidden: int = option(16, low=1, doc="width of the policy's hidden layer")
    max_change: float = option(0.1, doc="largest change c per step, in units of u")

    def init_theta(self, generator: Generator) -> Theta:
        """theta_u at the registered rule's values; the policy's second layer is zero, so that it changes nothing yet."""
        count = self._count()
        ((weight, bias),) = random_layers((OBSERVATIONS + count, self.hidden), generator)
        return {
            **self.unconstrained_defaults(),
            "policy.w0": weight,
            "policy.b0": bias,
            "policy.w1": torch.zeros(self.hidden, count),
            "policy.b1": torch.zeros(count),
        }

    def init(self, params: Params, info: Mapping[str, ParamInfo], theta: Theta) -> State:
        """The steered rule's state, and zeros for what the policy remembers."""
        state = super().init(params, info, theta)
        shapes = {CHANGE: (self._count(),), LOSS: (len(LOSS_DECAYS),), SPREAD: (), SIZES: (2,), MOVED: ()}
        return {
            name: {
                **slots,
                **{
                    slot: params[name].new_zeros(s, dtype=compute_dtype(params[name].dtype))
                    for slot, s in shapes.items()
                },
            }
            for name, slots in state.items()
        }

    def steered(self, theta: Theta, step: Tensor, horizon: Tensor | int | None) -> Mapping[str, Tensor]:
        """theta_u, before any change."""
        return {name: theta[name] for name in self.domains}

    def update(
        self, theta: Theta, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """See the class."""
        groups = [[name] for name in params] if self.scope == "tensor" else [list(params)] if params else []
        memories: dict[str, dict[str, Tensor]] = {}
        chosen: dict[str, HyperValues] = {}
        for group in groups:
            memory = self._act(theta, {name: grads[name] for name in group}, state, ctx)
            raw = self._changed(theta, memory[CHANGE])
            for name in group:
                memories[name] = memory
                chosen[name] = self.hyperparameters(raw, hp_of(hp, name)["lr"])
        alike = len(groups) == 1 and not isinstance(hp, PerParameter)
        values = next(iter(chosen.values())) if alike else PerParameter(chosen)
        own = {name: {slot: value for slot, value in state[name].items() if slot not in SLOTS} for name in params}
        new_params, new_state = self.steered_rule.update(grads, own, params, values, ctx)
        for group in groups:
            moved = log_root_mean_square([new_params[name] - params[name] for name in group])
            for name in group:
                remembered = {**memories[name], MOVED: moved}
                new_state[name] |= {slot: remembered[slot].to(state[name][slot]) for slot in SLOTS}
        return new_params, new_state

    def _count(self) -> int:
        """How many numbers are learned: a tuple has several."""
        return sum(u.numel() for u in self.unconstrained_defaults().values())

    def _changed(self, theta: Theta, change: Tensor) -> dict[str, Tensor]:
        """u of every learned hyperparameter after ``change`` [H]."""
        raw: dict[str, Tensor] = {}
        at = 0
        for name in self.domains:
            size = theta[name].numel()
            raw[name] = theta[name].to(torch.float64) + change[at : at + size].reshape(theta[name].shape)
            at += size
        return raw

    def _act(self, theta: Theta, grads: Params, state: State, ctx: Context) -> dict[str, Tensor]:
        """The policy's memory after it has observed and acted."""
        if ctx.loss is None:
            raise ValueError("Controller watches the loss; give it in the context, or call step(loss=loss)")
        old, step = newest(state, list(grads))
        dtype, device = old[CHANGE].dtype, old[CHANGE].device
        t = step if ctx.step is None else ctx.step
        loss = ctx.loss.to(device=device, dtype=dtype)
        # averages begin at the first value; that of updates is known at the second step
        decays = torch.tensor((*LOSS_DECAYS, SIZE_DECAY), dtype=dtype, device=device)
        loss_decays, size_decay = torch.where(t == 0, 0.0, decays[:-1]), torch.where(t < 2, 0.0, decays[-1])
        means = loss_decays * old[LOSS] + (1 - loss_decays) * loss
        spread = size_decay * old[SPREAD] + (1 - size_decay) * (loss - means[1]).abs()
        sizes = torch.stack([log_root_mean_square(list(grads.values())).to(dtype), old[MOVED]])
        mean_sizes = size_decay * old[SIZES] + (1 - size_decay) * sizes
        trend = (torch.cat([loss.reshape(1), means[:-1]]) - means) / (spread + 1e-8)
        done = 2 * progress(t, ctx.horizon).to(dtype) - 1
        seen = [done.reshape(1), torch.tanh(trend), sizes / 10, torch.tanh(sizes - mean_sizes), torch.tanh(old[CHANGE])]
        layers = tuple((theta[f"policy.w{i}"], theta[f"policy.b{i}"]) for i in (0, 1))
        action = self.max_change * torch.tanh(run_layers(layers, torch.cat(seen)))
        change = (old[CHANGE] + action).clamp(-LARGEST_CHANGE, LARGEST_CHANGE)
        return {CHANGE: change, LOSS: means, SPREAD: spread, SIZES: mean_sizes}


def newest(state: State, names: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
    """The policy's memory at the parameter with most updates, and their number: the others may have missed some."""
    device = state[names[0]]["step"].device
    steps = torch.stack([state[name]["step"].to(device) for name in names])
    at = steps.argmax().reshape(1)
    found = {}
    for slot in SLOTS:
        several = torch.stack([state[name][slot].to(state[names[0]][slot]) for name in names])
        found[slot] = several.index_select(0, at).squeeze(0)
    return found, steps.max()


def log_root_mean_square(tensors: Sequence[Tensor]) -> Tensor:
    """log of the root of the mean of all squares + 1e-16, 0-d; finite, as its derivative is, where all are 0."""
    total = sum(tensor.numel() for tensor in tensors)
    wide = [tensor.to(compute_dtype(tensor.dtype)) for tensor in tensors]
    squares = torch.stack([(tensor * tensor).sum().to(wide[0].device) for tensor in wide])
    return 0.5 * (squares.sum() / max(total, 1) + 1e-16).log()
