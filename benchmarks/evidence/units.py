"""Units of work in their order: a section's method at one length, under one rope."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from apb_jax.errors import UserError

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
SWEEP = tuple((anchor, passing) for anchor in (128, 256, 512) for passing in (0, 128, 256, 448))
APB_BUDGETS = {2048: (128, 64), 4096: (256, 192), 8192: (256, 256), 32768: (1024, 512)}
"""(anchor, passing) tokens up to a length."""
LONG = {16384: ("yarn:2", "string:8192", ""), 32768: ("yarn:4", "yarn:2+string:16384", "")}
"""Ropes by length. STRING alone reaches twice the trained length: a distance d of 8192 or more becomes d - 8064."""


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

    APB's anchor and passing tokens are the paper's row for 4K (256 and 256) at 8K and that for 32K (1,024 and 512)
    beyond; below, what the blocks can give (a shard's anchor and passing tokens must fit into its block). Sizes that
    the papers state for 128K are scaled with the length: at their own, no document of 8K is long.
    ``opening``: tokens of the chat template in front of the document.
    """
    eighths = max(1, length // 2048)
    anchor, passing = next(budget for longest, budget in APB_BUDGETS.items() if length <= longest)
    apb: dict[str, Any] = {"anchor_tokens": anchor, "passing_tokens": passing}
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


@dataclass(frozen=True)
class Wanted:
    """A section with its methods and lengths: ``ruler``, ``ruler:full+apb``, ``needle@8192+4096``."""

    section: str
    methods: tuple[str, ...]
    lengths: tuple[int, ...]

    @classmethod
    def parse(cls, text: str, methods: tuple[str, ...], lengths: tuple[int, ...]) -> Wanted:
        """``methods`` and ``lengths`` (none: all) where the text names none."""
        front, _, at = text.partition("@")
        section, _, named = front.partition(":")
        for what, given, legal in (
            ("section", [section], SECTIONS),
            ("method", named.split("+") if named else [], METHODS),
        ):
            wrong = [name for name in given if name not in legal]
            if wrong:
                raise UserError(f"{wrong[0]!r} in {text!r} is no {what}; there are: {', '.join(legal)}")
        if any(not word.isdigit() for word in at.split("+") if at):
            raise UserError(f"the lengths of {text!r} must be whole numbers of tokens, such as @8192+4096")
        return cls(
            section, tuple(named.split("+")) if named else methods, tuple(map(int, at.split("+"))) if at else lengths
        )


def units(wanted: Sequence[Wanted], opening: int) -> Iterator[Unit]:
    """All units, section by section."""
    for one in wanted:
        for unit in _units(one.section, one.methods, opening):
            if not one.lengths or not unit.length or unit.length in one.lengths:
                yield unit


def _units(section: str, methods: tuple[str, ...], opening: int) -> Iterator[Unit]:
    """Units of a section; a method's longest length first."""

    def plain(section: str, label: str, length: int, kind: str, rope: str = "", apb_as: int = 0) -> Unit:
        name, options = method_of(label, apb_as or length, opening)
        return Unit(section, label, length, kind, name, options, rope)

    if section == "heads":
        yield Unit("heads", "heads", 0, "heads")
    if section == "ruler":
        yield from (plain(section, m, n, "ruler") for m in methods for n in RULER_LENGTHS)
    if section == "perplexity":
        yield from (plain(section, m, n, "text") for m in methods for n in RULER_LENGTHS)
    if section == "needle":
        yield from (plain(section, m, n, "needle") for m in methods for n in NEEDLE_LENGTHS)
    if section == "receipts":
        yield from (plain(section, m, n, "ruler") for n in RECEIPT_LENGTHS for m in methods if m in RECEIPT_METHODS)
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
