"""The contract of an optimizer: a pure update rule over named tensors.

Three ways to write one, from most general to least typing: `UpdateRule` (whole tree), `TensorRule` (one tensor),
`ElementwiseRule` (arithmetic on one tensor; the engine derives foreach, C++ and source text from it).
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, dataclass_transform

import torch
from torch import Tensor

from metaopt.space import Hyper, Option, declarations

if TYPE_CHECKING:
    from metaopt.program.program import Program

Params = dict[str, Tensor]
State = dict[str, Any]
"""Per parameter: ``state[name] = {"step": 0-d int64, slot: Tensor, ...}``; tensors only, so it stacks, vmaps and saves."""

HyperValues = Mapping[str, Any]
"""Hyperparameter name -> float, 0-d tensor, or tuple of them. Always an argument, never a closure."""


@dataclass(frozen=True)
class ParamInfo:
    """Static facts of one parameter.

    Attributes:
        shape: as torch lays it out: (out, in, *kernel) for weights.
        role: ``hidden``, ``input``, ``output``, ``embedding``, ``bias``, ``norm`` or ``scalar``.
        fan_in, fan_out: inputs and outputs of one unit. fan_in is 1 for vectors, and for an embedding [tokens, width],
            where one token is on at a time; its fan_out is width.
    """

    shape: tuple[int, ...]
    role: str
    fan_in: int
    fan_out: int


ROLES = ("hidden", "input", "output", "embedding", "bias", "norm", "scalar")
_NAME_HINTS = {
    "embedding": ("emb", "wte", "wpe"),
    "output": ("head", "classifier", "fc_out", "unembed", "output"),
    "input": ("input", "stem", "patch"),
}


def infer_info(params: Mapping[str, Tensor], roles: Mapping[str, str] | None = None) -> dict[str, ParamInfo]:
    """Facts of each parameter from its shape and name; ``roles`` (name -> role) overrides the guess.

    Raises:
        ValueError: an unknown role.
    """
    found = {}
    for name, param in params.items():
        role = (roles or {}).get(name) or _guess_role(name, tuple(param.shape))
        if role not in ROLES:
            raise ValueError(f"role of {name!r} must be one of {', '.join(ROLES)}, got {role!r}")
        found[name] = ParamInfo(tuple(param.shape), role, *fans(tuple(param.shape), role))
    return found


def fans(shape: tuple[int, ...], role: str) -> tuple[int, int]:
    """fan_in and fan_out of a parameter of torch's layout; see `ParamInfo`."""
    if role == "embedding" and len(shape) > 1:
        return 1, math.prod(shape[1:])
    kernel = math.prod(shape[2:])
    return shape[1] * kernel if len(shape) > 1 else 1, shape[0] * kernel if shape else 1


def _guess_role(name: str, shape: tuple[int, ...]) -> str:
    if not shape:
        return "scalar"
    if len(shape) == 1:
        return "bias" if name.endswith("bias") or name.split(".")[-1].startswith("b") else "norm"
    for role, hints in _NAME_HINTS.items():
        if any(hint in name.lower() for hint in hints):
            return role
    return "hidden"


@dataclass(frozen=True)
class Context:
    """What an update may know besides gradients, state, parameters and hyperparameters.

    Attributes:
        info: facts of each parameter.
        step: updates already made, when all parameters share that count (an unroll does); else each parameter's own
            ``state[name]["step"]`` holds.
        loss: loss at ``params``, for rules with ``needs_loss``.
        horizon: total number of steps, if known.
        closure: ``closure(params) -> (loss, grads)``: evaluates elsewhere; for rules with ``needs_closure``.
    """

    info: Mapping[str, ParamInfo]
    step: Tensor | None = None
    loss: Tensor | None = None
    horizon: Tensor | int | None = None
    closure: Callable[[Params], tuple[Tensor, Params]] | None = None

    def updates_of(self, slots: Mapping[str, Tensor]) -> Tensor:
        """How many updates the parameter whose state ``slots`` is has had."""
        return slots["step"] if self.step is None else self.step


