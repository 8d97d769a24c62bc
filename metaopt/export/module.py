"""Write a rule as one Python file that needs only torch."""

from __future__ import annotations

import ast
import base64
import keyword
import math
import re
import struct
import textwrap
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import metaopt
from metaopt.export import templates
from metaopt.export.bundle import Bundle
from metaopt.export.elementwise import GUARDS, call_lines, is_printable, slot_values, update_function
from metaopt.export.names import Names
from metaopt.export.rewrite import ExportError, broken_call, quoted
from metaopt.files import write_atomic
from metaopt.learned import BoundRule, LearnedRule
from metaopt.program.ops import MATRIX_OPS
from metaopt.rule import (
    Context,
    Declared,
    ElementwiseRule,
    ParamInfo,
    PerParameter,
    UpdateRule,
    compute_dtype,
    infer_info,
)
from metaopt.space import Hyper, Option

_ALSO = (Context, ParamInfo, PerParameter, infer_info, compute_dtype)
_RESERVED = ("Optimizer", "load_tensors", "base64", "functools", "pathlib", "struct", "closure")


def write_module(rule: UpdateRule, name: str, path: str | Path, *, theta_limit: int = 20_000) -> Path:
    """Write ``rule`` as a documented ``torch.optim.Optimizer`` subclass in a file that imports torch alone.

    An `ElementwiseRule` is printed from its Program. Of any other rule, the code that it reaches is copied: it may use
    torch and the standard library, and its source must be at hand. Options are fixed; hyperparameters stay arguments.

    Args:
        rule: what to write; its hyperparameters become the defaults.
        name: of the class, put in CamelCase.
        path: of the file, replaced atomically.
        theta_limit: a learned rule with more numbers than this, or others than float32, keeps them beside the file,
            as ``<stem>.theta.pt``.

    Returns:
        The path.

    Raises:
        ExportError: the rule reaches something that one file cannot hold; or the name is no identifier.
        TypeError: ``rule`` is no update rule.
    """
    path = Path(path)
    text, aside = module_source(rule, name, path, theta_limit=theta_limit)
    if aside:
        write_atomic(path.with_suffix(".theta.pt"), lambda temporary: torch.save(aside, temporary))
    return write_atomic(path, text)


def module_source(
    rule: UpdateRule, name: str, path: Path, *, theta_limit: int = 20_000
) -> tuple[str, dict[str, Tensor] | None]:
    """The text of the file that `write_module` writes, and the tensors that it keeps beside it; same arguments and errors."""
    if isinstance(rule, LearnedRule):
        raise TypeError(f"{type(rule).__name__} is a learned rule without numbers; export rule.bind(theta)")
    if isinstance(rule, BoundRule) and rule.stacked:
        raise TypeError("theta holds one rule per copy; export learned.bind(theta) with the theta of one")
    if not isinstance(rule, UpdateRule):
        raise TypeError(f"rule must be an UpdateRule, got {type(rule).__name__}")
    class_name = camel_case(name)
    if path.suffix != ".py":
        raise ExportError(f"path must name a .py file, got {path.name!r}")
    imports: set[str] = {"import torch", "from torch.optim import Optimizer"}
    if isinstance(rule, ElementwiseRule) and is_printable(rule):
        body, aside = _elementwise_body(rule, class_name, f"{name.lower()}_update", imports), None
    else:
        body, aside = _bundle_body(rule, class_name, path, theta_limit, imports)
    head = f"{_header(rule, class_name, path)}\n\n{_imports(imports, body)}"
    text = f"{head}\n\n\n{body.strip()}\n"
    text = re.sub(r"\n{4,}", "\n\n\n", text)
    if any(len(line) > 120 for line in text.splitlines()):
        text = f"# ruff: noqa: E501\n{text}"
    ast.parse(text)  # nothing that Python cannot read leaves this function
    return text, aside


def camel_case(name: str) -> str:
    """``my_rule`` -> ``MyRule``; capitals stay.

    Raises:
        ExportError: it is no identifier, or a keyword, or a name that the file needs itself.
    """
    camel = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    if not name.isidentifier() or keyword.iskeyword(name) or not camel.isidentifier() or keyword.iskeyword(camel):
        raise ExportError(f"name must be a Python identifier and no keyword, got {name!r}; for example 'MyRule'")
    if camel in ("Optimizer", "Tensor", *(thing.__name__ for thing in _ALSO)):
        raise ExportError(f"name must not be {camel!r}, which the file uses itself; for example 'My{camel}'")
    return camel


