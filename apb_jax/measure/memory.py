"""Bytes that a run needs on its fullest device, by component: arithmetic on shapes, before a weight is read.

Needs no device and no file of weights. What the kernels and XLA keep beside these terms is ``PROGRAM_BYTES``; a
comparison with the devices' own peak is ``benchmarks/plan_check.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from apb_jax.attention.inputs import Prompt
from apb_jax.attention.layout import Layout, bucket
from apb_jax.attention.method import AttentionMethod, Setup
from apb_jax.attention.placement import Placement
from apb_jax.attention.registry import MethodSpec, refusal, resolve
from apb_jax.errors import UserError
from apb_jax.host_kv import ON_DEVICE
from apb_jax.kv_codes import CODES, SCALE_BYTES
from apb_jax.kv_memory import DEVICE, HOST, NOWHERE
from apb_jax.model.config import ModelConfig
from apb_jax.model.layers import CHUNK_ROWS
from apb_jax.model.weights import head_facts, weight_facts, weights_of
from apb_jax.precision import MODEL

if TYPE_CHECKING:
    from apb_jax.engine import Engine

PROGRAM_BYTES = 256 * 2**20
"""Scratch of cuBLAS, cuDNN and the kernels: an allowance, not a measurement."""
QUERY_TOKENS, NEW_TOKENS = 64, 32
"""Of a hypothetical request."""
FLOAT32 = INT32 = 4


@dataclass(frozen=True)
class Case:
    """What is to run and where: a model's shapes, a method, the places of a mesh."""

    config: ModelConfig
    model: str
    """Its name: tables of budgets are by model."""
    itemsize: int
    """Bytes of a weight, an activation, a cached value."""
    method: AttentionMethod | MethodSpec
    devices: int
    """Places on the sequence axis."""
    tp: int = 1
    shards: int | None = None
    """Parts of the document; None: one a device."""
    order: str = "contiguous"
    retaining_hidden: int | None = None
    folded: bool = False
    fp8: bool = False
    """Whether the layers' matrices are held in e4m3."""
    query_at: int = 0
    kv: str = MODEL
    """The type of the document's keys and values: the word of ``Precision.kv``."""
    kv_memory: str = DEVICE
    """Where they are kept: a word of ``kv_memory.py``."""
    kv_layers: int = 0
    """Of those in the host's memory the layers that stay on the devices."""

    @classmethod
    def of(cls, engine: Engine) -> Case:
        """The case that an engine is; reads none of its weights."""
        model, settings, setup = engine.model, engine.settings, engine.setup(1)
        return cls(
            config=model.config,
            model=model.name,
            itemsize=model.dtype.itemsize,
            method=engine.method,
            devices=setup.devices,
            tp=setup.tp,
            shards=settings.shards,
            order=settings.placement,
            retaining_hidden=model.retaining_hidden,
            folded=model.fold_heads,
            fp8=model.fp8,
            query_at=setup.query_at,
            kv=settings.precision.kv,
            kv_memory=settings.kv_memory,
            kv_layers=settings.kv_layers,
        )

    @property
    def placement(self) -> Placement:
        """Which shards stand on which device."""
        return Placement.for_method(self.method.can.exact, self.shards, self.devices, self.order)

    def setup(self, prompts: Sequence[Prompt] = ()) -> Setup:
        """What the method may know."""
        return Setup(
            config=self.config,
            model=self.model,
            shards=self.placement.shards,
            devices=self.devices,
            tp=self.tp,
            batch=max(1, len(prompts)),
            has_heads=self.retaining_hidden is not None,
            query_at=self.query_at,
            prompts=tuple(prompts),
        )

    def check(self) -> None:
        """Refuse what the method or the mesh cannot do, whatever the documents."""
        for name, size in (("KV heads", self.config.num_kv_heads), ("FFN columns", self.config.intermediate_size)):
            if size % self.tp:
                raise UserError(f"--tp {self.tp} does not divide {self.model}'s {size} {name}")
        reason = refusal(self.method, self.setup())
        if reason is not None:
            raise UserError(reason)

    def chosen(self, prompts: Sequence[Prompt]) -> tuple[AttentionMethod, Layout]:
        """The method that would serve the prompts, and its layout."""
        method, _ = resolve(self.method, self.setup(prompts))
        return method, method.layout(prompts, self.placement.shards)


def hypothetical(document_tokens: int, query_tokens: int = QUERY_TOKENS) -> Prompt:
    """A request of these lengths; its ids mean nothing."""
    query = np.zeros(query_tokens, np.int32)
    return Prompt(np.zeros(document_tokens, np.int32), query, query)


# ---- components ------------------------------------------------------------------------------------------------------


def weight_bytes(case: Case) -> int:
    """Weights of one device: replicated over the sequence axis, split over ``tp`` as the table of weights says."""
    config, heads = case.config, case.retaining_hidden
    sizes = config.sizes(heads)
    total = 0
    for weight in weights_of(config.facts | head_facts(heads, case.folded) | weight_facts(case.fp8)):
        copies = config.num_layers if weight.stacked else 1
        values = copies * math.prod(weight.shape(sizes)) // (case.tp if weight.split else 1)
        total += values * weight.itemsize(case.itemsize)
    return total


def layer_weight_bytes(case: Case) -> int:
    """One layer's matrices, which a scan over layers copies out of their stacks."""
    return case.config.layer_parameters // case.tp * (1 if case.fp8 else case.itemsize)


