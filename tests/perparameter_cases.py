"""Rules with per-parameter networks of all sorts, and shapes to step: what the tests of their executions run on."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor

from metaopt.learned import Theta
from metaopt.perparameter import Features, PerParameterRule, Prepared, Slots, random_layers
from metaopt.rule import Context, HyperValues, Params, State
from metaopt_learned.adafac_mlp import AdafacMLP

SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (), "one": (1,), "vector": (97,), "wide": (5, 150), "tall": (70, 3), "row": (1, 9), "column": (7, 1),
    "square": (12, 12), "conv": (8, 6, 3, 3), "conv_3d": (4, 3, 5, 2, 2), "kernel_first": (3, 3, 10, 6),
}  # fmt: skip


class Synthetic(PerParameterRule):
    """A rule of any features and layer sizes, with decays that float32 holds exactly."""

    seen: ClassVar[Features]
    hidden: ClassVar[tuple[int, ...]] = (6,)
    exponent: ClassVar[float | None] = 0.5
    outputs: ClassVar[int] = 2

    @property
    def features(self) -> Features:
        return self.seen

    @property
    def magnitude(self) -> float | None:
        return self.exponent

    def init_theta(self, generator: Generator) -> Theta:
        theta = {}
        for kind, inputs in (("matrix", self.seen.count((2, 2))), ("vector", self.seen.count((2,)))):
            for i, (weight, bias) in enumerate(random_layers((inputs, *self.hidden, self.outputs), generator)):
                noise = torch.randn(bias.shape, generator=generator)
                theta |= {f"{kind}_w{i}": weight, f"{kind}_b{i}": bias + 0.1 * noise}
        return theta

    def prepare(self, theta: Theta, state: State, params: Params, hp: HyperValues, ctx: Context) -> Prepared:
        like = next(iter(theta.values()))
        counts = {"momentum": self.seen.momentum, "rms": self.seen.rms, "factored": self.seen.factored}
        decays = {kind: 1 - 0.5 ** torch.arange(1.0, n + 1).to(like) for kind, n in counts.items() if n}
        kinds = {name: "matrix" if p.dim() > 1 else "vector" for name, p in params.items()}
        indices = range(len(self.hidden) + 1)
        layers = {
            n: tuple((theta[f"{kind}_w{i}"], theta[f"{kind}_b{i}"]) for i in indices) for n, kind in kinds.items()
        }
        late = 1 / (1 + (ctx.step if ctx.step is not None else torch.zeros(())).to(like.dtype))
        return Prepared(
            decays, layers, {name: 0.1 * late for name in params}, {name: 1 - 0.01 * late for name in params}, {}
        )


FACTORED = ("factored_g", "row", "col", "rsqrt_row", "rsqrt_col", "factored_m")


class Everything(Synthetic):
    """Every block, three hidden layers of odd widths."""

    seen = Features(
        ("g", "clipped_g", "p", "log_abs_p", "m", "v", "m_r", "r", "g_r", *FACTORED), 2, 2, 2, clip=1.5, rms_eps=1e-3,
        diagonal_eps=1e-4, norm_eps=1e-6,
    )  # fmt: skip
    hidden = (5, 9, 3)


class FirstBlocksForVectors(Synthetic):
    """Vectors have the first two blocks only; one second moment divides all momenta; axes as in JAX; no exponent."""

    seen = Features(("m_r", "g", *FACTORED[::-1], "p"), 3, 1, 3, vector_blocks=2, layout="jax", nan_to_zero=True)
    exponent = None
    outputs = 1


class MomentaOnly(Synthetic):
    """No factored moments, so that matrices are like vectors; no hidden layer."""

    seen = Features(("p", "m"), 4, 0, 0)
    hidden = ()


class OwnFinish(Synthetic):
    """The step is a function of three outputs, of the parameter and of the accumulators."""

    seen = Features(("g", "col", "factored_g"), 1, 0, 1)
    outputs = 3

    def finish(self, outputs: Tensor, param: Tensor, slots: Slots, scale: Tensor, keep: Tensor) -> Tensor:
        return keep * param - scale * (
            outputs[0] * slots["momentum"][0] + outputs[2] / (1 + outputs[1].square().mean())
        )


class Matrices(Synthetic):
    """Each position of a kernel has norms of its own, which C++ knows where it is factored so too."""

    seen = Features(("r", "p", *FACTORED), 2, 1, 2, norm="matrix")


RULES: dict[str, PerParameterRule] = {
    "adafac_4": AdafacMLP(hidden=4), "adafac_32": AdafacMLP(hidden=32), "everything": Everything(),
    "first_blocks_for_vectors": FirstBlocksForVectors(), "momenta_only": MomentaOnly(), "own_finish": OwnFinish(),
    "matrices": Matrices(),
}  # fmt: skip