# --- the two kinds of file ------------------------------------------------------------------------------------------


def _elementwise_body(rule: ElementwiseRule, name: str, function: str, imports: set[str]) -> str:
    source, guards = update_function(rule, function)
    values = slot_values(rule, hp="self.defaults") or {}
    called = sorted(rule.program.matrix_ops)
    names = Names(None, {*_RESERVED, name, function}, ())
    names.copy(MATRIX_OPS[op].plain for op in called)
    imports |= names.imports
    functions = [*(GUARDS[guard] for guard in guards), *names.ordered()]
    if rule.program.reach == "tree":
        step = _tree_step(rule, function, values)
        each = [f"{op} = functools.partial(_each, {op})" for op in called]
        parts = [*functions, templates.TREE.strip(), "\n".join(each), source, _optimizer_class(rule, name, step)]
        parts = [part for part in parts if part]
        return "\n\n\n".join([*parts, _domains(rule), templates.SMOKE.format(name=name, arguments="").strip()])
    init = [f'state["{slot}"] = {value.replace("param", "wide")}' for slot, value in values.items()]
    slots = [f'state["{slot}"]' for slot in rule.slots]
    call = call_lines(rule, function, ", ".join(["new", *slots]), ["wide", "grad", *slots], "group", 'state["step"]')
    step = templates.ELEMENTWISE_STEP.format(
        init=textwrap.indent("\n".join(init), " " * 12), call=textwrap.indent("\n".join(call), " " * 8)
    ).replace("\n\n        state[", "\n        state[")
    parts = [*functions, source, _optimizer_class(rule, name, step)]
    return "\n\n\n".join([*parts, _domains(rule), templates.SMOKE.format(name=name, arguments="").strip()])


def _tree_step(rule: ElementwiseRule, function: str, values: Mapping[str, str]) -> str:
    init = [f'state["{slot}"] = {value.replace("param", "own")}' for slot, value in values.items()]
    load = [f'{slot} = _Tree(state["{slot}"].to(dtype) for state in states)' for slot in rule.slots]
    store = [f'state["{slot}"] = new_{slot}.leaves[i].to(state["{slot}"].dtype)' for slot in rule.slots]
    targets = ", ".join(["new", *(f"new_{slot}" for slot in rule.slots)])
    call = call_lines(rule, function, targets, ["wide", "grad", *rule.slots], "group", "float(t)")
    blocks = {"init": (init, 16), "slots": (load, 8), "call": (call, 8), "store": (store, 12)}
    filled = {key: textwrap.indent("\n".join(lines), " " * depth) for key, (lines, depth) in blocks.items()}
    return re.sub(r"\n\n(?=        (?! *def ))", "\n", templates.TREE_STEP.format(**filled))


def _bundle_body(
    rule: UpdateRule, name: str, path: Path, theta_limit: int, imports: set[str]
) -> tuple[str, dict[str, Tensor] | None]:
    bundle = Bundle(rule, reserved=_RESERVED, also=_ALSO, told=(_documented(rule), name))
    imports |= bundle.imports
    needed = rule.requirements()
    step = _rule_step(rule, name, bundle, needed)
    optimizer = _optimizer_class(rule, name, step, horizon="horizon" in needed)
    parts = [optimizer, _domains(rule), templates.NUMBER, bundle.source()]
    aside: dict[str, Tensor] | None = None
    if bundle.tensors:
        numbers = sum(tensor.numel() for tensor in bundle.tensors.values())
        inline = numbers <= theta_limit and all(t.dtype == torch.float32 for t in bundle.tensors.values())
        aside = None if inline else {n: t.contiguous().clone() for n, t in bundle.tensors.items()}
        load = templates.LOAD_INLINE if inline else templates.LOAD_FILE.format(file=path.with_suffix(".theta.pt").name)
        parts += [load, templates.LOAD_TENSORS, _inline(bundle.tensors) if inline else ""]
    smoke = templates.SMOKE.format(name=name, arguments=", horizon=20" if "horizon" in needed else "")
    return "\n\n\n".join(part.strip() for part in [*parts, smoke] if part), aside


