"""Marks for torch.compile that do not import it."""

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def assume_constant_result(function: F) -> F:
    """What `torch.compiler.assume_constant_result` does to a function: a call is a constant.

    That one imports the compiler, half of this package's own start, for programs that compile
    nothing. A test holds the two together.
    """
    function._dynamo_marked_constant = True
    return function
