"""Names for a traced program's tensors, from the variables that its functions can see.

They are labels for people: nothing that is computed or hashed depends on them.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from tinygrad import Tensor
from tinygrad.engine.jit import _TinyJit
from tinygrad.nn.optim import Optimizer
from tinygrad.nn.state import get_state_dict

from p2pflop.kernels.capture import unwrap

MAX_HELPER_DEPTH: Final = 4
_OPAQUE: Final = (types.ModuleType, type, str, bytes, int, float, types.BuiltinFunctionType)


def find_tensors(functions: Iterable[Callable[..., object]]) -> dict[str, Tensor]:
    """All tensors that ``functions`` reach, by names such as ``net.l1.weight``.

    A model's names for its weights go before the optimizer's.
    """
    found: dict[str, object] = {}
    for function in functions:
        _collect(function, found, MAX_HELPER_DEPTH)
    named: dict[str, Tensor] = {}
    ordered = sorted(found.items(), key=lambda item: isinstance(item[1], Optimizer))
    for variable, value in ordered:
        try:
            tensors = get_state_dict(value, prefix=f"{variable}.")
        except (RecursionError, TypeError, AttributeError):
            # An object of the user's that refers to itself or resists being looked at has no names.
            continue
        for name, tensor in tensors.items():
            named.setdefault(name, tensor)
    return named


def first_names(tensors: Mapping[str, Tensor]) -> dict[int, str]:
    """The first name of each tensor, by its ``id``."""
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), name)
    return names


def mentions(function: Callable[..., object], name: str) -> bool:
    """Whether the text of ``function`` has ``name`` as a variable or an attribute."""
    plain = getattr(function, "__func__", function)
    code = getattr(plain, "__code__", None)
    return isinstance(code, types.CodeType) and name in _global_names(code)


def _collect(function: object, found: dict[str, object], depth: int) -> None:
    """Add the variables that ``function`` and the functions it calls by name refer to."""
    if isinstance(function, types.MethodType):
        found.setdefault("self", function.__self__)
        function = function.__func__
    if not isinstance(function, types.FunctionType) or depth == 0:
        return
    for name, value in _visible(function).items():
        if isinstance(value, (types.FunctionType, types.MethodType, _TinyJit)):
            _collect(unwrap(value), found, depth - 1)
        elif isinstance(value, Tensor) or not isinstance(value, _OPAQUE):
            found.setdefault(name, value)


def _visible(function: types.FunctionType) -> dict[str, object]:
    """The closed-over and global variables that the text of ``function`` names."""
    values: dict[str, object] = {}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    for name, cell in cells:
        try:
            values[name] = cell.cell_contents
        except ValueError:
            # A variable that has no value yet.
            continue
    for name in _global_names(function.__code__):
        if name in function.__globals__:
            values.setdefault(name, function.__globals__[name])
    return values


def _global_names(code: types.CodeType) -> Iterable[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)
