"""Rows of a run to figures: one JSON line a cell, the same from the same rows."""

from __future__ import annotations

import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from apb_jax.synthetic.grading import wilson
from benchmarks.evidence.measure import unpacked
from benchmarks.evidence.samples import Sample
from evals.ruler.scoring import METRICS, score_one
from evals.ruler.task import family_of

QUESTIONS = {"qa_1": "SQuAD", "qa_2": "HotpotQA"}
SIGNALS = ("kl", "kl_max", "kl_first", "kl_answer", "top1", "top1_answer")
"""Columns of a receipt; a lost answer should go with a high KL and a low agreement."""

Scores = dict[str, dict[str, float]]
"""unit -> sample key -> score 0..1."""
Receipt = tuple[str, dict[str, float], float, float]
"""A sample, its signals, the method's score and full attention's."""
Known = tuple[str, dict[str, float], bool]
"""A sample on which full attention scores, its signals, and whether the method lost it."""


def figures(
    samples: Sequence[Sample], rows: Iterable[dict[str, Any]], decode: Callable[[list[int]], str]
) -> Iterator[dict[str, Any]]:
    """All cells of all sections that the rows hold."""
    by_place = {(s.kind, s.length, s.key): s for s in samples}
    scores: Scores = defaultdict(dict)
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    nll: dict[str, dict[str, float]] = defaultdict(dict)
    receipts: dict[str, list[Receipt]] = defaultdict(list)
    ran: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        unit, key = row["unit"], row["key"]
        section, kind, _, length = unit.split("/")[:4] if "sweep" not in unit else _sweep_parts(unit)
        if "ran" in row:
            ran[unit].update(row["ran"])
        elif section == "receipts":
            sample = by_place[kind, int(length), key]
            own, full = (score_of(sample, decode(unpacked(row[name]))) for name in ("tokens", "full_tokens"))
            receipts[unit].append((f"{key}/{length}", {name: row[name] for name in SIGNALS}, own, full))
        elif kind == "text":
            nll[unit][key] = row["nll"]
        else:
            sample = by_place[kind, int(length), key]
            text = decode(unpacked(row["tokens"]))
            texts[unit][key] = text
            scores[unit][key] = score_of(sample, text)
    for unit, what in sorted(ran.items()):
        yield {"section": "ran", "unit": unit, "methods": sorted(what)}
    yield from _ruler(scores)
    yield from _questions(texts, by_place)
    yield from _perplexity(nll)
    yield from _needles(scores, by_place)
    yield from _receipts(receipts)


def score_of(sample: Sample, text: str) -> float:
    """0 to 1: a needle is there or not, the rest by RULER's own measures."""
    if sample.kind == "needle":
        return float(sample.references[0] in text)
    return score_one(METRICS[family_of(sample.task)], text, sample.references)