class PerParameter(Mapping[str, Any]):
    """Hyperparameters that differ between parameters (param groups).

    As a mapping it gives the common value, for rules that couple all parameters (a global norm).
    """

    def __init__(self, by_param: Mapping[str, HyperValues]) -> None:
        self.by_param = by_param

    def of(self, param: str) -> HyperValues:
        """The hyperparameters of one parameter."""
        return self.by_param[param]

    def __getitem__(self, name: str) -> Any:
        values = [hp[name] for hp in self.by_param.values()]
        if any(value is not values[0] and value != values[0] for value in values[1:]):
            raise ValueError(
                f"{name} acts on all parameters together, so its param groups must agree; got {sorted(set(values))}"
            )
        return values[0]

    def __contains__(self, name: object) -> bool:
        return name in next(iter(self.by_param.values()), {})  # whether or not the groups agree on it

    def __iter__(self) -> Iterator[str]:
        return iter(next(iter(self.by_param.values()), {}))

    def __len__(self) -> int:
        return len(next(iter(self.by_param.values()), {}))


def hp_of(hp: HyperValues, param: str) -> HyperValues:
    """The hyperparameters that hold for ``param``."""
    return hp.of(param) if isinstance(hp, PerParameter) else hp


@dataclass_transform(frozen_default=True)
class Declared:
    """A frozen dataclass whose fields are hyperparameters, options and nested parts; subclassing makes the dataclass."""

    def __init_subclass__(cls, eq: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, value in vars(cls).items():
            if isinstance(value, Field) and name not in inspect.get_annotations(cls):
                raise TypeError(
                    f"{cls.__name__}.{name} needs a type; write {name}: float = ... (bool or int for an option)"
                )
        dataclass(frozen=True, eq=eq)(cls)

    def __post_init__(self) -> None:
        for name, declared in declarations(type(self)).items():
            object.__setattr__(self, name, declared.validate(name, getattr(self, name)))
        self.declared()  # refuses a clash of names between parts

    def parts(self) -> dict[str, Declared]:
        """Nested rules and transforms: ``{"rule": ...}`` or ``{"transforms.0": ...}``."""
        found: dict[str, Declared] = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Declared):
                found[f.name] = value
            elif isinstance(value, tuple):
                found |= {f"{f.name}.{i}": item for i, item in enumerate(value) if isinstance(item, Declared)}
        return found

    def declared(self) -> dict[str, Hyper | Option]:
        """Every hyperparameter and option of this rule and its parts.

        Raises:
            ValueError: two parts declare one name.
        """
        merged = dict(declarations(type(self)))
        for part in self.parts().values():
            for name, declared in part.declared().items():
                if name in merged:
                    raise ValueError(
                        f"{type(self).__name__} and its part {type(part).__name__} both declare {name!r}; "
                        f"set it in one of them"
                    )
                merged[name] = declared
        return merged

    def values(self) -> dict[str, Any]:
        """Current value of everything in `declared`."""
        own = {name: getattr(self, name) for name in declarations(type(self))}
        for part in self.parts().values():
            own |= part.values()
        return own

    @property
    def hp(self) -> dict[str, Any]:
        """The hyperparameters (not the options) and their values: what ``update`` takes as ``hp``."""
        declared = self.declared()
        return {name: value for name, value in self.values().items() if isinstance(declared[name], Hyper)}

    def structure(self) -> tuple[Any, ...]:
        """A hashable key of everything but the hyperparameters: rules of one structure share compiled code."""
        declared, parts = declarations(type(self)), self.parts()
        whole = {name.partition(".")[0] for name in parts}
        fixed = [
            (f.name, _key(getattr(self, f.name)))
            for f in fields(self)  # type: ignore[arg-type]
            if f.name not in whole and not isinstance(declared.get(f.name), Hyper)
        ]
        return (type(self), tuple(fixed), tuple((name, part.structure()) for name, part in parts.items()))

    def label(self) -> str:
        """How messages call it."""
        return type(self).__name__

    def replaced(self, **values: Any) -> Any:
        """A copy with hyperparameters or options changed, wherever in the composition they live.

        Raises:
            TypeError: a name that nothing declares.
        """
        unknown = set(values) - set(self.declared())
        if unknown:
            raise TypeError(
                f"{self.label()} has no hyperparameter or option {min(unknown)!r}; it has {', '.join(self.declared())}"
            )
        if not values:
            return self
        new = copy.copy(self)
        new.__dict__.clear()  # what was cached follows from the options
        own = declarations(type(self))
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if f.name in own:
                value = values.get(f.name, value)
            elif isinstance(value, Declared):
                value = value._replaced_known(values)
            elif isinstance(value, tuple):
                value = tuple(v._replaced_known(values) if isinstance(v, Declared) else v for v in value)
            object.__setattr__(new, f.name, value)
        new.__post_init__()
        return new

    def _replaced_known(self, values: Mapping[str, Any]) -> Any:
        return self.replaced(**{name: value for name, value in values.items() if name in self.declared()})


