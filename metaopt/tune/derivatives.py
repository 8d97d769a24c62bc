"""Derivatives of functions of trees, which never take a missing gradient for a zero.

Plain autograd is used outside `torch.func`'s transforms, since it is faster and leaner; inside of them `torch.func` is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from metaopt import tree
from metaopt.random import uniform
from metaopt.tree import Tree

Pull = Callable[[Tree], tuple[Tree, ...]]
"""Cotangent of a function's value -> cotangents of its inputs; trees of the floating-point leaves."""


class MissingGradient(RuntimeError):
    """A function depends on the input that is named, but there is no derivative with respect to it."""

    def __init__(self, path: str, second_order: bool = True) -> None:
        without = (
            "a compiled or fused function without second derivatives, or a detach(), is in the way; give the step a vjp, or "
            "use a method that needs no second derivatives (darts, sama, penalty, es)"
            if second_order
            else "a detach(), or an operation that has none, is in the way (of the outer objective, for params and state); use "
            "es, which needs none"
        )
        super().__init__(f"the result depends on {path} but has no derivative with respect to it: {without}")


def transformed() -> bool:
    """Whether a transform of `torch.func` is active, inside which plain autograd cannot start."""
    return torch._C._are_functorch_transforms_active()


def floating(given: Tree) -> Tree:
    """The tree of the floating-point leaves: those that can be differentiated."""
    if isinstance(given, dict):
        kept = {name: floating(value) for name, value in given.items()}
        return {name: value for name, value in kept.items() if isinstance(value, Tensor) or value}
    return given if given.is_floating_point() else None


def filled(given: Tree, leaves: Tree) -> Tree:
    """``given`` with ``leaves``, as `floating` took them out, in their places."""
    if isinstance(given, dict):
        return {name: filled(value, leaves[name]) if name in leaves else value for name, value in given.items()}
    return leaves


def _with_leaves(inputs: Sequence[Tree], leaves: Sequence[Tensor]) -> list[Tree]:
    rest = iter(leaves)
    return [filled(given, tree.map_tree(lambda _: next(rest), floating(given))) for given in inputs]


def like(given: Tree, leaves: Sequence[Tensor]) -> Tree:
    """A tree of the structure of ``given`` with these leaves."""
    rest = iter(leaves)
    return tree.map_tree(lambda _: next(rest), given)


def paths(given: Tree, prefix: str = "") -> list[str]:
    """What messages call each leaf, such as ``params['w']``."""
    if isinstance(given, dict):
        return [path for name, value in given.items() for path in paths(value, f"{prefix}[{name!r}]")]
    return [prefix]


def flattened(given: Tree) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """All leaves as one vector [D], and the way back."""
    parts = list(tree.leaves(given))
    sizes = [leaf.numel() for leaf in parts]

    def put_back(vector: Tensor) -> Tree:
        pieces = zip(torch.split(vector, sizes), parts, strict=True)
        return like(given, [piece.reshape(leaf.shape).to(leaf.dtype) for piece, leaf in pieces])

    return torch.cat([leaf.reshape(-1) for leaf in parts]), put_back


def dot(a: Tree, b: Tree) -> Tensor:
    """The inner product of two trees of one structure."""
    return torch.stack([(x * y).sum() for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True)]).sum()


def norm(a: Tree) -> Tensor:
    """The Euclidean norm of all leaves together; 0 of an empty tree."""
    parts = [torch.linalg.vector_norm(leaf) for leaf in tree.leaves(a)]
    return torch.linalg.vector_norm(torch.stack(parts)) if parts else torch.zeros(())


def relative(a: Tree, b: Tree) -> Tensor:
    """The norm of ``a`` over that of ``b``; that of ``a`` where b is zero."""
    size = norm(b)
    return norm(a) / torch.where(size > 0, size, 1)


def add(a: Tree, b: Tree, scale: float | Tensor = 1.0) -> Tree:
    """``a + scale * b``, leaf by leaf."""
    return tree.map_tree(lambda x, y: x + scale * y, a, b)


