"""Python numbers that a rule makes tensors of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Constants(TorchFunctionMode):
    """Tensors of Python numbers are copied from the host once, and from then on on the device, as a graph demands."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[str, Tensor] = {}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.new_tensor:
            like, *args = args
            function, kwargs = torch.tensor, {"dtype": like.dtype, "device": like.device, **kwargs}
        if function not in (torch.tensor, torch.as_tensor) or not _is_numbers(args[0]):
            return function(*args, **kwargs)
        key = f"{function.__name__} {args} {kwargs}"
        if key not in self._made:
            self._made[key] = function(*args, **kwargs)
        return self._made[key].clone()  # whoever asked for a fresh tensor may write to it


def _is_numbers(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, list | tuple) and all(map(_is_numbers, value)))
