"""What methods use where the user leaves their hyper-parameters open: tables by length and by model, with sources."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Budget:
    """APB's anchor and passing tokens for documents around ``length`` tokens."""

    length: int
    anchor_tokens: int
    passing_tokens: int
    source: str


_PAPER = "APB paper, Table 8"
APB_BUDGETS = (
    Budget(4096, 256, 256, _PAPER + " (4 shards)"),
    Budget(32768, 1024, 512, _PAPER),
    Budget(65536, 2048, 1024, _PAPER),
    Budget(131072, 4096, 2048, _PAPER),
    Budget(262144, 8192, 4096, _PAPER),
    Budget(524288, 8192, 8192, _PAPER),
    Budget(1048576, 4096, 2048, _PAPER + " (speed only)"),
)
"""Rows by document length, ascending."""

_SHARES = "a quarter and an eighth of a block on 8 shards, the paper's shares at 32K to 256K"
APB_BUDGETS_OF: dict[str, tuple[Budget, ...]] = {
    "tiny": tuple(Budget(n, n // 32, n // 64, _SHARES) for n in (4096, 8192, 16384, 32768)),
}
"""Rows of models that need their own, by model name; the others use the paper's."""


def apb_budget(document_tokens: int, model: str = "") -> Budget:
    """The model's row whose length is nearest on a logarithmic scale; the shorter of two equally near ones."""
    rows = APB_BUDGETS_OF.get(model, APB_BUDGETS)
    return min(rows, key=lambda row: (abs(math.log2(row.length / max(1, document_tokens))), row.length))


OPTIONS_OF: dict[str, dict[str, Mapping[str, Any]]] = {
    "tiny": {
        "streaming": {"sink_tokens": 64, "window_tokens": 256},
        "minference": {"vertical": 64, "slash": 384},
        "infllm": {
            "init_tokens": 32, "local_tokens": 512, "block_tokens": 64, "retrieved_blocks": 4, "step_tokens": 128,
        },
        "locret": {"budget_tokens": 1024, "chunk_tokens": 512, "stabilizers": 128},
    },
}  # fmt: skip
"""Sizes of methods for models that need their own, by model and method name; the others use the methods' defaults.

tiny: about a sixteenth of what the papers use at 128K, because its documents have about 8K tokens.
"""


def options_of(model: str, method: str) -> Mapping[str, Any]:
    """A model's own sizes of a method; empty where it has none."""
    return OPTIONS_OF.get(model, {}).get(method, {})