class UpdateRule(Declared, ABC):
    """A pure optimizer over a whole tree of parameters; it mutates nothing and owns no tensors.

    Class attributes ``needs_loss``, ``needs_closure``, ``needs_horizon`` say what the rule requires in `Context`;
    ``needs_roles`` says that shapes alone, from which roles are guessed where there are no names, mislead it.
    """

    needs_loss: ClassVar[bool] = False
    needs_closure: ClassVar[bool] = False
    needs_horizon: ClassVar[bool] = False
    needs_roles: ClassVar[bool] = False

    @abstractmethod
    def init(self, params: Params, info: Mapping[str, ParamInfo]) -> State:
        """Initial state: for every parameter a dict with ``step`` (0-d int64 zero) and the rule's own slots."""

    @abstractmethod
    def update(
        self, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """One step: new parameters and new state, same names, shapes and dtypes as those given."""

    def requirements(self) -> set[str]:
        """Which of ``loss``, ``closure``, ``horizon``, ``roles`` this rule or any part of it needs."""
        rules = [self, *(part for part in self.parts().values() if isinstance(part, UpdateRule))]
        needed = {what for what in ("loss", "closure", "horizon", "roles") if getattr(type(self), f"needs_{what}")}
        for part in rules[1:]:
            needed |= part.requirements()
        return needed


class TensorRule(UpdateRule):
    """A rule that treats each tensor by itself.

    bf16 and fp16 parameters are updated in float32 and rounded once at the store; their state is float32.
    """

    def init(self, params: Params, info: Mapping[str, ParamInfo]) -> State:
        """``step`` and the slots of `init_tensor` for every parameter."""
        return {
            name: {
                "step": torch.zeros((), dtype=torch.int64, device=param.device),
                **self.init_tensor(param.to(compute_dtype(param.dtype)), info[name]),
            }
            for name, param in params.items()
        }

    def update(
        self, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """Map `update_tensor` over the parameters."""
        new_params, new_state = {}, {}
        shared = None if ctx.step is None else self._t(ctx.step)
        of = hp.of if isinstance(hp, PerParameter) else None
        for name, param in params.items():
            dtype = param.dtype
            wide, grad = compute_dtype(dtype), grads[name]
            param, grad = _cast(param, wide), _cast(grad, wide)
            slots = {**state[name]}
            step = slots.pop("step")
            t = self._t(step) if shared is None else shared
            new_param, new_slots = self.update_tensor(grad, slots, param, of(name) if of else hp, t, ctx.info[name])
            new_params[name] = _cast(new_param, dtype)
            new_state[name] = {"step": step + 1, **new_slots}
        return new_params, new_state

    def _t(self, done: Tensor) -> Tensor:
        """The number, from 1, of the update after ``done``."""
        return (done + 1).to(torch.float64)

    @abstractmethod
    def init_tensor(self, param: Tensor, info: ParamInfo) -> dict[str, Tensor]:
        """Initial slots of one parameter (given in the dtype that the rule computes in)."""

    @abstractmethod
    def update_tensor(
        self, grad: Tensor, slots: dict[str, Tensor], param: Tensor, hp: HyperValues, t: Tensor, info: ParamInfo
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One tensor's step. ``t`` (0-d float64) counts from 1, per parameter; returns the parameter and its slots."""


class ElementwiseRule(TensorRule):
    """Scalar coefficients plus one elementwise text; every execution is derived from these two.

    Write `elementwise` with operators and ``torch.sqrt, sign, abs, exp, log, tanh, maximum, minimum, where, ...`` only
    (docs/architecture.md has all): no shapes, no in-place, no branch on tensor values, no ``self.lr`` (hyperparameters are
    arguments; options may be read from ``self``). Of a whole tensor there are ``x.norm()`` and ``x.mean()``, of all tensors
    together ``global_norm(x)`` and ``global_sum(x)`` (of `metaopt.program`): a rule that uses them steps without kernels.
    ``slots`` names the state tensors, which start at zero unless `init_slot` says otherwise; ``nonnegative`` those of them
    that never are below zero, which `EightBitState` keeps with twice the resolution.
    """

    slots: ClassVar[tuple[str, ...]] = ()
    nonnegative: ClassVar[tuple[str, ...]] = ()

    def coefficients(self, hp: HyperValues, t: Any) -> dict[str, Any]:
        """All scalar arithmetic (bias corrections, lr times decay); ``hp`` and ``t`` may be floats, tensors or symbols.

        The default hands the hyperparameters on by name; entries of a tuple such as ``betas`` as ``beta1, beta2``.
        """
        return flat_hp(hp)

    @abstractmethod
    def elementwise(self, param: Any, grad: Any, *slots_and_coefficients: Any, **coefficients: Any) -> Any:
        """``(param, grad, *slots, **coefficients) -> (new_param, *new_slots)``: the update of one element."""

    @cached_property
    def program(self) -> Program:
        """What `elementwise` was traced to."""
        from metaopt.program.trace import trace

        return trace(self)

    @cached_property
    def _evaluate_tree(self) -> Callable[..., list[list[Tensor]]]:
        from metaopt.program.program import evaluate_tree  # once: each import takes time, and each step evaluates

        return functools.partial(evaluate_tree, self.program)

    def init_slot(self, slot: str, param: Tensor) -> Tensor:
        """Initial value of one state tensor; zeros by default."""
        return torch.zeros_like(param)

    def init_tensor(self, param: Tensor, info: ParamInfo) -> dict[str, Tensor]:
        """One tensor like ``param`` per slot."""
        return {slot: self.init_slot(slot, param) for slot in self.slots}

    def update_tensor(
        self, grad: Tensor, slots: dict[str, Tensor], param: Tensor, hp: HyperValues, t: Tensor, info: ParamInfo
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the traced program on plain tensors."""
        tensors = {"param": param, "grad": grad, **slots}
        ((new_param, *new_slots),) = self._evaluate_tree([tensors], {**flat_hp(hp), "t": t})
        return new_param, dict(zip(self.slots, new_slots, strict=True))

    def update(
        self, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """As `TensorRule.update`; where all tensors share hyperparameters and step count they run as one flat tensor.

        Not so with norms or means of a tensor. With those of the tree, param groups must agree on hyperparameters, and ``t``
        is that of the tensor which has had most updates.
        """
        reach, dtypes = self.program.reach, {param.dtype for param in params.values()}
        if reach == "tree" and params:
            done = torch.stack([ctx.updates_of(state[name]) for name in params]).max()
            dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
            return self._update_together(grads, state, params, hp, done, dtype)
        # isinstance would ask an abstract class, on the hot path
        if ctx.step is None or len(dtypes) != 1 or self._by_hand or type(hp) is PerParameter:
            return super().update(grads, state, params, hp, ctx)
        dtype = compute_dtype(*dtypes)
        if reach != "element" or len(params) == 1:
            return self._update_together(grads, state, params, hp, ctx.step, dtype)
        grad = _concat({name: grads[name] for name in params})
        slots = {slot: _concat({name: state[name][slot] for name in params}) for slot in self.slots}
        flat = {"": grad}, {"": {"step": ctx.step, **slots}}, {"": _concat(params)}
        new_flat, flat_state = self._update_together(*flat, hp, ctx.step, dtype)
        new_slots = {slot: _split(flat_state[""][slot], params) for slot in self.slots}
        return _split(new_flat[""], params), {
            name: {"step": state[name]["step"] + 1, **{slot: new_slots[slot][name] for slot in self.slots}}
            for name in params
        }

    @cached_property
    def _by_hand(self) -> bool:
        """Whether a subclass has written `update_tensor` itself."""
        return type(self).update_tensor is not ElementwiseRule.update_tensor

    def _t(self, done: Tensor) -> Tensor:
        """As of any rule; no matter what where nothing reads it."""
        return super()._t(done) if self._by_hand or "t" in self.program.scalars_read else done

    def _update_together(
        self, grads: Params, state: State, params: Params, hp: HyperValues, done: Tensor, dtype: torch.dtype
    ) -> tuple[Params, State]:
        """All parameters in one evaluation, computed in ``dtype``, after ``done`` updates."""
        tree = []
        for name, param in params.items():
            tensors = {"param": _cast(param, dtype), "grad": _cast(grads[name], dtype)}
            for slot in self.slots:
                tensors[slot] = _cast(state[name][slot], dtype)
            tree.append(tensors)
        leaves = self._evaluate_tree(tree, {**flat_hp(hp), "t": self._t(done)})
        new_params, new_state = {}, {}
        for (name, param), (new_param, *new_slots) in zip(params.items(), leaves, strict=True):
            new_params[name] = _cast(new_param, param.dtype)
            slots = new_state[name] = {"step": state[name]["step"] + 1}
            for slot, new in zip(self.slots, new_slots, strict=True):
                slots[slot] = _cast(new, state[name][slot].dtype)
        return new_params, new_state


class GradientTransform(Declared, ABC):
    """A pure map of gradients, to be put before a rule by `Chain`."""

    def init(self, params: Params, info: Mapping[str, ParamInfo]) -> State:
        """Slots per parameter; none by default."""
        return {name: {} for name in params}

    @abstractmethod
    def transform(
        self, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """New gradients and new slots."""


class Chain(UpdateRule):
    """``Chain(ClipByGlobalNorm(1.0), AdamW())``: gradients pass the transforms in order, then the rule."""

    transforms: tuple[GradientTransform, ...]
    rule: UpdateRule

    def __init__(self, *parts: GradientTransform | UpdateRule) -> None:
        *transforms, rule = parts or (None,)
        if not isinstance(rule, UpdateRule) or not all(isinstance(t, GradientTransform) for t in transforms):
            raise TypeError(
                "Chain takes gradient transforms followed by one rule, as in Chain(ClipByGlobalNorm(1.0), AdamW())"
            )
        object.__setattr__(self, "transforms", tuple(transforms))
        object.__setattr__(self, "rule", rule)
        self.__post_init__()

    def init(self, params: Params, info: Mapping[str, ParamInfo]) -> State:
        """The rule's state with the transforms' slots beside it."""
        state = self.rule.init(params, info)
        for transform in self.transforms:
            for name, slots in transform.init(params, info).items():
                state[name] |= slots
        return state

    def update(
        self, grads: Params, state: State, params: Params, hp: HyperValues, ctx: Context
    ) -> tuple[Params, State]:
        """Transform, then update."""
        carried: State = {name: {} for name in params}
        for transform in self.transforms:
            grads, slots = transform.transform(grads, state, params, hp, ctx)
            for name in params:
                carried[name] |= slots.get(name, {})
        new_params, new_state = self.rule.update(grads, without(state, carried), params, hp, ctx)
        return new_params, {name: new_state[name] | carried[name] for name in params}


def _key(value: Any) -> Any:
    """The value itself if it can be a key, else its identity (whoever keeps the key keeps the rule, and so the value)."""
    try:
        hash(value)
    except TypeError:
        return ("id", id(value))
    return value


def without(state: State, taken: State) -> State:
    """``state`` less the slots that a wrapper keeps for itself."""
    return {name: {k: v for k, v in slots.items() if k not in taken.get(name, {})} for name, slots in state.items()}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a parameter's update is computed and its state kept."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which takes as long as an addition where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def flat_hp(hp: HyperValues) -> dict[str, Any]:
    """``{"lr": a, "betas": (b, c)}`` -> ``{"lr": a, "beta1": b, "beta2": c}``."""
    flat: dict[str, Any] = {}
    for name, value in hp.items():
        if isinstance(value, (tuple, list)):
            flat |= {f"{name.removesuffix('s')}{i + 1}": entry for i, entry in enumerate(value)}
        else:
            flat[name] = value
    return flat


def _concat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def _split(flat: Tensor, like: Mapping[str, Tensor]) -> Params:
    pieces = torch.split(flat, [tensor.numel() for tensor in like.values()])
    return {name: piece.reshape(like[name].shape) for name, piece in zip(like, pieces, strict=True)}
