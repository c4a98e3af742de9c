"""RULER's official metrics."""

import re
from collections.abc import Mapping, Sequence

from evals.base import EvalError

METRICS = {"niah": "all", "vt": "all", "cwe": "all", "fwe": "all", "qa": "part", "passkey": "all"}

# Weights of the six standard lengths in RULER's two weighted averages.
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
EFFECTIVE_THRESHOLD = 85.6


def clean_prediction(text: str) -> str:
    """Strip, turn control characters into newlines, strip again."""
    return re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip()


def score_one(metric: str, prediction: str, references: Sequence[str | None]) -> float:
    """Score 0..1 of one answer: the share of references found (``all``) or whether any is (``part``)."""
    if not references:
        raise EvalError("a record with an empty answer cannot be scored (RULER divides by the number of answers)")
    text = clean_prediction(prediction).lower()
    found = [str(reference).lower() in text for reference in references]
    return sum(found) / len(found) if metric == "all" else float(any(found))


def task_score(metric: str, predictions: Sequence[str], references: Sequence[Sequence[str | None]]) -> float:
    """Official score of a task, 0..100 with two decimals; 0 if the first sample's first reference is None."""
    if not predictions:
        raise EvalError("no samples to score")
    if references[0] and references[0][0] is None:
        return 0.0
    scores = [score_one(metric, p, r) for p, r in zip(predictions, references, strict=True)]
    return round(sum(scores) / len(scores) * 100, 2)


def weighted_averages(by_length: Mapping[int, float]) -> tuple[float, float] | None:
    """RULER's (increasing, decreasing) averages over the six lengths, or None if one is missing."""
    if any(length not in by_length for length in LENGTHS):
        return None
    scores = [by_length[length] for length in LENGTHS]
    weights = range(1, len(LENGTHS) + 1)
    total = sum(weights)
    rising = sum(w * s for w, s in zip(weights, scores, strict=True)) / total
    falling = sum(w * s for w, s in zip(reversed(weights), scores, strict=True)) / total
    return round(rising, 1), round(falling, 1)


def effective_length(by_length: Mapping[int, float], threshold: float = EFFECTIVE_THRESHOLD) -> int | None:
    """Greatest tested length whose mean score exceeds the threshold (Llama-2-7B at 4K), or None."""
    passed = [length for length, score in by_length.items() if score > threshold]
    return max(passed, default=None)
