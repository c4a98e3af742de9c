"""What XLA made of 8-bit products: read off the optimised HLO of a compiled program."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass

F8_CALL = '"__cublas$lt$matmul$f8"'


@dataclass(frozen=True)
class HloFacts:
    """Counts of instructions; the wide ones name a whole matrix."""

    f8_calls: int
    """Products that cuBLASLt does on e4m3 operands."""
    f8_triton: int
    """Fusions of XLA's own generator that read e4m3 (they multiply, too)."""
    other_products: int
    """Products of cuBLAS in 16 or 32 bits."""
    f8_transposes: int
    """Transposes of e4m3 arrays: a weight that does not lie as the product wants it."""
    wide_weights: int
    """Arrays in 16 or 32 bits of the shape of a weight, either way round: a copy of it."""

    def __str__(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in asdict(self).items())


def hlo_facts(text: str, weights: Iterable[tuple[int, int]]) -> HloFacts:
    """Of the optimised HLO ``text``; ``weights``: shapes of the matrices, [out, in]."""
    lines = text.splitlines()
    sides = {f"{a},{b}" for pair in weights for a, b in (pair, pair[::-1])}
    wide = re.compile(r"= (?:bf16|f16|f32)\[(?:1,)?(" + "|".join(sorted(sides)) + r")\]\S* (?!parameter|bitcast)")
    entry = [line for line in lines if not line.lstrip().startswith("%param")]
    return HloFacts(
        f8_calls=sum(F8_CALL in line for line in lines),
        f8_triton=sum("__triton_gemm" in line and "f8e4m3" in line for line in lines),
        other_products=sum('"__cublas$gemm"' in line or '"__cublas$lt$matmul"' in line for line in lines),
        f8_transposes=sum(bool(re.search(r"= f8e4m3fn\[[^]]*\]\S* transpose\(", line)) for line in entry),
        wide_weights=sum(bool(wide.search(line)) for line in _outside_fusions(lines)),
    )


def _outside_fusions(lines: list[str]) -> list[str]:
    """Instructions whose results lie in memory: those of no fused computation."""
    kept, fused = [], False
    for line in lines:
        if line.rstrip().endswith("{") and not line.startswith(" "):
            fused = "fused" in line or "triton" in line or "wrapped" in line
        elif not fused:
            kept.append(line)
    return kept
