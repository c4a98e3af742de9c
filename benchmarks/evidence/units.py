"""Units of work in their order: a section's method at one length, under one rope."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SECTIONS = ("heads", "ruler", "perplexity", "needle", "receipts", "sweep", "beyond", "string")
METHODS = (
    "full", "apb", "star", "apb_heads", "starx", "minference", "streaming", "xattention", "infllm", "spava", "locret",
)  # fmt: skip
"""In the order of interest. ``apb`` scores keys by the query (training-free), ``apb_heads`` by retaining heads."""
NEEDS_HEADS = ("apb_heads", "locret")
TRAINED = 8192
"""Positions of the model."""
RULER_LENGTHS = (8192, 4096, 2048)
NEEDLE_LENGTHS = (8192, 6144, 4096, 2048)
RECEIPT_LENGTHS = (8192, 4096)
RECEIPT_METHODS = tuple(m for m in METHODS if m != "full")
SWEEP = tuple((anchor, passing) for anchor in (128, 256, 512) for passing in (0, 64, 128, 256, 512))
LONG = {16384: ("yarn:2", "string:8192", ""), 32768: ("yarn:4", "yarn:2+string:16384", "")}
"""Ropes by length. STRING alone reaches twice the trained length: it brings a distance d of 8192 or more to d - 8064."""


@dataclass(frozen=True)
class Unit:
    """``options``: the method's fields; ``rope``: "", "yarn:2", "string:TOKENS", or "yarn:2+string:TOKENS"."""

    section: str
    label: str
    length: int
    kind: str = "ruler"
    method: str = "full"
    options: dict[str, Any] = field(default_factory=dict)
    rope: str = ""

    @property
    def name(self) -> str:
        return f"{self.section}/{self.kind}/{self.label}/{self.length}" + (f"/{self.rope}" if self.rope else "")

    @property
    def needs_heads(self) -> bool:
        return self.label in NEEDS_HEADS


def method_of(label: str, length: int, opening: int) -> tuple[str, dict[str, Any]]:
    """(name, fields) of a method for documents of about ``length`` tokens on 8 shards.

    APB's anchor and passing tokens are the paper's row for 4K (256 and 256), half of it at 2K, where a block has 256
    tokens. Sizes that the papers state for 128K are scaled with the length: at their own, no document of 8K is long.
    ``opening``: tokens of the chat template in front of the document.
    """
    eighths = max(1, length // 2048)
    apb = {"anchor_tokens": 128 if length <= 2048 else 256, "passing_tokens": 96 if length <= 2048 else 256}
    apb |= {"query_at": opening, "shared_anchor": True}
    tables: dict[str, tuple[str, dict[str, Any]]] = {
        "apb": ("apb", {**apb, "scorer": "query"}),
        "apb_heads": ("apb", {**apb, "scorer": "heads"}),
        "streaming": ("streaming", {"sink_tokens": 64, "window_tokens": 128 * eighths}),
        "minference": ("minference", {"vertical": 32 * eighths, "slash": 128 * eighths}),
        "infllm": (
            "infllm",
            {
                "init_tokens": 32, "local_tokens": 128 * eighths, "block_tokens": 32, "retrieved_blocks": 4 * eighths,
                "step_tokens": 128,
            },
        ),
        "locret": ("locret", {"budget_tokens": 256 * eighths, "chunk_tokens": 512, "stabilizers": 64}),
    }  # fmt: skip
    return tables.get(label, (label, {}))


def units(sections: tuple[str, ...], methods: tuple[str, ...], opening: int) -> Iterator[Unit]:
    """All units, section by section; a method's longest length first."""

    def plain(section: str, label: str, length: int, kind: str, rope: str = "", apb_as: int = 0) -> Unit:
        name, options = method_of(label, apb_as or length, opening)
        return Unit(section, label, length, kind, name, options, rope)

    for section in sections:
        if section == "heads":
            yield Unit("heads", "heads", 0, "heads")
        if section == "ruler":
            yield from (plain(section, m, n, "ruler") for m in methods for n in RULER_LENGTHS)
        if section == "perplexity":
            yield from (plain(section, m, n, "text") for m in methods for n in RULER_LENGTHS)
        if section == "needle":
            yield from (plain(section, m, n, "needle") for m in methods for n in NEEDLE_LENGTHS)
        if section == "receipts":
            yield from (
                plain(section, m, n, "ruler") for n in RECEIPT_LENGTHS for m in methods if m in RECEIPT_METHODS
            )
        if section == "sweep":
            for anchor, passing in SWEEP:
                name, options = method_of("apb", TRAINED, opening)
                fields = {**options, "anchor_tokens": anchor, "passing_tokens": passing}
                yield Unit(section, f"apb {anchor}/{passing}", TRAINED, "ruler", name, fields)
        if section == "beyond":
            for length, ropes in LONG.items():
                for label in ("full", "apb"):
                    for rope in ropes:
                        for kind in ("text", "needle"):
                            yield plain(section, label, length, kind, rope)
        if section == "string":
            for length in (8192, 6144, 4096):
                for label in ("full", "apb"):
                    for kind in ("text", "needle") if length != 6144 else ("needle",):
                        yield plain(section, label, length, kind, f"string:{length // 3}")