def _rule_step(rule: UpdateRule, name: str, bundle: Bundle, needed: set[str]) -> str:
    has_loss, has_closure = "loss" in needed, "closure" in needed
    context = ["info"] + ["loss=loss"] * has_loss + ['horizon=self.defaults["horizon"]'] * ("horizon" in needed)
    context += ["closure=self._closure_at(params, closure)"] * has_closure
    evaluation = ["with torch.enable_grad():", "    loss = closure()"]
    if has_closure:
        refusal = f'    raise ValueError("{name} evaluates the loss again; call step(closure)")'
        evaluation = ["if closure is None:", refusal, *evaluation]
    else:
        evaluation = ["if closure is not None:", *(f"    {line}" for line in evaluation)]
    if has_loss:
        refusal = f'    raise ValueError("{name} needs the loss; call step(closure) or step(loss=loss)")'
        evaluation += ["if loss is None:", refusal, "found = torch.as_tensor(loss).detach()"]
    elif not has_closure:
        evaluation = ["loss = None", *evaluation]
    making = ["device = next(iter(wide.values())).device"] * ("device" in bundle.needs)
    making += broken_call(f"rule = {bundle.expression}")
    step = templates.RULE_STEP.format(
        loss_argument=", *, loss=None" if has_loss else "",
        loss_doc="\n\n        ``loss`` may stand in for a closure.\n        " if has_loss else "",
        evaluation="".join(f"        {line}\n" for line in evaluation),
        update_arguments=", found" * has_loss + ", closure" * has_closure,
        returned="loss if closure is not None else None" if has_loss else "loss",
        rule=textwrap.indent("\n".join(making), " " * 8),
        context=", ".join(context).replace("loss=loss", "loss=found"),
    )
    return step + (templates.CLOSURE_AT if has_closure else "")


# --- parts of a file ------------------------------------------------------------------------------------------------


def _header(rule: UpdateRule, name: str, path: Path) -> str:
    described = textwrap.fill(describe(rule), 112, break_long_words=False, break_on_hyphens=False)
    origins = sorted({type(part).__module__ for part in _flat_parts(rule)} - {"metaopt.rule", "metaopt.learned"})
    usage = f"optimizer = {name}(model.parameters()"
    usage += f", lr={_number(rule.hp['lr'])!r})" if "lr" in rule.hp else ")"
    licence = "Parts by metaopt: Apache-2.0. The rule itself is under the licence of where it was written"
    licence = textwrap.fill(f"{licence} ({', '.join(origins)}).", 112)
    doc = f"""
{name}: an optimizer in one file that needs only torch.

Written by metaopt {metaopt.__version__} from this rule:

{textwrap.indent(described, "    ")}

Use it like any other::

    from {path.stem if path.stem.isidentifier() else "this_file"} import {name}

    {usage}

{licence}
"""
    return quoted(doc.strip())


def _imports(imports: set[str], body: str) -> str:
    code = "\n".join(line for line in body.splitlines() if not line.lstrip().startswith("#"))
    for module in ("base64", "functools", "math", "operator", "pathlib", "struct"):
        if re.search(rf"(?<![\w.]){module}\.\w", code):
            imports = imports | {f"import {module}"}
    merged: dict[str, list[str]] = {}
    for line in sorted(imports):
        head, _, name = line.rpartition(" import ")
        merged.setdefault(f"{head} import " if head else line, []).append(name if head else "")
    lines = sorted((head + ", ".join(names) for head, names in merged.items()), key=lambda i: (i.startswith("from"), i))
    ours = [line for line in lines if re.match(r"(import|from) torch\b", line)]
    library = [line for line in lines if line not in ours]
    groups = ["from __future__ import annotations", "\n".join(library), "\n".join(ours)]
    return "\n\n".join(group for group in groups if group)


def _optimizer_class(rule: UpdateRule, name: str, step: str, horizon: bool = False) -> str:
    declared = rule.declared()
    documented = ["params: tensors, named tensors or groups, as for every torch optimizer"]
    if not is_printable(rule):
        documented[0] += "; a group may set ``role`` (hidden, output, ...), which is else guessed from name and shape"
    arguments, defaults = ["self", "params"], []
    for key, value in rule.hp.items():
        hyper = declared[key]
        assert isinstance(hyper, Hyper)
        default = _number(value)
        kind = "float" if isinstance(default, float) else f"tuple[{', '.join(['float'] * len(default))}]"
        arguments.append(f"{key}: {kind} = {_literal(default)}")
        defaults.append(f'"{key}": {key}')
        documented.append(f"{key}: {hyper.doc or 'a number'}, in {hyper.domain}.")
    if horizon:
        arguments += ["*", "horizon: int"]
        defaults.append('"horizon": horizon')
        documented.append("horizon: the planned number of steps.")
    fixed = {key: value for key, value in rule.values().items() if isinstance(declared[key], Option)}
    doc = _class_doc(rule)
    if fixed:
        doc += "\n\nFixed in this file: " + ", ".join(f"{key}={value!r}" for key, value in fixed.items()) + "."
    wrapper = textwrap.TextWrapper(110, initial_indent="    ", subsequent_indent="        ")
    doc += "\n\nArgs:\n" + "\n".join(wrapper.fill(line.rstrip(".") + ".") for line in documented)
    doc += "\n\nRaises:\n    ValueError: a hyperparameter outside its domain."
    signature = f"    def __init__({', '.join(arguments)}):"
    if len(signature) > 110:
        lines = "".join(f"        {argument},\n" for argument in arguments)
        signature = f"    def __init__(\n{lines}    ):"
    store = f"        super().__init__(params, {{{', '.join(defaults)}}})"
    if len(store) > 110:
        entries = "".join(f"            {entry},\n" for entry in defaults)
        store = f"        defaults = {{\n{entries}        }}\n        super().__init__(params, defaults)"
    head = f"class {name}(Optimizer):\n{textwrap.indent(quoted(doc), '    ')}\n\n{signature}\n{store}\n"
    return head + templates.ADD_PARAM_GROUP + step + templates.LOAD_STATE_DICT


