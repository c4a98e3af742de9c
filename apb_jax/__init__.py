"""Long-context LLM inference in JAX/Flax on GPU meshes: APB and its rivals behind one flag.

>>> import apb_jax
>>> engine = apb_jax.Engine(apb_jax.load("tiny"), method="apb", mesh=apb_jax.make_mesh(sp=8))
>>> engine.generate(document="...", query="...", max_new_tokens=32).text

The names below are imported when first used, so that ``python -m apb_jax.run`` answers ``--help`` and mistakes at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apb_jax.attention import APB, Full, MethodSpec
    from apb_jax.engine import Answer, Engine
    from apb_jax.errors import UserError
    from apb_jax.mesh import make_mesh
    from apb_jax.sampling import Sampler
    from apb_jax.weights.checkpoint import LoadedModel, load

__version__ = "0.1.0"
__all__ = ["APB", "Answer", "Engine", "Full", "LoadedModel", "MethodSpec", "Sampler", "UserError", "load", "make_mesh"]

_HOME = {
    "APB": "attention",
    "Answer": "engine",
    "Engine": "engine",
    "Full": "attention",
    "LoadedModel": "weights.checkpoint",
    "MethodSpec": "attention",
    "Sampler": "sampling",
    "UserError": "errors",
    "load": "weights.checkpoint",
    "make_mesh": "mesh",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"apb_jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
