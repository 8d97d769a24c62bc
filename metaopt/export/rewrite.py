"""Reading and editing Python source: what a function refers to, and its text without annotations."""

from __future__ import annotations

import ast
import dis
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

Position = tuple[int, int]
"""Line from 1, column in UTF-8 bytes, as in `ast`."""

Edit = tuple[Position, Position, str]


class ExportError(ValueError):
    """A rule that cannot become one file; says what stands in the way."""


@dataclass(frozen=True)
class Use:
    """A global name in a text, with the attributes read from it: ``F.one_hot`` is ``Use("F", ..., ("one_hot",))``.

    Attributes:
        name: the global.
        attributes: the chain after it.
        ends: where each prefix of the chain ends; ``ends[0]`` is the end of the name itself.
        start: where the name starts.
        eager: it is evaluated when the text is (a base class, a decorator, a default value).
    """

    name: str
    attributes: tuple[str, ...]
    start: Position
    ends: tuple[Position, ...]
    eager: bool


def source_of(thing: Any, what: str) -> str:
    """The dedented source of a function or class.

    Raises:
        ExportError: there is none, as for code typed into an interpreter; or it has changed since it was imported.
    """
    try:
        source = textwrap.dedent(inspect.getsource(thing)).rstrip() + "\n"
    except (OSError, TypeError) as error:
        raise ExportError(f"the source of {what} cannot be found; define it in a file or a notebook cell") from error
    if not _is_source_of(source, inspect.unwrap(thing)):
        raise ExportError(f"the file of {what} has changed since it was imported; start Python again to export it")
    return source


def _is_source_of(source: str, thing: Any) -> bool:
    try:
        node = ast.parse(source).body[0]
    except (SyntaxError, IndexError):
        return False
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and inspect.isfunction(thing):
        arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        code = thing.__code__
        return node.name == code.co_name and tuple(arguments) == code.co_varnames[: len(arguments)]
    return isinstance(node, ast.ClassDef) and inspect.isclass(thing) and node.name == thing.__name__


