"""The form in which kernel modules offer their kernels for ahead-of-time compilation, which needs no GPU."""

from __future__ import annotations

from typing import Any, NamedTuple


class AotCase(NamedTuple):
    """One specialisation of a kernel. Each kernel module of this package has ``aot_cases() -> list[AotCase]``.

    Attributes:
        name: unique in the package, such as ``"elementwise.adamw.float32"``.
        function: what ``@triton.jit`` gave.
        signature: Triton's type of each argument that is no constant, such as ``"*fp32"`` or ``"i32"``.
        constants: values of the ``tl.constexpr`` arguments.
        num_warps: warps of a program.
        divisible_by_16: arguments that every launch gives as multiples of 16; pointers count by their address.
        options: other options of the launch, such as ``{"enable_fp_fusion": False}``.
    """

    name: str
    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    divisible_by_16: tuple[str, ...]
    options: dict[str, Any]
