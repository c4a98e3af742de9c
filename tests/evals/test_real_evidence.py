"""The evidence on a real model: samples survive their file, units and figures are what they say."""

from __future__ import annotations

import json
import types
from pathlib import Path

import numpy as np
import pytest

from apb_jax.errors import UserError
from benchmarks.evidence.measure import _agreement, _nll, packed, unpacked
from benchmarks.evidence.page import write_page
from benchmarks.evidence.samples import Sample, read_samples, write_samples
from benchmarks.evidence.score import auc, beside, exact, f1, figures, spearman
from benchmarks.evidence.units import METHODS, Wanted, units
from benchmarks.evidence.work import chosen, rows_of
from benchmarks.real_evidence import without_paths

RUN = types.SimpleNamespace(count=None, receipt_count=1)


def sample(kind: str, task: str, name: str, *, depth: int = 0, length: int = 8192) -> Sample:
    ids = np.arange(4 + int(name[0]), dtype=np.int32)
    return Sample(kind, length, task, name, ids, ids[:2], ids[:1], ("seven",), 8, {"depth": depth})


SAMPLES = [
    *(sample("ruler", task, name) for task in ("niah_single_1", "qa_1") for name in ("0", "1")),
    *(sample("needle", "needle", f"{i}-{depth}", depth=depth) for i in range(2) for depth in (0, 100)),
    sample("text", "essays", "0", length=32768),
]


def test_samples_come_back_as_they_were(tmp_path: Path) -> None:
    write_samples(tmp_path / "s.xz", SAMPLES, {"seed": 1})
    found, facts = read_samples(tmp_path / "s.xz")
    assert facts == {"seed": 1}
    for one, other in zip(found, SAMPLES, strict=True):
        assert (one.key, one.kind, one.references, one.info) == (other.key, other.kind, other.references, other.info)
        for part in ("document", "query", "embedded"):
            np.testing.assert_array_equal(getattr(one, part), getattr(other, part))
    assert unpacked(packed([0, 5, 49151])) == [0, 5, 49151]


def test_sections_take_methods_and_lengths_of_their_own() -> None:
    found = list(units([Wanted.parse("ruler:full+apb@4096+2048", METHODS, ())], opening=24))
    assert [(u.label, u.length) for u in found] == [("full", 4096), ("full", 2048), ("apb", 4096), ("apb", 2048)]
    every = [u.name for u in units([Wanted.parse(s, METHODS, ()) for s in ("ruler", "sweep", "beyond", "string")], 24)]
    assert len(set(every)) == len(every)
    for text, says in (("rulr", "no section"), ("ruler:ful", "no method"), ("ruler@8k", "whole numbers")):
        with pytest.raises(UserError, match=says):
            Wanted.parse(text, METHODS, ())


def test_tasks_take_turns_and_receipts_read_fewer() -> None:
    (ruler,) = units([Wanted.parse("ruler:full@8192", METHODS, ())], 24)
    keys = [s.key for s in chosen(ruler, SAMPLES, RUN)]
    assert keys == ["niah_single_1/0", "qa_1/0", "niah_single_1/1", "qa_1/1"]
    (receipt,) = units([Wanted.parse("receipts:apb@8192", METHODS, ())], 24)
    assert [s.key for s in chosen(receipt, SAMPLES, RUN)] == ["niah_single_1/0", "qa_1/0"]


def test_agreement_and_likelihood_count_the_rows_that_are_there() -> None:
    rng = np.random.default_rng(0)
    theirs, ours = rng.normal(size=(2, 6, 5)).astype(np.float32), rng.normal(size=(2, 6, 5)).astype(np.float32)
    ours[1] = theirs[1]
    found = {name: np.asarray(x) for name, x in _agreement(ours, theirs, np.int32([2, 3]), np.int32([4, 6])).items()}
    p, q = (np.exp(x[0]) / np.exp(x[0]).sum(-1, keepdims=True) for x in (theirs, ours))
    kl = (p * np.log(p / q)).sum(-1)
    np.testing.assert_allclose(found["kl"], [kl[:4].mean(), 0], atol=1e-5)
    np.testing.assert_allclose(found["kl_answer"], [kl[1:4].mean(), 0], atol=1e-5)  # from the question's last row on
    np.testing.assert_allclose(found["kl_first"], [kl[1], 0], atol=1e-5)
    np.testing.assert_allclose(found["kl_max"], [kl[:4].max(), 0], atol=1e-5)
    same = p[:4].argmax(-1) == q[:4].argmax(-1)
    np.testing.assert_allclose(found["top1"], [same.mean(), 1])
    targets = np.int32([[1, 2, 3], [0, 0, 4]])
    expected = [-np.log(p[np.arange(3), targets[0]]).mean()]
    np.testing.assert_allclose(np.asarray(_nll(theirs, targets))[:1], expected, rtol=1e-5)


