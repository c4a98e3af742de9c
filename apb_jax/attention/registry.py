"""Methods by name: the row that makes a method reachable from ``--method``, tests and the table of methods."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

from apb_jax.attention.apb import APB
from apb_jax.attention.budgets import options_of
from apb_jax.attention.fields import check_fields
from apb_jax.attention.full import Full
from apb_jax.attention.infllm import InfLLM
from apb_jax.attention.locret import Locret
from apb_jax.attention.method import AttentionMethod, Capabilities, Setup
from apb_jax.attention.minference import MInference
from apb_jax.attention.ring import Ring
from apb_jax.attention.spava import Spava
from apb_jax.attention.star import Star
from apb_jax.attention.starx import StarX, StarXSparse
from apb_jax.attention.streaming import Streaming
from apb_jax.attention.ulysses import Ulysses
from apb_jax.attention.xattention import XAttention
from apb_jax.errors import UserError
from apb_jax.typed import check_types

METHODS: dict[str, type[AttentionMethod]] = {
    "full": Full,
    "ring": Ring,
    "ulysses": Ulysses,
    "star": Star,
    "starx": StarX,
    "starx_sparse": StarXSparse,
    "streaming": Streaming,
    "minference": MInference,
    "xattention": XAttention,
    "infllm": InfLLM,
    "locret": Locret,
    "spava": Spava,
    "apb": APB,
}


@dataclass(frozen=True)
class MethodSpec:
    """A method by name with the options a user gave (None: left open); the rest is decided with the document."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self, name="method")
        if self.name not in METHODS:
            near = difflib.get_close_matches(self.name, METHODS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"unknown method {self.name!r}; there are: {', '.join(METHODS)}{hint}")
        check_fields(self.kind, self.given)

    @property
    def kind(self) -> type[AttentionMethod]:
        """The method's class."""
        return METHODS[self.name]

    @property
    def can(self) -> Capabilities:
        """What the method can do."""
        return self.kind.can

    def shards_on(self, devices: int, asked: int | None = None) -> int | None:
        """Parts of the document: as asked, else one a device; on one as many as the method needs to be itself."""
        if asked is not None or devices > 1:
            return asked
        return self.kind.shards_alone if self.kind.shards_alone > 1 else None

    @property
    def given(self) -> dict[str, Any]:
        """The options that have a value."""
        return {name: value for name, value in self.options.items() if value is not None}


def refusal(method: AttentionMethod | MethodSpec, setup: Setup) -> str | None:
    """Why the method cannot serve such a model or mesh, whatever the documents, with the nearest legal choice."""
    if isinstance(method, MethodSpec):
        return method.kind.refuse(setup, method.given)
    whole, _ = method.completed(setup)
    return whole.refuse(setup, vars(whole))


def resolve(method: AttentionMethod | MethodSpec, setup: Setup) -> tuple[AttentionMethod, tuple[str, ...]]:
    """The method that serves the prompts of ``setup``, and what the user should know about it.

    By name: its options as given, else the model's own, else the method's defaults. Full attention where the documents
    do not fit the method; a note too where the method comes to full attention by itself.
    """
    if isinstance(method, MethodSpec):
        method = method.kind.for_request(setup, {**options_of(setup.model, method.name), **method.given})
    method, notes = method.completed(setup)
    reason = method.why_not(setup.prompts, setup.shards)
    if reason is not None:
        return Full(), (f"{method.name} falls back to full attention: {reason}",)
    same = method.equals_full(setup.prompts, setup.shards)
    if same is not None:
        notes = (*notes, f"{method.name} is plain full attention here: {same}")
    return method, notes