def zeros(given: Tree) -> Tree:
    """Zeros of the shapes of all leaves."""
    return tree.map_tree(torch.zeros_like, given)


def vjp(
    function: Callable[..., Any], *inputs: Tree, names: Sequence[str], has_aux: bool = False, second_order: bool = True,
    proven: set[str] | None = None, repeated: bool = False, differentiable: bool = False,
) -> tuple[Any, Pull]:  # fmt: skip
    """Value of ``function(*inputs)`` and its pullback.

    Args:
        function: of trees to a tree; with ``has_aux`` to a pair whose second part is not differentiated.
        inputs: where.
        names: what messages call the inputs.
        has_aux: see ``function``.
        second_order: whether ``function`` takes gradients itself. Such gradients can get lost (a compiled function has no
            second derivatives), so an input without a derivative is held for unused only if the value does not change, bit for
            bit, when the input does. Plain functions lose none, or all: without, this is asked where nothing of the first input
            has a derivative.
        proven: inputs that have been shown to be unused; the pullback adds to it.
        repeated: whether the pullback may be called more than once.
        differentiable: whether value and pullback themselves are to have derivatives; always so inside transforms.

    Returns:
        The value (a pair with ``has_aux``), detached unless ``differentiable``, and ``cotangent -> cotangents of the inputs``.

    Raises:
        MissingGradient: by the pullback: an input has no derivative and is not unused.
    """
    known = set() if proven is None else proven
    taken = [floating(given) for given in inputs]
    named, of_first = _paths(taken, names), set(_paths(taken[:1], names[:1]))

    def settle(grads: Sequence[Tensor | None]) -> None:
        """Refuse what is missing, unless it is proven to be unused."""
        lacking = {path for path, grad in zip(named, grads, strict=True) if grad is None}
        missing = lacking - known
        if missing and (second_order or of_first <= lacking):
            used = depends(function, inputs, names, missing, has_aux)
            if used:
                raise MissingGradient(min(used), second_order)
        known.update(missing)

    if differentiable or transformed():
        return _functional_vjp(function, inputs, has_aux, lambda i: named[i] in known, settle)
    with torch.enable_grad():
        leaves = [tree.map_tree(lambda leaf: leaf.detach().requires_grad_(), part) for part in taken]
        result = function(*map(filled, inputs, leaves))
    value = result[0] if has_aux else result

    def pull(cotangent: Tree) -> tuple[Tree, ...]:
        flat = [leaf for part in leaves for leaf in tree.leaves(part)]
        heads = zip(tree.leaves(floating(value)), tree.leaves(cotangent), strict=True)
        recorded = [(head, bar) for head, bar in heads if head.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(flat)
        if recorded and flat:
            outputs, bars = zip(*recorded, strict=True)
            found = torch.autograd.grad(outputs, flat, bars, retain_graph=repeated, allow_unused=True)
        settle(found)
        grads = iter([torch.zeros_like(leaf) if g is None else g for leaf, g in zip(flat, found, strict=True)])
        return tuple(tree.map_tree(lambda _: next(grads), part) for part in leaves)

    return tree.map_tree(lambda leaf: leaf.detach(), value) if not has_aux else _detached_pair(result), pull


def _detached_pair(result: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
    return tree.detach(result[0]), tree.detach(result[1])


def _functional_vjp(
    function: Callable[..., Any], inputs: tuple[Tree, ...], has_aux: bool, unused: Callable[[int], bool],
    settle: Callable[[Sequence[Tensor | None]], None],
) -> tuple[Any, Pull]:  # fmt: skip
    parts = [floating(given) for given in inputs]
    flat = [leaf for part in parts for leaf in tree.leaves(part)]

    def of_leaves(leaves: Sequence[Tensor]) -> Any:
        result = function(*_with_leaves(inputs, leaves))
        value, aux = result if has_aux else (result, {})
        return floating(value), (value, aux)

    def recorded(i: int) -> bool:
        """Whether the value's graph knows leaf i: `torch.func` gives zeros where it does not."""
        seen: list[bool] = []

        def of_leaf(leaf: Tensor) -> Tree:
            value, level = of_leaves([*flat[:i], leaf, *flat[i + 1 :]])[0], torch._C._functorch.maybe_get_level
            seen.extend(out.requires_grad and level(out) == level(leaf) for out in tree.leaves(value))
            return value

        torch.func.vjp(of_leaf, flat[i])
        return any(seen)

    found: Any = torch.func.vjp(of_leaves, flat, has_aux=True)
    _, pull, (value, aux) = found

    def checked(cotangent: Tree) -> tuple[Tree, ...]:
        (grads,) = pull(cotangent)
        zero = vanish(grads)
        settle([None if zero[i] and (unused(i) or not recorded(i)) else grad for i, grad in enumerate(grads)])
        rest = iter(grads)
        return tuple(tree.map_tree(lambda _: next(rest), part) for part in parts)

    return ((value, aux) if has_aux else value), checked


def refuse_lost_tangents(
    function: Callable[..., Tree], inputs: Sequence[Tree], names: Sequence[str], suspects: Sequence[bool]
) -> None:
    """Refuse what acts on the value while its tangents do not reach it: forward mode gives zeros there.

    Raises:
        MissingGradient: naming the first of the ``suspects`` (one bool per floating-point leaf) of which that is so.
    """
    parts = [floating(given) for given in inputs]
    flat = [leaf for part in parts for leaf in tree.leaves(part)]

    def lost(i: int) -> bool:
        reached: list[bool] = []

        def of_leaf(leaf: Tensor) -> Tree:
            value = floating(function(*_with_leaves(inputs, [*flat[:i], leaf, *flat[i + 1 :]])))
            reached.extend(forward_ad.unpack_dual(out, level=0).tangent is not None for out in tree.leaves(value))
            return value

        with torch.enable_grad():
            torch.func.jvp(of_leaf, (flat[i],), (torch.ones_like(flat[i]),))
        return not any(reached)

    missing = {path for i, path in enumerate(_paths(parts, names)) if suspects[i] and lost(i)}
    used = depends(function, inputs, names, missing) if missing else set()
    if used:
        raise MissingGradient(min(used))


def vanish(given: Sequence[Tensor]) -> list[bool]:
    """Which of the tensors are zero everywhere, in all copies that transforms of `torch.func` hold."""
    return torch.stack([~bare(leaf).any() for leaf in given]).tolist() if given else []


def bare(given: Tensor) -> Tensor:
    """What the wrappers of `torch.func` wrap."""
    while torch._C._functorch.is_functorch_wrapped_tensor(given):
        given = torch._C._functorch.get_unwrapped(given)
    return given


def _paths(leaves: Sequence[Tree], names: Sequence[str]) -> list[str]:
    return [path for part, name in zip(leaves, names, strict=True) for path in paths(part, name)]


def depends(
    function: Callable[..., Any], inputs: Sequence[Tree], names: Sequence[str], of: set[str] | None = None,
    has_aux: bool = False,
) -> set[str]:  # fmt: skip
    """Which of the inputs ``of`` (named as by `vjp`; None: all) change the value, bit for bit, when they change a little."""
    parts = [floating(given) for given in inputs]
    flat = [leaf.detach() for part in parts for leaf in tree.leaves(part)]

    def value(flat: Sequence[Tensor]) -> list[Tensor]:
        result = function(*_with_leaves(inputs, flat))
        return [bare(leaf.nan_to_num()) for leaf in tree.leaves(floating(result[0] if has_aux else result))]

    found = set()
    with torch.no_grad():
        before = value(flat)
        for i, path in enumerate(_paths(parts, names)):
            if of is None or path in of:
                # unevenly, as a softmax does not see an even shift
                shift = uniform(torch.tensor(i, device=flat[i].device), flat[i].shape, dtype=flat[i].dtype)
                after = value([*flat[:i], flat[i] + 1e-3 * (1 + flat[i].abs()) * shift, *flat[i + 1 :]])
                if not all(map(torch.equal, before, after)):
                    found.add(path)
    return found
