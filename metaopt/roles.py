"""Which role each parameter of a module plays: what rules such as Muon go by."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from metaopt.rule import infer_info


def module_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Param groups of a module, one per role; roles are read from the types of its parts, names are kept.

    The last linear layer is taken for the output.
    """
    roles: dict[str, str] = {}
    norms = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.RMSNorm)
    linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    for prefix, part in module.named_modules():
        for name, p in part.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
                roles[full] = "embedding"
            elif isinstance(part, norms):
                roles[full] = "norm"
            elif linear and prefix == linear[-1] and p.dim() > 1:
                roles[full] = "output"
            else:
                roles[full] = infer_info({full: p})[full].role
    groups: dict[str, list[tuple[str, Tensor]]] = {}
    for name, p in module.named_parameters():
        groups.setdefault(roles.get(name, "hidden"), []).append((name, p))
    return [{"params": named, "role": role} for role, named in groups.items()]