def test_official_question_scores() -> None:
    assert f1("The tall Eiffel Tower.", ["Eiffel tower", "Paris"]) == pytest.approx(0.8)
    assert f1("yes, it is", ["yes"]) == 0.0  # HotpotQA's rule
    assert (exact("An answer!", ["answer"]), exact("answers", ["answer"])) == (1.0, 0.0)


def test_a_signal_that_tells_and_one_that_does_not() -> None:
    area, error = auc([3, 4, 1, 2], [True, True, False, False])
    assert (area, error) == (1.0, 0.0)
    assert auc([1, 1, 1, 1], [True, False, True, False])[0] == 0.5
    assert auc([1, 2], [True, True]) is None
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)


def test_earlier_cells_stay_where_nothing_new_is_known() -> None:
    """A unit is replaced as a whole: none of its tasks stays from an earlier run."""
    place = {"section": "ruler", "length": 8192}
    new = [{**place, "method": "full", "task": "mean", "score": 2}]
    old = [{**place, "method": m, "task": t, "score": 1} for m in ("full", "star") for t in ("mean", "qa_1")]
    assert beside(new, old) == [*new, *old[2:]]


def test_rows_to_figures_to_a_page(tmp_path: Path) -> None:
    """Every section from rows with known answers; the page and its pictures are written, a torn line is left out."""
    words = {1: "seven", 2: "eight"}
    rows = []
    for method, tokens in (("full", {"0": 1, "1": 1}), ("apb", {"0": 2, "1": 1})):
        for s in SAMPLES[:4]:
            rows.append({"unit": f"ruler/ruler/{method}/8192", "key": s.key, "tokens": packed([tokens[s.id]])})
        for s in SAMPLES[4:8]:
            hit = 1 if s.info["depth"] else 2
            rows.append({"unit": f"needle/needle/{method}/8192", "key": s.key, "tokens": packed([hit])})
        rows.append({"unit": f"perplexity/text/{method}/8192", "key": "essays/0", "nll": 2.0 + (method == "apb")})
    for s in SAMPLES[:4]:
        signals = dict.fromkeys(("kl", "kl_max", "kl_first", "kl_answer"), 1.0 if s.id == "0" else 0.1)
        answers = {"tokens": packed([2 if s.id == "0" else 1]), "full_tokens": packed([1])}
        signals |= {"top1": 1.0, "top1_answer": 1.0}
        rows.append({"unit": "receipts/ruler/apb/8192", "key": s.key, **signals, **answers})
        rows.append({"unit": "sweep/ruler/apb 256/128/8192", "key": s.key, "tokens": packed([1])})
    rows.append({"unit": "beyond/needle/full/8192/yarn:2", "key": SAMPLES[4].key, "tokens": packed([1])})
    rows.append({"unit": "ruler/ruler/apb/8192", "key": "", "ran": ["APB(...)"]})
    (tmp_path / "rows-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"unit": "torn')
    found = list(figures(SAMPLES, rows_of(tmp_path), lambda ids: " ".join(words[i] for i in ids)))

    def one(**place: object) -> dict:
        (row,) = [r for r in found if all(r.get(name) == value for name, value in place.items())]
        return row

    apb = one(section="ruler", method="apb", task="mean")
    assert (apb["score"], apb["over_full"], apb["n"]) == (50.0, -50.0, 4)
    assert one(section="questions", method="apb")["exact"] == 50.0
    assert one(section="perplexity", method="apb")["nll_over_full"] == 1.0
    assert one(section="needle", method="full", depth=100)["score"] == 100.0
    assert one(section="receipts", method="apb", length=8192)["auc"]["kl"][0] == 1.0
    assert (one(section="sweep")["anchor"], one(section="sweep")["passing"]) == (256, 128)
    run = {
        "arguments": without_paths(["--samples", "/a/b", "--count", "2"]),
        "device": "1 x cpu",
        "versions": {"jax": "0"},
    }
    facts = {"section": "facts", "samples": {"model": "m", "seed": 1, "variant": "v"}, "runs": [run]}
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [facts, *found]))
    written = write_page(tmp_path / "f.jsonl", tmp_path / "page.md", tmp_path / "pictures")
    text = written[0].read_text()
    assert "python -m benchmarks.real_evidence run --samples samples.xz --count 2" in text
    assert "apb, keys scored by the query (training-free), 8K: 50.0 of full attention's 100.0 (50%)" in text
    assert {path.name for path in written[1:]} == {
        f"real_{name}.png" for name in ("beyond", "needle", "receipts", "ruler", "ruler_tasks", "sweep")
    }
