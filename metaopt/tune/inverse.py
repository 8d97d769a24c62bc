"""Methods that differentiate the optimum of the inner loss g, by the implicit function theorem.

At a stationary point w of g: ``dF/dl = d outer/dl - (d^2 g / dl dw) q`` with ``H q = d outer/dw``, H the Hessian of g in w.
They differ in how they solve for q. All tensors of w are coupled. Iterations are counted out beforehand and nothing waits for
the device, so all of them run under ``vmap``. Hyperparameters of the optimizer, which the optimum does not know, are refused.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from metaopt import tree
from metaopt.random import uniform
from metaopt.rule import Params, State
from metaopt.space import hyper, option
from metaopt.tune.derivatives import add, bare, depends, flattened, floating, norm, relative, vjp, zeros
from metaopt.tune.hypergradient import Cost, Facts, Hypergradient, Method, Outer, inner_gradients
from metaopt.tune.inner import Hypers, Inner, scalar
from metaopt.tune.linear_solve import Product, conjugate_gradient, largest_eigenvalue, neumann_series


class _Implicit(Method):
    needs: ClassVar[tuple[str, ...]] = ("second", "loss")
    implicit: ClassVar[bool] = True

    def run(self, inner: Inner, outer: Outer, hypers: Hypers) -> Hypergradient:
        """Train, solve for q, and multiply by the mixed derivatives."""
        state = inner.advance(inner.start(hypers), hypers, 0, inner.steps)
        params = inner.params(state)
        value, pull = vjp(
            lambda w, h: scalar(outer(w, h)), params, hypers, names=["params", "hypers"], second_order=False
        )
        right, direct = pull(torch.ones_like(value))
        gradients, hessian = vjp(lambda w: inner_gradients(inner, w, hypers), params, names=["params"], repeated=True)
        q, residual = self.solve(lambda v: hessian(v)[0], right)
        unused: set[str] = set()
        _, mixed = vjp(lambda h: inner_gradients(inner, params, h), hypers, names=["hypers"], proven=unused)
        (through,) = mixed(q)
        grads = add(direct, through, -1.0)
        refuse_optimizer_hypers(inner, state, hypers, unused)
        diagnostics = {"stationarity": norm(gradients), "residual": residual}
        return Hypergradient(value, grads, params, state, diagnostics)

    @abstractmethod
    def solve(self, hessian: Product, right: Params) -> tuple[Params, Tensor]:
        """``H q = right``: q and the relative residual, 0-d."""

    @abstractmethod
    def products(self, facts: Facts) -> int:
        """How many products with the Hessian ``solve`` takes."""

    def cost(self, facts: Facts) -> Cost:
        """Training and the products."""
        return Cost(facts.steps + 1.5 * self.products(facts) + 3, facts.step_bytes + 6 * facts.params_bytes)


def optimizer_hypers(inner: Inner, state: State, hypers: Hypers, unused: set[str]) -> set[str]:
    """Which of the hypers that the inner loss does not use act on the steps all the same: a learning rate, say."""
    if not unused or not inner.steps:
        return set()
    last = inner.steps - 1
    return depends(lambda h: inner.step(state, h, last), [hypers], ["hypers"], unused)


def start_hypers(inner: Inner, hypers: Hypers, unused: set[str]) -> set[str]:
    """Which of the hypers that nothing else uses act on the start of the run."""
    return depends(inner.start, [hypers], ["hypers"], unused) if unused else set()


def refuse_start_hypers(inner: Inner, hypers: Hypers, unused: set[str]) -> None:
    """Refuse those, of which methods that do not go back to the start know nothing: a zero that the run contradicts."""
    acting = start_hypers(inner, hypers, unused)
    if acting:
        raise ValueError(
            f"{min(acting)} acts on the start of the run, which this method does not see; use one that differentiates the run, "
            f"such as 'replay', or 'es'"
        )


def refuse_optimizer_hypers(inner: Inner, state: State, hypers: Hypers, unused: set[str]) -> None:
    """Refuse those hypers: their derivative through the inner loss would be a zero that the run contradicts."""
    refuse_start_hypers(inner, hypers, unused)
    optimizers = optimizer_hypers(inner, state, hypers, unused)
    if optimizers:
        raise ValueError(
            f"{min(optimizers)} acts on the steps but not on the inner loss, whose derivatives are all that this method takes; "
            f"use one that differentiates the run, such as 'replay', or 'es'"
        )


class ConjugateGradient(_Implicit):
    """``q = H^-1 d outer/dw`` by conjugate gradients: exact for a stationary w after as many iterations as w has entries.

    With an inner gradient of norm e and a relative residual e the error is O(e) (Pedregosa 2016, theorem 1: HOAG, which lets e
    fall along the outer steps, see `tolerances`). H must be positive definite; ``damping`` adds a multiple of the identity, as
    iMAML does. ``iterations`` products with H; memory is that of one gradient, whatever T.
    """

    iterations: int = option(20, low=1, doc="products with the Hessian, at most")
    tolerance: float = hyper(0.0, 0.0, 1.0, open_high=True, doc="stop at this relative residual")
    damping: float = hyper(0.0, 0.0, doc="added to all eigenvalues")

    def solve(self, hessian: Product, right: Params) -> tuple[Params, Tensor]:
        """By conjugate gradients."""
        return conjugate_gradient(
            lambda v: add(hessian(v), v, self.damping) if self.damping else hessian(v),
            right,
            self.iterations,
            self.tolerance,
        )

    def products(self, facts: Facts) -> int:
        """One per iteration."""
        return self.iterations


class Neumann(_Implicit):
    """``q = e sum_{j < terms} (I - e H)^j d outer/dw``: the same numbers as ``terms`` truncated steps of SGD with rate e at w.

    The error falls by ``1 - e a`` per term, a being the smallest eigenvalue of H (Lorraine et al. 2020). It diverges from
    ``e = 2 / L`` on: L is estimated by power iteration, and such an e refused.
    """

    terms: int = option(20, low=1, doc="terms of the series")
    step: float = hyper(0.0, 0.0, doc="e; 0: 1 / L")
    power_iterations: int = option(20, low=1, doc="for L")

    def solve(self, hessian: Product, right: Params) -> tuple[Params, Tensor]:
        """By the series."""
        largest = largest_eigenvalue(hessian, right, self.power_iterations)
        if self.step and self.step * (top := float(bare(largest).max())) >= 2:
            raise ValueError(
                f"step must be below 2 / L = {2 / top:.3g} for the Neumann series to converge, got {self.step:g}; "
                f"step=0 takes 1 / L"
            )
        return neumann_series(hessian, right, self.terms, self.step or 1 / torch.where(largest > 0, largest, 1))

    def products(self, facts: Facts) -> int:
        """One per term, and those for L."""
        return self.terms + self.power_iterations


class Nystrom(_Implicit):
    """``q = (H_k + rho I)^-1 d outer/dw`` with the Nyström approximation H_k = C M^+ C' of H (Hataya and Yamada 2023).

    C: k columns of H; M: the rows of C of the same indices. Exact up to rho where ``rank`` is the size of w. Memory k P.
    """

    rank: int = option(20, low=1, doc="columns")
    rho: float = hyper(1e-2, 0.0, open_low=True, scale="log", doc="added to all eigenvalues")
    seed: int = option(0, low=0, doc="of the choice of columns; an outer loop adds its step")

    def solve(self, hessian: Product, right: Params) -> tuple[Params, Tensor]:
        """By the inverse of a diagonal and a low rank, in the basis of the latter."""
        flat, put_back = flattened(right)
        chosen = uniform(torch.tensor(self.seed, device=flat.device), flat.shape).argsort()[: self.rank]
        units = torch.nn.functional.one_hot(chosen, len(flat)).to(flat.dtype)
        columns = torch.stack([flattened(hessian(put_back(unit)))[0] for unit in units], 1)
        within = columns[chosen]
        values, vectors = torch.linalg.eigh((within + within.mT) / 2)
        floor = values.abs().amax() * len(flat) * torch.finfo(flat.dtype).eps
        root = torch.where(values > floor, values, torch.inf).rsqrt()  # the pseudo-inverse of the positive part
        basis, singular, _ = torch.linalg.svd(columns @ (vectors * root), full_matrices=False)
        inside = basis.mT @ flat
        q = put_back(basis @ (inside / (self.rho + singular**2)) + (flat - basis @ inside) / self.rho)
        return q, relative(add(hessian(q), right, -1.0), right)

    def products(self, facts: Facts) -> int:
        """One per column."""
        return min(self.rank, facts.parameters) + 1

    def cost(self, facts: Facts) -> Cost:
        """Products, and the columns with their singular vectors."""
        cost = super().cost(facts)
        return Cost(cost.time, cost.bytes + 3 * self.rank * facts.params_bytes)


class Identity(_Implicit):
    """``q = scale * d outer/dw``, as if H were a multiple of the identity (Luketina et al. 2016, T1-T2).

    Exact where ``H = I / scale``; elsewhere biased, and usually still a direction of descent.
    """

    scale: float = hyper(1.0, 0.0, open_low=True, doc="of the inverse")

    def solve(self, hessian: Product, right: Params) -> tuple[Params, Tensor]:
        """Nothing to solve."""
        q = tree.map_tree(lambda leaf: self.scale * leaf, right)
        return q, relative(add(hessian(q), right, -1.0), right)

    def products(self, facts: Facts) -> int:
        """That of the residual."""
        return 1


class FixedPoint(Method):
    """``v = sum_{j < iterations} (dstep/ds')^j d outer/ds``, ``dF/dl = d outer/dl + dstep/dl' v`` at the last state.

    For any contraction whose fixed point the run approaches, losses or not: an implicit layer, a recurrent network, SGD with
    momentum (s holds the momentum). The error falls like rho^iterations, rho being the factor of the contraction (Grazzi et al.
    2020, theorem 2.1). The derivatives are those of the last step, taken at the state after it.
    """

    implicit: ClassVar[bool] = True

    iterations: int = option(20, low=1, doc="adjoints of a step")

    def run(self, inner: Inner, outer: Outer, hypers: Hypers) -> Hypergradient:
        """Train, then iterate the adjoint of the last step."""
        state = inner.advance(inner.start(hypers), hypers, 0, inner.steps)
        value, pull = vjp(
            lambda s, h: scalar(outer(inner.params(s), h)), state, hypers, names=["state", "hypers"], second_order=False
        )
        right, direct = pull(torch.ones_like(value))
        at = max(inner.steps - 1, 0)
        new, back = vjp(lambda s: inner.step(s, hypers, at), state, names=["state"], repeated=True)
        total, term, norms = zeros(right), right, [norm(right)]
        for _ in range(self.iterations):
            total = add(total, term)
            (term,) = back(term)
            norms.append(norm(term))
        unused: set[str] = set()
        _, through = vjp(lambda h: inner.step(state, h, at), hypers, names=["hypers"], proven=unused)
        grads = add(direct, *through(total))
        refuse_start_hypers(inner, hypers, unused)
        moved = norm(add(floating(new), floating(state), -1.0))
        diagnostics = {"moved": moved, "residual": relative(term, right), "adjoint_norms": torch.stack(norms)}
        return Hypergradient(value, grads, inner.params(state), state, diagnostics)

    def cost(self, facts: Facts) -> Cost:
        """Training, and adjoints of one graph."""
        return Cost(facts.steps + 1.5 * self.iterations + 3, facts.step_bytes + 6 * facts.state_bytes)


def tolerances(first: float, decay: float, outer_step: int) -> float:
    """HOAG's ``first * decay^outer_step``, in [0, 1): a summable sequence of tolerances e_k (Pedregosa 2016, section 4).

    Solve the inner problem to an inner gradient of norm e_k, and the linear system by ``tolerance=e_k``.

    Raises:
        ValueError: ``first`` outside (0, 1), or ``decay`` outside (0, 1), with which the sum would be infinite.
    """
    for name, value in (("first", first), ("decay", decay)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must be in (0, 1), got {value}; for example 0.1 and 0.9")
    return first * decay**outer_step
