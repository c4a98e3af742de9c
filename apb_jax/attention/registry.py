"""Methods by name: the row that makes a method reachable from ``--method``, tests and the README table."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from apb_jax.attention.apb import APB
from apb_jax.attention.full import Full
from apb_jax.attention.infllm import InfLLM
from apb_jax.attention.inputs import Prompt
from apb_jax.attention.locret import Locret
from apb_jax.attention.method import AttentionMethod
from apb_jax.attention.minference import MInference
from apb_jax.attention.ring import Ring
from apb_jax.attention.spava import Spava, default_budgets
from apb_jax.attention.star import Star
from apb_jax.attention.starx import StarX, StarXSparse
from apb_jax.attention.streaming import Streaming
from apb_jax.attention.ulysses import Ulysses, ring_shards_for
from apb_jax.attention.xattention import XAttention
from apb_jax.errors import UserError
from apb_jax.presets import APB_BUDGETS, METHOD_OPTIONS_OF, Budget, apb_budget

XATTENTION_TABLES = (("llama3.1-8b", 8), ("llama3.1-8b", 16))


@dataclass(frozen=True)
class Request:
    """What a method's defaults may depend on."""

    prompts: list[Prompt]
    shards: int
    query_at: int
    has_heads: bool
    model: str
    heads: int
    """Query heads on a device: those of the model over the tensor axis."""
    budgets: tuple[Budget, ...] = APB_BUDGETS

    @property
    def shortest(self) -> int:
        """Document tokens of the shortest request."""
        return min(len(p.document) for p in self.prompts)


def _apb(request: Request, options: dict[str, Any]) -> AttentionMethod:
    """Budgets from the preset table, shrunk to what the shards' blocks can give; explicit options stay as given."""
    row = apb_budget(request.shortest, request.budgets)
    block = -(-request.shortest // request.shards)
    embedded = max(len(p.embedded_query) for p in request.prompts)
    first = options.get("query_at")
    query_at = request.query_at if first is None else first
    anchor = options.get("anchor_tokens")
    if anchor is None:
        # Room for the query and as much of the document; never more than leaves shard 0 something to pass.
        anchor = max(min(row.anchor_tokens, block // 2), min(query_at + 2 * embedded, 3 * block // 4))
    passing = options.get("passing_tokens")
    if passing is None:
        passing = max(0, min(row.passing_tokens, block - anchor))
    scorer = options.get("scorer") or ("heads" if request.has_heads else "query")
    decided = {"anchor_tokens": anchor, "passing_tokens": passing, "query_at": query_at, "scorer": scorer}
    return APB(**({"shared_anchor": True} | options | decided))


def _given(method: type[AttentionMethod]) -> Callable[[Request, dict[str, Any]], AttentionMethod]:
    """A builder for methods whose defaults are their fields' own."""
    return lambda request, options: method(**{k: v for k, v in options.items() if v is not None})


def _ulysses(request: Request, options: dict[str, Any]) -> AttentionMethod:
    """Pure where the heads allow it, else the smallest ring."""
    ring = options.get("ring_shards")
    return Ulysses(ring_shards_for(request.heads, request.shards) if ring is None else ring)


def _starx_sparse(request: Request, options: dict[str, Any]) -> AttentionMethod:
    """One block per shard, rounded up to whole sparse blocks."""
    size = options.get("sparse_block") or StarXSparse.sparse_block
    longest = max(len(p.document) for p in request.prompts)
    blocks = {"block_tokens": -(-longest // (request.shards * size)) * size}
    return _given(StarXSparse)(request, blocks | {k: v for k, v in options.items() if v is not None})


def _spava(request: Request, options: dict[str, Any]) -> AttentionMethod:
    """The published shares of the document, shrunk to what short blocks can give."""
    anchor, passing = default_budgets(request.shortest)
    anchor = min(anchor, max(1, request.shortest // 4))
    block = max(1, (request.shortest - anchor) // (2 * request.shards))
    budgets = {"anchor_tokens": anchor, "passing_tokens": min(passing, block)}
    return _given(Spava)(request, budgets | {k: v for k, v in options.items() if v is not None})


def _minference(request: Request, options: dict[str, Any]) -> AttentionMethod:
    """Llama 3.1 8B: the sizes that every head of its published pattern file has."""
    sizes = {"vertical": 512, "slash": 2048} if request.model == "llama3.1-8b" else {}
    return _given(MInference)(request, sizes | {k: v for k, v in options.items() if v is not None})


def _xattention(request: Request, options: dict[str, Any]) -> AttentionMethod:
    """Published thresholds where the model has some for the stride, the paper's 0.9 elsewhere."""
    published = {"threshold": request.model} if (request.model, options.get("stride") or 8) in XATTENTION_TABLES else {}
    return _given(XAttention)(request, published | {k: v for k, v in options.items() if v is not None})


METHODS: dict[str, tuple[type[AttentionMethod], Callable[[Request, dict[str, Any]], AttentionMethod]]] = {
    "full": (Full, _given(Full)),
    "ring": (Ring, _given(Ring)),
    "ulysses": (Ulysses, _ulysses),
    "star": (Star, _given(Star)),
    "starx": (StarX, _given(StarX)),
    "starx_sparse": (StarXSparse, _starx_sparse),
    "streaming": (Streaming, _given(Streaming)),
    "minference": (MInference, _minference),
    "xattention": (XAttention, _xattention),
    "infllm": (InfLLM, _given(InfLLM)),
    "locret": (Locret, _given(Locret)),
    "spava": (Spava, _spava),
    "apb": (APB, _apb),
}
"""name -> (class, how to build it for a request from the options that the user gave)."""


@dataclass(frozen=True)
class MethodSpec:
    """A method by name with the options a user gave; the rest is decided when the document is known."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            near = difflib.get_close_matches(self.name, METHODS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"unknown method {self.name!r}; there are: {', '.join(METHODS)}{hint}")
        fields = METHODS[self.name][0].__dataclass_fields__
        for option, value in self.options.items():
            if value is not None and option not in fields:
                takes = ", ".join(fields) or "no options"
                raise UserError(f"method {self.name!r} has no option {option!r}; it takes {takes}")

    def build(self, request: Request) -> AttentionMethod:
        """The method with every hyper-parameter decided: as given, else the model's own, else the method's default."""
        own = METHOD_OPTIONS_OF.get(request.model, {}).get(self.name, {})
        given = {name: value for name, value in self.options.items() if value is not None}
        return METHODS[self.name][1](request, own | given)