def activation_moments(case: Case, rows: int, *, scored: bool) -> dict[str, dict[str, int]]:
    """Bytes of one layer's temporaries with ``rows`` rows on the device: moment -> term -> bytes.

    Terms of a moment are live together; a layer needs its largest moment. ``scored``: retaining heads are read.
    """
    config, item, tp = case.config, case.itemsize, case.tp
    row = rows * item
    q, kv = config.num_heads * config.head_dim // tp, config.num_kv_heads * config.head_dim // tp
    chunk = min(rows, CHUNK_ROWS) * item
    hidden = {"scorer_hidden": row * case.retaining_hidden} if scored and case.retaining_hidden else {}
    projected = {"q_k_v": row * (q + 2 * kv), **hidden}
    narrow = {"quantised_rows": rows * config.hidden_size} if case.fp8 else {}
    widths = 2 * config.hidden_size + 3 * config.intermediate_size // tp
    narrow_chunk = min(rows, CHUNK_ROWS) * config.intermediate_size // tp if case.fp8 else 0
    return {
        "qkv": {"normed_rows": row * config.hidden_size, **narrow, **projected},
        "rotation": {"rotated_q_k": row * (q + kv), **projected},
        "attention": {
            "rotated_q_k": row * (q + kv),
            "v": row * kv,
            "attention_out": row * q,
            "lse": rows * config.num_heads // tp * FLOAT32,
            **hidden,
        },
        "mlp": {
            "attention_out": row * q,
            "mlp_chunk": chunk * widths + narrow_chunk,
        },
    }


def row_bytes(case: Case, rows: int) -> dict[str, int]:
    """What lies beside every layer: the residual stream, token ids and positions, rotary tables."""
    return {
        "hidden_rows": rows * case.config.hidden_size * case.itemsize,
        "ids_and_positions": 2 * rows * INT32,
        "rotary_tables": rows * case.config.head_dim * FLOAT32,
    }


def activation_bytes(case: Case, rows: int, *, scored: bool) -> int:
    """The residual stream, one layer's copied weights, and its largest moment."""
    moments = activation_moments(case, rows, scored=scored)
    largest = max(sum(terms.values()) for terms in moments.values())
    return sum(row_bytes(case, rows).values()) + layer_weight_bytes(case) + largest


def exchange_bytes(case: Case, method: AttentionMethod, layout: Layout) -> int:
    """Buffers of one layer's exchange between shards, K and V together.

    A method that gathers: the whole document and its halves K and V. Other exact methods: the keys that travel, those
    that follow, and their stacked copy. The rest: every shard's selection as gathered and padded, and for each local
    shard its slice of them with the halves.
    """
    placement = case.placement
    kv_row = 2 * case.config.num_kv_heads * case.config.head_dim // case.tp * case.itemsize * layout.tokens.shape[0]
    if placement.shards == 1:
        return 0
    if method.can.gathers:
        return 2 * placement.shards * layout.tokens.shape[2] * kv_row
    if method.can.exact:
        return 3 * layout.tokens.shape[2] * kv_row
    seen = method.visible_keys(layout, placement.shards - 1)
    slots = sum(count for kind, count in seen.items() if kind not in ("earlier", "block"))
    if not seen.get("passing"):
        return slots * kv_row
    return (2 * slots + 2 * placement.local * slots) * kv_row


def document_kv_bytes(case: Case, rows: int) -> int:
    """The cache of ``rows`` document tokens: 8-bit codes with their scales, or the model's own dtype."""
    config = case.config
    if case.kv not in CODES:
        return config.kv_bytes_per_token(case.itemsize) // case.tp * rows
    row = CODES[case.kv].dtype.itemsize * config.head_dim + SCALE_BYTES
    return 2 * config.num_layers * config.num_kv_heads // case.tp * row * rows


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device by component, for one batch of requests."""

    components: dict[str, int]
    host_bytes: int = 0
    """In the memory of the host, for all devices."""

    @property
    def bytes_per_device(self) -> int:
        """All of them."""
        return sum(self.components.values())


def memory_of(
    case: Case, method: AttentionMethod, layout: Layout, query_tokens: int = QUERY_TOKENS, new_tokens: int = NEW_TOKENS
) -> Memory:
    """Of a prefill of ``layout`` by ``method`` and the answer behind it."""
    config, local, batch = case.config, case.placement.local, layout.tokens.shape[0]
    rows = batch * local * layout.tokens.shape[2]
    tail = bucket(query_tokens) + bucket(new_tokens)
    kv = config.kv_bytes_per_token(case.itemsize) // case.tp * batch
    scored = method.can.needs_heads or getattr(method, "scorer", None) == "heads"
    document_kv = document_kv_bytes(case, batch * local * layout.kept_capacity)
    layers = config.num_layers
    on_host = max(0, layers - case.kv_layers) if case.kv_memory == HOST else 0
    kept = {DEVICE: layers, HOST: layers - max(0, on_host - ON_DEVICE), NOWHERE: 0}[case.kv_memory]
    return Memory(
        {
            "weights": weight_bytes(case),
            "document_kv": document_kv // layers * kept,
            "activations": activation_bytes(case, rows, scored=scored),
            "exchange": exchange_bytes(case, method, layout),
            "tail_kv": kv * tail,
            "programs": PROGRAM_BYTES,
        },
        document_kv // layers * on_host * case.devices * case.tp,
    )


def memory_for(
    case: Case, document_tokens: int, query_tokens: int = QUERY_TOKENS, new_tokens: int = NEW_TOKENS
) -> Memory:
    """Of one hypothetical request."""
    return memory_of(case, *case.chosen([hypothetical(document_tokens, query_tokens)]), query_tokens, new_tokens)