def _documented(rule: UpdateRule) -> type[Declared]:
    """The class whose docstring the optimizer gets."""
    return type(rule.learned if isinstance(rule, BoundRule) else rule)


def _class_doc(rule: UpdateRule) -> str:
    source = _documented(rule)
    found = vars(source).get("__doc__") or ""
    if not found or found.startswith(f"{source.__name__}("):
        return f"The rule {source.__name__}."
    return "\n".join(line.rstrip() for line in textwrap.dedent("    " + found).strip().splitlines())


def _domains(rule: UpdateRule) -> str:
    lines = []
    for key, declared in rule.declared().items():
        if isinstance(declared, Hyper):
            count = len(declared.default) if isinstance(declared.default, tuple) else 1
            words = f"{count} numbers in" if isinstance(declared.default, tuple) else "in"
            lines.append(f'    "{key}": ({count}, {_test(declared)}, "{words} {declared.domain}"),')
    if not lines:
        return f"_DOMAINS = {{}}\n\n{templates.CHECK}"
    return "\n".join(["_DOMAINS = {", *lines, "}"]) + f"\n\n{templates.CHECK}"


def _test(hyper: Hyper) -> str:
    low, high = (repr(int(x)) if x.is_integer() else repr(x) for x in (_finite(hyper.low), _finite(hyper.high)))
    if math.isinf(hyper.low) and math.isinf(hyper.high):
        return "lambda x: True"
    if math.isinf(hyper.high):
        return f"lambda x: x {'>' if hyper.open_low else '>='} {low}"
    below = "" if math.isinf(hyper.low) else f"{low} {'<' if hyper.open_low else '<='} "
    return f"lambda x: {below}x {'<' if hyper.open_high else '<='} {high}"


def _finite(bound: float) -> float:
    return float(bound) if math.isfinite(bound) else 0.0


def _inline(tensors: dict[str, Tensor]) -> str:
    numbers = [float(x) for tensor in tensors.values() for x in tensor.flatten().tolist()]
    data = base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
    shapes = "\n".join(f"    {name!r}: {tuple(tensor.shape)},".replace("'", '"') for name, tensor in tensors.items())
    return f'_SHAPES = {{\n{shapes}\n}}\n_NUMBERS = """\n{textwrap.fill(data, 112)}\n"""'


def describe(rule: Declared) -> str:
    """The rule as text; tensors by their number of entries."""
    entries = []
    for f in fields(rule):  # type: ignore[arg-type]
        entries.append(f"{f.name}={_describe_value(getattr(rule, f.name))}")
    return f"{type(rule).__name__}({', '.join(entries)})"


def _describe_value(value: Any) -> str:
    if isinstance(value, Declared):
        return describe(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(_describe_value, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict) and all(isinstance(v, Tensor) for v in value.values()):
        return f"<{sum(v.numel() for v in value.values())} numbers in {len(value)} tensors>"
    return f"<tensor of {value.numel()} numbers>" if isinstance(value, Tensor) and value.numel() > 1 else repr(value)


def _flat_parts(rule: Declared) -> list[Declared]:
    return [rule, *(inner for part in rule.parts().values() for inner in _flat_parts(part))]


def _number(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_number(entry) for entry in value)
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ExportError(f"a hyperparameter must be one number to be written, got a tensor of {value.numel()}")
    return float(value)


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    return repr(value) if math.isfinite(value) else f'float("{value}")'