def beside(found: Sequence[dict[str, Any]], earlier: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``found``, and the cells of ``earlier`` whose unit ``found`` has nothing of: a unit is replaced as a whole."""
    unit = ("section", "measure", "method", "length", "rope", "unit", "anchor", "passing")
    have = {tuple(row.get(name) for name in unit) for row in found}
    return [*found, *(row for row in earlier if tuple(row.get(name) for name in unit) not in have)]


def _sweep_parts(unit: str) -> tuple[str, str, str, str]:
    """``sweep/ruler/apb 256/128/8192``: the label has a slash of its own."""
    section, kind, first, second, length = unit.split("/")
    return section, kind, f"{first}/{second}", length


def cell(values: Sequence[float]) -> dict[str, Any]:
    """Mean in percent with its 95% Wilson interval."""
    low, high = wilson(sum(values), len(values))
    mean = sum(values) / len(values)
    return {"n": len(values), "score": round(100 * mean, 2), "low": round(100 * low, 1), "high": round(100 * high, 1)}


def _ruler(scores: Scores) -> Iterator[dict[str, Any]]:
    for unit, found in sorted(scores.items()):
        if unit.startswith("ruler/"):
            _, _, method, length = unit.split("/")
            place: dict[str, Any] = {"section": "ruler", "method": method, "length": int(length)}
        elif unit.startswith("sweep/"):
            _, _, label, length = _sweep_parts(unit)
            anchor, passing = map(int, label.split()[1].split("/"))
            place = {"section": "sweep", "method": "apb", "length": int(length), "anchor": anchor, "passing": passing}
        else:
            continue
        tasks: dict[str, list[float]] = defaultdict(list)
        for key, score in found.items():
            tasks[key.split("/")[0]].append(score)
        if place["section"] == "ruler":
            yield from ({**place, "task": task, **cell(tasks[task])} for task in sorted(tasks))
        means = [sum(values) / len(values) for values in tasks.values()]
        if place["method"] == "apb_heads":  # what training bought: against the scorer that needs none
            yield {**place, "task": "over apb", **_against(found, scores, place["length"], "apb")}
        yield {
            **place, "task": "mean", "tasks": len(tasks), **cell(list(found.values())),
            "score": round(100 * sum(means) / len(means), 2), **_against(found, scores, place["length"]),
        }  # fmt: skip


def _against(found: dict[str, float], scores: Scores, length: int, method: str = "full") -> dict[str, Any]:
    """Mean difference to another method over the same samples, in points, with its standard error."""
    theirs = scores.get(f"ruler/ruler/{method}/{length}", {})
    pairs = [score - theirs[key] for key, score in found.items() if key in theirs]
    if not pairs:
        return {}
    spread = float(np.std(pairs, ddof=1)) / math.sqrt(len(pairs)) if len(pairs) > 1 else 0.0
    return {
        f"over_{method}": round(100 * float(np.mean(pairs)), 2),
        f"over_{method}_se": round(100 * spread, 2),
        "pairs": len(pairs),
    }


# ---- SQuAD's and HotpotQA's own measures ------------------------------------------------------------------------


def normalised(text: str) -> list[str]:
    """Words as the official scripts compare them: lower case, no punctuation, no articles."""
    text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(prediction: str, references: Sequence[str]) -> float:
    """The best F1 over the references, as SQuAD's script has it; yes and no get no partial score, as in HotpotQA's."""

    def one(reference: str) -> float:
        ours, theirs = normalised(prediction), normalised(reference)
        closed = {"yes", "no", "noanswer"}
        if ours != theirs and (" ".join(ours) in closed or " ".join(theirs) in closed):
            return 0.0
        if not ours or not theirs:
            return float(ours == theirs)
        same = sum((Counter(ours) & Counter(theirs)).values())
        return 2 * same / (len(ours) + len(theirs))

    return max(map(one, references))


def exact(prediction: str, references: Sequence[str]) -> float:
    """Whether the answer is one of the references, word for word."""
    return float(any(normalised(prediction) == normalised(reference) for reference in references))


def _questions(texts: dict[str, dict[str, str]], by_place: dict[Any, Sample]) -> Iterator[dict[str, Any]]:
    for unit, found in sorted(texts.items()):
        if not unit.startswith("ruler/"):
            continue
        _, kind, method, length = unit.split("/")
        for task, name in QUESTIONS.items():
            pairs = [
                (text, by_place[kind, int(length), key].references)
                for key, text in found.items()
                if key.startswith(f"{task}/")
            ]
            if pairs:
                em = cell([exact(text, references) for text, references in pairs])
                yield {
                    "section": "questions", "method": method, "length": int(length), "task": name, "n": len(pairs),
                    "f1": round(100 * float(np.mean([f1(text, references) for text, references in pairs])), 2),
                    "exact": em["score"], "exact_low": em["low"], "exact_high": em["high"],
                }  # fmt: skip


# ---- likelihood, needles ----------------------------------------------------------------------------------------


def _parts(unit: str) -> tuple[str, str, int, str]:
    section, _, method, length, *rope = unit.split("/")
    return section, method, int(length), "/".join(rope)


def _perplexity(nll: dict[str, dict[str, float]]) -> Iterator[dict[str, Any]]:
    for unit, found in sorted(nll.items()):
        section, method, length, rope = _parts(unit)
        reference = nll.get(f"perplexity/text/full/{length}", {}) if section == "perplexity" else {}
        pairs = [value - reference[key] for key, value in found.items() if key in reference]
        row = {
            "section": section, "measure": "perplexity", "method": method, "length": length, "rope": rope,
            "n": len(found), "perplexity": round(math.exp(float(np.mean(list(found.values())))), 4),
        }  # fmt: skip
        if pairs and method != "full":
            row |= {
                "nll_over_full": round(float(np.mean(pairs)), 5),
                "nll_over_full_se": round(float(np.std(pairs, ddof=1)) / math.sqrt(len(pairs)), 5)
                if len(pairs) > 1
                else 0.0,
            }
        yield row


def _needles(scores: Scores, by_place: dict[Any, Sample]) -> Iterator[dict[str, Any]]:
    for unit, found in sorted(scores.items()):
        if "/needle/" not in unit:
            continue
        section, method, length, rope = _parts(unit)
        place = {"section": section, "measure": "needle", "method": method, "length": length, "rope": rope}
        depths: dict[int, list[float]] = defaultdict(list)
        for key, score in found.items():
            depths[by_place["needle", length, key].info["depth"]].append(score)
        yield from ({**place, "depth": depth, **cell(values)} for depth, values in sorted(depths.items()))
        yield {**place, "depth": "mean", **cell(list(found.values()))}


# ---- does a receipt tell a lost answer? -------------------------------------------------------------------------


def auc(signal: Sequence[float], lost: Sequence[bool]) -> tuple[float, float] | None:
    """(area under the ROC curve, its standard error by Hanley and McNeil 1982): ties count half."""
    yes = np.asarray([x for x, bad in zip(signal, lost, strict=True) if bad])
    no = np.asarray([x for x, bad in zip(signal, lost, strict=True) if not bad])
    if not len(yes) or not len(no):
        return None
    area = float(((yes[:, None] > no).sum() + 0.5 * (yes[:, None] == no).sum()) / (len(yes) * len(no)))
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (len(yes) - 1) * (q1 - area**2) + (len(no) - 1) * (q2 - area**2)
    return area, math.sqrt(max(0.0, variance) / (len(yes) * len(no)))


def clustered_auc(signal: Sequence[float], lost: Sequence[bool], samples: Sequence[str]) -> tuple[float, float] | None:
    """As `auc`, its standard error by Obuchowski 1997: answers of several methods to one sample are not independent."""
    x, bad = np.asarray(signal), np.asarray(lost)
    found = auc(signal, lost)
    names, place = np.unique(np.asarray(samples), return_inverse=True)
    if found is None or len(names) < 2:
        return found
    pairs = (x[bad][:, None] > x[~bad]) + 0.5 * (x[bad][:, None] == x[~bad])
    yes = np.bincount(place[bad], pairs.mean(1) - found[0], len(names))  # each sample's part in the area
    no = np.bincount(place[~bad], pairs.mean(0) - found[0], len(names))

    def spread(which: np.ndarray, part: np.ndarray) -> float:
        count = len(np.unique(which))
        return float(part @ part) * count / max(1, count - 1) / len(which) ** 2

    both = float(yes @ no) * len(names) / (len(names) - 1) / (bad.sum() * (~bad).sum())
    variance = spread(place[bad], yes) + spread(place[~bad], no) + 2 * both
    return found[0], math.sqrt(max(0.0, variance))


def _receipts(receipts: dict[str, list[Receipt]]) -> Iterator[dict[str, Any]]:
    """Over the samples that full attention scored on: lost means that the method scored less."""
    pooled: dict[tuple[str, int | str], list[Known]] = defaultdict(list)
    for unit, found in sorted(receipts.items()):
        _, method, length, _ = _parts(unit)
        known = [(sample, row, own < full) for sample, row, own, full in found if full > 0]
        place = {"section": "receipts", "method": method, "length": length, "receipts": len(found)}
        means = {name: round(float(np.mean([row[name] for _, row, _, _ in found])), 5) for name in SIGNALS}
        yield {**place, "mean": means, **_prediction(known, auc)}
        pooled[method, "all"] += known
        if 0 < sum(bad for *_, bad in known) < len(known):  # a method that loses everything tells nothing
            pooled["all", "all"] += known
            pooled["all", length] += known
    for (method, pool), known in pooled.items():
        yield {
            "section": "receipts",
            "method": method,
            "length": pool,
            **_prediction(
                known, auc if method != "all" else partial(clustered_auc, samples=[one for one, *_ in known])
            ),
            "bins": _bins(known),
            "by_top1": _by_top1(known),
        }


def _prediction(known: list[Known], area_of: Callable[..., tuple[float, float] | None]) -> dict[str, Any]:
    lost = [bad for *_, bad in known]
    out: dict[str, Any] = {"n": len(known), "lost": sum(lost), "auc": {}, "correlation": {}}
    for name in SIGNALS:
        sign = -1 if name.startswith("top1") else 1
        signal = [sign * row[name] for _, row, _ in known]
        area = area_of(signal, lost)
        if area is not None:
            out["auc"][name] = [round(area[0], 3), round(area[1], 3)]
            out["correlation"][name] = round(spearman(signal, [float(bad) for bad in lost]), 3)
    return out


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation with mean ranks of ties; 0 where one of them does not vary."""
    ours, theirs = _ranks(np.asarray(a)), _ranks(np.asarray(b))
    if np.ptp(ours) == 0 or np.ptp(theirs) == 0:
        return 0.0
    return float(np.corrcoef(ours, theirs)[0, 1])


def _ranks(x: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


TOP1_EDGES = (0.8, 0.9, 0.95, 1.0)
"""Bins of the agreement over the answer: below the first, between two, all of it."""


def _by_top1(known: list[Known]) -> list[list[float]]:
    """[mean agreement, share lost, samples] of every bin that holds any."""
    bins: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    for _, row, bad in known:
        bins[int(np.searchsorted(TOP1_EDGES, row["top1_answer"], side="right"))].append((row["top1_answer"], bad))
    return [
        [round(float(np.mean([one[i] for one in rows])), 4) for i in (0, 1)] + [len(rows)]
        for _, rows in sorted(bins.items())
    ]


def _bins(known: list[Known], count: int = 8) -> list[list[float]]:
    """[median KL, share lost, samples] of equally filled bins by KL over query and answer."""
    ordered = sorted(known, key=lambda item: item[1]["kl"])
    parts = (
        [part for part in np.array_split(np.arange(len(ordered)), min(count, len(ordered))) if len(part)]
        if ordered
        else []
    )
    return [
        [
            round(float(np.median([ordered[i][1]["kl"] for i in part])), 5),
            round(float(np.mean([ordered[i][2] for i in part])), 4),
            len(part),
        ]
        for part in parts
    ]
