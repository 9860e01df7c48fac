"""On which of its arguments a function depends."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal


def depends_on(function: Callable, *arguments: Any) -> list[bool]:
    """For each array among the arguments, or its shape, whether the result depends on it.

    As far as tracing tells: through every operation that has it for an input. Nothing is computed.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    needed = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    for equation in reversed(jaxpr.eqns):
        if needed & set(equation.outvars):
            needed |= {var for var in equation.invars if not isinstance(var, Literal)}
    return [var in needed for var in jaxpr.invars]
