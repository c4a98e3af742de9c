"""In which types an engine holds and multiplies, and how float32 stays float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from apb_jax.errors import UserError

if TYPE_CHECKING:
    import jax

MODEL = "model"
"""The model's own dtype: what ``--dtype`` says."""
FP8 = "fp8"
"""e4m3 with float32 scales."""
INT8 = "int8"
"""8-bit integers with float32 scales."""
CHOICES: dict[str, tuple[str, ...]] = {"weights": (MODEL, FP8), "kv": (MODEL, FP8, INT8), "attention": (MODEL, FP8)}
"""What each field of `Precision` can be."""
WORDS = ("bf16", FP8)
"""Recipes by one word: everything in the model's own dtype; 8-bit floats wherever there are any."""


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

    @classmethod
    def of(cls, word: str | None, **given: str | None) -> Precision:
        """The recipe of ``word`` (None: the model's own dtype), with those fields changed that are not None."""
        if word is not None and word not in WORDS:
            raise UserError(f"the precision is {word!r}; it can be {', '.join(WORDS)}")
        recipe = {name: FP8 for name, known in CHOICES.items() if word == FP8 and FP8 in known}
        return cls(**(recipe | {name: value for name, value in given.items() if value is not None}))

    @property
    def word(self) -> str:
        """The recipe's word where it is one, else the fields that are not the model's own dtype."""
        return next((word for word in WORDS if Precision.of(word) == self), str(self))

    @property
    def changed(self) -> dict[str, str]:
        """Fields that are not the model's own dtype."""
        return {name: value for name in CHOICES if (value := getattr(self, name)) != MODEL}

    def __str__(self) -> str:
        """Such as "fp8 weights, fp8 kv"; empty where all is in the model's own dtype."""
        return ", ".join(f"{value} {name}" for name, value in self.changed.items())


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """HIGHEST for float32, which GPUs else round to 10 bits of mantissa (TF32); None for other types."""
    import jax  # not above: command lines read this module before anything heavy is imported

    return jax.lax.Precision.HIGHEST if dtype == jax.numpy.float32 else None
