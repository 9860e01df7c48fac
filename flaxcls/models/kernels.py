"""Where layers may use kernels that XLA can't split over devices: they have to know the mesh."""

import contextvars
import functools
from collections.abc import Callable

from jax.sharding import Mesh

from flaxcls.runtime import sharding

_MESH: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


def kernels_for(mesh: Mesh, function: Callable) -> Callable:
    """The function, traced for a mesh: what it calls may ask for `kernels_mesh`.

    It is compiled for these devices alone: not what is exported.
    """

    @functools.wraps(function)
    def traced(*arguments):
        token = _MESH.set(mesh)
        try:
            return function(*arguments)
        finally:
            _MESH.reset(token)

    return traced


def kernels_mesh(platform: str) -> Mesh | None:
    """What the caller is traced for, if that has devices of the platform; else None."""
    mesh = _MESH.get()
    return mesh if mesh is not None and sharding.platform(mesh) == platform else None
