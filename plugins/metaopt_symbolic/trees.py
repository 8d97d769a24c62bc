"""The space of Neural Optimizer Search: updates that are small expression trees over moments of the gradient.

Bello et al., 2017 (https://arxiv.org/abs/1709.07417): an update is the last of a few blocks

.. math:: z_k = b_k(u_k(x_k), u'_k(x'_k)), \\qquad \\Delta w = \\lambda z_K,

whose operands x are moments, signs, directions of known optimizers, constants, parts of the weights, or earlier blocks; u are
functions of one argument, b of two. Of the paper's, noise and dropout are left out, for programs draw no random numbers; the
schedule stands for its several decays. PowerSign and AddSign, which it found, are `POWERSIGN` and `ADDSIGN`.

A tree is a `Genome` with a line for everything that a block may read, then three lines for each block, so that a change of
the tree changes one argument or function of one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metaopt_symbolic.analysis import valid
from metaopt_symbolic.genome import Assign, Genome
from metaopt_symbolic.language import NUMBER_OF
from metaopt_symbolic.population import CONSTANT, Genomes
from metaopt_symbolic.searchers import MAX_LENGTH, Evolution

TENSORS = ("w", "g", "m", "v", "c")
"""Parameter, gradient, and averages of the gradient, its square and its cube."""

_SHARED = (
    Assign("g2", "square", ("g",)),
    Assign("g3", "cube", ("g",)),
    Assign("m", "interpolate", ("g", "m", 0.9)),
    Assign("v", "interpolate", ("g2", "v", 0.999)),
    Assign("c", "interpolate", ("g3", "c", 0.999)),
    Assign("sign_g", "sign", ("g",)),
    Assign("sign_m", "sign", ("m",)),
    Assign("root", "sqrt", ("v",)),
    Assign("adam", "div", ("m", "root")),
    Assign("rmsprop", "div", ("g", "root")),
    *(Assign(f"decay{k}", "mul", ("w", 10.0**-k)) for k in (1, 2, 3, 4)),
)

OPERANDS: tuple[str | float, ...] = (
    "g", "g2", "g3", "m", "v", "c", "sign_g", "sign_m", 1.0, 2.0, "decay1", "decay2", "decay3", "decay4", "adam",
    "rmsprop", "lr",
)  # fmt: skip
"""What every block may read; ``lr`` is the schedule."""

UNARY: tuple[tuple[str, float], ...] = (
    ("copy", 0.0), ("negative", 0.0), ("exp", 0.0), ("log", 0.0), ("sqrt", 0.0), ("sign", 0.0),
    ("clip", 1e-5), ("clip", 1e-4), ("clip", 1e-3),
)  # fmt: skip
"""Function, and the bound of ``clip``; ``log`` and ``sqrt`` are of absolute values."""

BINARY = ("add", "sub", "mul", "div", "power", "copy")
"""``copy`` keeps the left one."""

RATES = tuple(10.0**k for k in range(-5, 2))
"""Of lambda."""


class Block(NamedTuple):
    """``binary(first(left), second(right))``; an operand ``z1`` is the first block."""

    left: str | float
    right: str | float
    first: tuple[str, float] = UNARY[0]
    second: tuple[str, float] = UNARY[0]
    binary: str = "copy"


def tree(blocks: Sequence[Block], rate: float) -> Genome:
    """The program of a tree whose last block, ``rate`` times the schedule, is the update."""
    body = [*_SHARED]
    for k, (left, right, first, second, binary) in enumerate(blocks, start=1):
        for name, operand, (function, bound) in ((f"x{k}", left, first), (f"y{k}", right, second)):
            body.append(Assign(name, function, (operand, bound) if function == "clip" else (operand,)))
        body.append(Assign(f"z{k}", binary, (f"x{k}",) if binary == "copy" else (f"x{k}", f"y{k}")))
    body.append(Assign("rate", "mul", ("lr", rate)))
    body.append(Assign("update", "mul", (f"z{len(blocks)}", "rate")))
    return Genome(TENSORS, ("lr",), ("update", *TENSORS[2:]), tuple(body))


POWERSIGN = (Block("sign_g", "sign_m", binary="mul"), Block("z1", "g", first=("exp", 0.0), binary="mul"))
"""exp(sign(g) sign(m)) g."""

ADDSIGN = (
    Block("sign_g", "sign_m", binary="mul"), Block("z1", 1.0, binary="add"), Block("z2", "g", binary="mul")
)  # fmt: skip
"""(1 + sign(g) sign(m)) g."""


class Trees(Evolution):
    """Aging evolution of trees from scratch: what the search starts from is only what it is compared with.

    A child differs from its parent in one operand, function or rate. Where no member of a tournament could be trained, as
    at the beginning, the child is a random tree.

    Args:
        blocks: of each tree, those included that the last one does not need.
        population: members.
        tournament: members that compete to be a parent.
        patience: candidates without improvement before a restart, as in `Evolution`; 0: never.

    Raises:
        ValueError: blocks outside [1, 10], or what `Evolution` refuses.
    """

    def __init__(self, blocks: int = 3, population: int = 1000, tournament: int = 2, patience: int = 0) -> None:
        if not 1 <= blocks <= 10:
            raise ValueError(f"blocks must be in [1, 10], got {blocks}")
        super().__init__(population, tournament, patience)
        self._space = _Space(blocks)

    def begin(self, start: Genome, fitness: float) -> None:
        """See `Searcher.begin`."""
        super().begin(self._space.plain, -np.inf)

    def ask(self, count: int, generator: np.random.Generator) -> tuple[Genomes, Genomes]:
        """See `Searcher.ask`."""
        chosen = self._chosen(count, generator)
        parents = self._members.select(chosen)
        children = self._space.children(parents, generator)
        lost = np.flatnonzero(self._fitness[chosen] == -np.inf)
        children.put(lost, self._space.random(len(lost), generator))
        return children, parents

    def welcome(self, genome: Genome, fitness: float) -> None:
        """See `Searcher.welcome`; what is missing of a tree makes no difference."""
        lines = {assign.target: assign for assign in genome.body}
        whole = tuple(lines.get(assign.target, assign) for assign in self._space.plain.body)
        super().welcome(Genome(TENSORS, ("lr",), self._space.plain.outputs, whole), fitness)


class _Space:
    """Trees of so many blocks as arrays of choices: int64 [N, tokens], five tokens for each block, then the rate."""

    def __init__(self, blocks: int) -> None:
        self.plain = tree([Block("g", "g")] * blocks, RATES[3])
        """Gradient descent."""
        self._genomes = Genomes.of([self.plain], MAX_LENGTH)
        number = self._genomes.variables.number
        own = [f"z{k}" for k in range(1, blocks)]
        self._read = np.array([CONSTANT if isinstance(x, float) else number[x] for x in (*OPERANDS, *own)])
        self._constants = np.array([x if isinstance(x, float) else 0.0 for x in (*OPERANDS, *own)])
        self._choices = np.array(
            [n for k in range(blocks) for n in (*[len(OPERANDS) + k] * 2, *[len(UNARY)] * 2, len(BINARY))]
            + [len(RATES)]
        )
        self._blocks = blocks

    def random(self, count: int, generator: np.random.Generator) -> Genomes:
        """Trees of which every choice is equally likely, but that an update must be a tensor."""
        trees = self._of(self._drawn(count, generator))
        while len(wrong := np.flatnonzero(~valid(trees))):
            trees.put(wrong, self._of(self._drawn(len(wrong), generator)))
        return trees

    def children(self, parents: Genomes, generator: np.random.Generator) -> Genomes:
        """Each with one other choice."""
        tokens, rows = self._tokens(parents), np.arange(len(parents))
        children, pending = parents.select(rows), rows
        while len(pending):
            changed = tokens[pending]
            place = generator.integers(len(self._choices), size=len(pending))
            choices, at = self._choices[place], (np.arange(len(pending)), place)
            changed[at] = (changed[at] + 1 + generator.integers(choices - 1)) % choices
            others = self._of(changed)
            good = valid(others)
            children.put(pending[good], others.select(good))
            pending = pending[~good]
        return children

    def _drawn(self, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
        return generator.integers(self._choices, size=(count, len(self._choices)))

    def _of(self, tokens: NDArray[np.int64]) -> Genomes:
        """Their trees, valid or not."""
        trees = self._genomes.select(np.zeros(len(tokens), np.int64))
        for k in range(self._blocks):
            line, own = len(_SHARED) + 3 * k, tokens[:, 5 * k : 5 * k + 5]
            for side in (0, 1):
                trees.args[:, line + side, 0] = self._read[own[:, side]]
                trees.constants[:, line + side, 0] = self._constants[own[:, side]]
                trees.functions[:, line + side] = _UNARY[own[:, 2 + side]]
                trees.constants[:, line + side, 1] = _BOUNDS[own[:, 2 + side]]
            trees.functions[:, line + 2] = _BINARY[own[:, 4]]
            copies = _BINARY[own[:, 4]] == NUMBER_OF["copy"]
            trees.args[:, line + 2, 0] = trees.targets[:, line]
            trees.args[:, line + 2, 1] = np.where(copies, CONSTANT, trees.targets[:, line + 1])
        trees.constants[:, self._rate, 1] = np.array(RATES)[tokens[:, -1]]
        return trees

    def _tokens(self, trees: Genomes) -> NDArray[np.int64]:
        """What `_of` made of them."""
        found: list[NDArray[Any]] = []
        for k in range(self._blocks):
            line = len(_SHARED) + 3 * k
            functions, args, constants = (
                array[:, line : line + 3] for array in (trees.functions, trees.args, trees.constants)
            )
            read = (args[:, :2, 0, None] == self._read) & (constants[:, :2, 0, None] == self._constants)
            unary = (functions[:, :2, None] == _UNARY) & (constants[:, :2, 1, None] == _BOUNDS)
            found += [read.argmax(-1), unary.argmax(-1), (functions[:, 2:, None] == _BINARY).argmax(-1)]
        rates = np.abs(np.log(trees.constants[:, self._rate, 1, None] / np.array(RATES))).argmin(-1)
        return np.concatenate([*found, rates[:, None]], axis=1)

    @property
    def _rate(self) -> int:
        return len(_SHARED) + 3 * self._blocks


_UNARY = np.array([NUMBER_OF[name] for name, _ in UNARY])
_BOUNDS = np.array([bound for _, bound in UNARY])
_BINARY = np.array([NUMBER_OF[name] for name in BINARY])