def plain(
    source: str, dropped_decorators: tuple[str, ...] = ("abstractmethod", "override", "overridable", "replaceable")
) -> str:
    """``source`` without annotations of functions and variables, comments for tools, and the decorators named.

    Fields of classes keep theirs: a dataclass is made of them.
    """
    tree = ast.parse(source)
    edits: list[Edit] = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            edits.append(_signature(source, node))
            edits += [
                ((d.lineno, 0), (_end(d)[0] + 1, 0), "")
                for d in node.decorator_list
                if ast.unparse(d).split(".")[-1] in dropped_decorators
            ]
            for inner in ast.walk(node):
                if isinstance(inner, ast.AnnAssign) and inner.value is not None:
                    edits.append((_end(inner.target), _end(inner.annotation), ""))
                elif isinstance(inner, ast.AnnAssign):
                    edits.append(((inner.lineno, 0), (inner.end_lineno or inner.lineno, 10**6), ""))
    text = apply(source, edits)
    text = re.sub(r"[ \t]*# (type: ignore|noqa|fmt:|pragma:).*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE))


def _signature(source: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Edit:
    """The header of a function on one line, or one argument a line, without annotations."""
    arguments = ast.parse(f"def f({ast.unparse(node.args)}): pass").body[0]
    assert isinstance(arguments, ast.FunctionDef)
    for argument in ast.walk(arguments.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    text = f"{keyword} {node.name}({ast.unparse(arguments.args)}):"
    if node.col_offset + len(text) > 114:
        indent = " " * (node.col_offset + 4)
        parts = textwrap.wrap(ast.unparse(arguments.args), 110 - len(indent))
        lines = "\n".join(f"{indent}{part}" for part in parts)
        text = f"{keyword} {node.name}(\n{lines}\n{indent[4:]}):"
    return _start(node), _header_end(source, node), text


def _header_end(source: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Position:
    depth, begun = 0, False
    lines = source.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row = token.start[0]
        column = len(lines[row - 1][: token.start[1]].encode()) if row <= len(lines) else 0
        begun = begun or (row, column) >= _start(node)
        if begun and token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
            if token.string == ":" and depth == 0:
                return row, column + 1
    raise ExportError(f"the header of {node.name} cannot be read")


def _start(node: Any) -> Position:
    return node.lineno, node.col_offset


def _end(node: Any) -> Position:
    return node.end_lineno, node.end_col_offset


def apply(source: str, edits: list[Edit]) -> str:
    """``source`` with the ranges of ``edits`` replaced (nested ranges: the outer one wins)."""
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line))

    def at(position: Position) -> int:
        row, column = position
        if row > len(lines):
            return offsets[-1]
        return offsets[row - 1] + min(column, len(lines[row - 1].rstrip(b"\r\n")))

    data, done = b"".join(lines), 0
    pieces: list[bytes] = []
    for start, end, text in sorted(set(edits), key=lambda edit: (at(edit[0]), -at(edit[1]))):
        if at(start) < done:
            continue
        pieces += [data[done : at(start)], text.encode()]
        done = at(end)
    return b"".join([*pieces, data[done:]]).decode()


def uses(text: str) -> list[Use]:
    """Every use of a global, free or builtin name, with its attributes."""
    tree = ast.parse(text)
    chains: dict[Position, list[ast.Attribute]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            inner: ast.expr = node
            above: list[ast.Attribute] = []
            while isinstance(inner, ast.Attribute):
                above.insert(0, inner)
                inner = inner.value
            if isinstance(inner, ast.Name) and len(above) > len(chains.get(_start(inner), [])):
                chains[_start(inner)] = above
    found = []
    for name, start, end, eager in _global_loads(compile(tree, "<rule>", "exec", dont_inherit=True), True):
        chain = chains.get(start, [])
        ends = (end, *(_end(node) for node in chain))
        found.append(Use(name, tuple(node.attr for node in chain), start, ends, eager))
    return found


def _global_loads(code: CodeType, eager: bool) -> Iterator[tuple[str, Position, Position, bool]]:
    """Which names are global is the compiler's knowledge: read it from the instructions and their positions."""
    stored = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_NAME"}
    for instruction in dis.get_instructions(code):
        where = instruction.positions
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") and where is not None and where.lineno is not None:
            name, own = instruction.argval, instruction.opname == "LOAD_NAME" and instruction.argval in stored
            if not own and name != "super" and not (name.startswith("__") and name.endswith("__")):
                start, end = (where.lineno, where.col_offset or 0), (where.end_lineno or 0, where.end_col_offset or 0)
                yield name, start, end, eager
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            is_class = "__qualname__" in constant.co_names
            yield from _global_loads(constant, eager and is_class)


def imports_within(text: str) -> tuple[str, dict[str, tuple[str, str]]]:
    """``text`` without its ``from module import name`` statements in functions, and {bound name: (module, name)}."""
    edits: list[Edit] = []
    bound: dict[str, tuple[str, str]] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            bound |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
            edits.append(((node.lineno, 0), ((node.end_lineno or 0) + 1, 0), ""))
    return apply(text, edits), bound


@dataclass(frozen=True)
class SelfUses:
    """What a method reads.

    Attributes:
        chains: attributes read from self: ``self.rule.init`` is ``("rule", "init")``.
        supers: names called on ``super()``.
        others: attributes read from anything else.
    """

    chains: frozenset[tuple[str, ...]]
    supers: frozenset[str]
    others: frozenset[str]


def self_uses(text: str) -> SelfUses:
    """The attributes that the text of one method reads, by what it reads them from."""
    function = ast.parse(text).body[0]
    assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
    positional = [*function.args.posonlyargs, *function.args.args]
    owner = positional[0].arg if positional else ""
    chains: set[tuple[str, ...]] = set()
    supers: set[str] = set()
    others: set[str] = set()
    for node in ast.walk(function):
        if not isinstance(node, ast.Attribute):
            continue
        inner: ast.expr = node
        chain: list[str] = []
        while isinstance(inner, ast.Attribute):
            chain.insert(0, inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id == owner:
            chains.add(tuple(chain))
        elif isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name) and inner.func.id == "super":
            supers.add(chain[0])
        else:
            others |= set(chain)
    return SelfUses(frozenset(chains), frozenset(supers), frozenset(others))


def quoted(doc: str) -> str:
    """A docstring as source."""
    raw = "r" if "\\" in doc else ""
    safe = doc.replace('"""', "'''")
    ending = "\n" if "\n" in safe or safe.endswith(('"', "\\")) else ""
    return f'{raw}"""{safe}{ending}"""'


def broken_call(line: str, width: int = 100) -> list[str]:
    """``name = Call(a, b(c, d))``, one argument a line if it is long."""
    if len(line) <= width or not line.endswith(")"):
        return [line]
    head, _, inner = line[:-1].partition("(")
    depth, arguments = 0, [""]
    for character in inner:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += character
    nested = [part for argument in arguments for part in broken_call(f"{argument.strip()}", width - 4)]
    lines = [f"    {part}" for part in nested]
    closing = [line if line.endswith(("(", ",")) else f"{line}," for line in lines]
    return [f"{head}(", *closing, ")"]
