"""In which types an engine holds and multiplies, and how float32 stays float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from apb_jax.errors import UserError

MODEL = "model"
"""The model's own dtype: what ``--dtype`` says."""
CHOICES: dict[str, tuple[str, ...]] = {"weights": (MODEL,), "kv": (MODEL,), "attention": (MODEL,)}
"""What each field of `Precision` can be."""


@dataclass(frozen=True)
class Precision:
    """The types of what takes most bytes and time; "model" for the model's own dtype."""

    weights: str = MODEL
    """The layers' matrices, and the rows that they multiply."""
    kv: str = MODEL
    """The document's keys and values, in memory and between devices."""
    attention: str = MODEL
    """The products of the prefill's attention."""

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise UserError(f"the precision of {name} is {value!r}; it can be {', '.join(known)}")


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """HIGHEST for float32, which GPUs else round to 10 bits of mantissa (TF32); None for other types."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
