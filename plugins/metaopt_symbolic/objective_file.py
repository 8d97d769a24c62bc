"""From a loss of the search to a Python file with an `Objective`, which every command and plugin takes."""

from __future__ import annotations

import keyword
import textwrap

from metaopt.objective import Kind
from metaopt_symbolic.genome import Genome, GenomeError
from metaopt_symbolic.losses.candidate import python

_FILE = '''\
"""{name}: a loss in closed form."""

from __future__ import annotations

from typing import Any, ClassVar

{imports}from metaopt.objective import Kind, Objective


class {name}(Objective):
    """{origin}"""

    kind: ClassVar[Kind] = "{kind}"
    inputs: ClassVar[tuple[str, ...]] = ({inputs})

    def loss(self, {arguments}) -> Any:
        """See the class."""
{body}
'''


def objective_source(genome: Genome, kind: Kind, name: str, origin: str) -> str:
    """The text of a Python file with an `Objective` that computes what ``genome`` does.

    Args:
        genome: a loss's, without scalars.
        kind: of the objective.
        name: of the class.
        origin: its docstring: what it is and where it came from.

    Raises:
        GenomeError: it is no loss, or ``name`` cannot name a class.
    """
    if not name.isascii() or not name.isidentifier() or keyword.iskeyword(name):
        raise GenomeError(f"name must be an identifier such as 'MyLoss', got {name!r}")
    if not genome.is_loss or genome.scalars:
        raise GenomeError(
            f"only a loss without scalars is an objective, got one of {(*genome.scalars, *genome.outputs)}"
        )
    body = "\n".join(python(genome).splitlines()[1:])
    imports = "import torch\n" * ("torch." in body) + "from torch.nn import functional as F\n" * ("F." in body)
    return _FILE.format(
        name=name,
        kind=kind,
        origin=textwrap.fill(" ".join(origin.split()), 112)
        .replace("\n", "\n    ")
        .replace("\\", "/")
        .replace('"', "'"),
        imports=imports + "\n" * bool(imports),
        inputs=", ".join(f'"{tensor}"' for tensor in genome.tensors) + "," * (len(genome.tensors) == 1),
        arguments=", ".join(f"{tensor}: Any" for tensor in genome.tensors),
        body=textwrap.indent(body, "    "),
    )
