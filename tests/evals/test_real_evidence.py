"""The evidence on a real model: samples survive their file, units and figures are what they say."""

from __future__ import annotations

import json
import types
from pathlib import Path

import numpy as np
import pytest

from apb_jax.errors import UserError
from benchmarks.evidence import page, page_receipts, page_ruler
from benchmarks.evidence.measure import _agreement, _nll, packed, unpacked
from benchmarks.evidence.page import write_page
from benchmarks.evidence.samples import Sample, read_samples, write_samples
from benchmarks.evidence.score import auc, beside, clustered_auc, exact, f1, figures, spearman
from benchmarks.evidence.units import METHODS, Wanted, units
from benchmarks.evidence.work import chosen, rows_of
from benchmarks.real_evidence import score_command, without_paths

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


def test_answers_to_one_sample_count_as_one() -> None:
    """The area stays; repeated answers leave its error as it is, and it is that of resampled samples."""
    rng = np.random.default_rng(0)
    lost = rng.random(120) < 0.3
    signal = rng.normal(size=120) + lost
    names = [str(i) for i in range(120)]
    area, error = clustered_auc(signal, lost, names)
    again = clustered_auc(np.tile(signal, 9), np.tile(lost, 9), names * 9)
    assert (area, error) == pytest.approx(again)
    assert area == auc(signal, lost)[0]
    drawn = [auc(signal[i], lost[i])[0] for i in rng.integers(0, 120, (400, 120))]
    assert error == pytest.approx(np.std(drawn), rel=0.15)
    assert clustered_auc([1, 2], [True, True], ["0", "1"]) is None


def test_a_page_says_whether_longer_receipts_tell_as_much() -> None:
    signals = ("kl", "kl_first", "kl_answer", "top1_answer")

    def one(method: str, length: int, best: float, kl: float, **more: object) -> dict:
        place = {"section": "receipts", "method": method, "length": length, "n": 100, "lost": 20, "receipts": 260}
        return {**place, "auc": {name: [best if name == "top1_answer" else kl, 0.02] for name in signals}, **more}

    bins = {"by_top1": [[0.9, 0.45, 40], [1.0, 0.0333, 60]]}
    together = {4096: one("all", 4096, 0.82, 0.6, **bins), 8192: one("all", 8192, 0.86, 0.75, **bins)}
    each = [one("apb", 4096, 0.8, 0.36), one("apb", 8192, 0.8, 0.74), one("star", 8192, 0.8, 0.74, receipts=234)]
    told = page_receipts._told(4096, together[4096])
    assert told.startswith("4K: 20 of 100 lost; AUC `top1_answer` 0.82 ± 0.04, `kl` 0.60 ± 0.04,")
    assert told.endswith("agree, 2 of 60 are lost (3%); where one or more differ, 18 of 40 (45%).")
    said = page_receipts._as_before(together, each).replace("\n", " ")
    assert "`top1_answer` tells the most at 4K and at 8K, its AUC not told apart (+0.04 ± 0.06)." in said
    assert "beyond their errors: `kl` +0.15 ± 0.06," in said
    assert said.endswith("likewise: apb 0.36 to 0.74.")
    missing = page._missing([*together.values(), *each], {}).replace("\n", " ")
    assert "Fewer samples than planned: Receipts 8K, star (234 of 260)." in missing


def test_a_page_says_where_nats_lie_and_move() -> None:
    def one(method: str, length: int, nats: float) -> dict:
        return {"method": method, "length": length, "nll_over_full": nats, "nll_over_full_se": 0.001}

    found = [one("apb", 2048, 0.012), one("apb", 8192, 0.004), one("spava", 2048, 0.001), one("spava", 8192, 0.009)]
    said = page._nats(found).replace("\n", " ")
    assert "above full attention at every length beyond its interval but spava at 2K." in said
    assert said.endswith("grow: spava 0.0010 to 0.0090; shrink: apb 0.0120 to 0.0040.")


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
    assert "- 8K: not told apart: apb -50.0 ± 56.6." in text
    assert "| apb | 20.085 (+1.0000 ± 0.0000) |" in text
    assert "- RULER: everything at 2K and 4K; star, apb_heads," in text
    assert "- Needles: everything at 2K, 4K and 6K; star," in text
    assert {path.name for path in written[1:]} == {
        f"real_{name}.png" for name in ("beyond", "needle", "receipts", "ruler", "ruler_tasks", "sweep")
    }


def test_a_page_says_what_differs_and_beside_whose_full_attention() -> None:
    """Sides by the interval, changes beyond the errors, an earlier full attention, few samples, heads' needles."""

    def one(method: str, length: int, task: str, score: float, **more: float) -> dict:
        place = {"section": "ruler", "method": method, "length": length, "task": task, "score": score, "n": 100}
        return {**place, "low": score - 9, "high": score + 9, **more}

    rows = []
    for length, full, locret, over in ((2048, 77, 2, -8.0), (8192, 12, 0, 10.0)):
        for method, score, mean in (("full", full, 40.0), ("locret", locret, 40.0 + over)):
            own = [one(method, length, task, score) for task in ("niah_single_2", "niah_single_3")]
            more = {} if method == "full" else {"over_full": over, "over_full_se": 1.0, "pairs": 200}
            rows += [*own, {**one(method, length, "mean", mean, **more), "n": 200}]
    rows.append(one("apb_heads", 2048, "over apb", 0, over_apb=1.93, over_apb_se=0.68, pairs=1285))
    means = [r for r in rows if r["task"] == "mean"]
    lost = page_ruler._lost(means)
    assert "- 2K: below: locret -8.0 ± 2.0." in lost
    assert "- 8K: above: locret +10.0 ± 2.0." in lost
    assert lost.replace("\n", " ").endswith("change beyond their errors: locret -8.0 to +10.0.")
    assert "10.0 and 77.0 at 2K, -10.0 and 12.0 at 8K" in page_ruler._other_run(rows).replace("\n", " ")
    assert "| locret | single_2 -75, single_3 -75 | none |" in page_ruler._by_task(rows)
    trained = page_ruler._trained(rows)
    assert "apb_heads against apb, the same samples: 2K +1.9 ± 1.3 (n=1285)." in trained
    assert "UUIDs 2 (77) at 2K, 0 (12) at 8K." in trained
    missing = page._missing(means, {"counts": {"ruler 2048": 1285}})
    assert "RULER 2K, full (200 of 1285); RULER 2K, locret (200 of 1285)." in missing


def test_scores_keep_no_paths_and_a_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = types.SimpleNamespace(decode=lambda ids: "seven")
    monkeypatch.setattr("benchmarks.evidence.prepare.codec_of", lambda model: decode)
    write_samples(tmp_path / "s.xz", SAMPLES, {"model": "m"})
    run = {"arguments": ["--samples", "/somewhere/s.xz"], "started": 1}
    (tmp_path / "runs.jsonl").write_text(json.dumps(run) + "\n")
    row = {"unit": "ruler/ruler/full/8192", "key": SAMPLES[0].key, "tokens": packed([1])}
    (tmp_path / "rows-0.jsonl").write_text(json.dumps(row) + "\n")
    told = ["--samples", str(tmp_path / "s.xz"), "--runs", str(tmp_path), "--out", str(tmp_path / "f.jsonl")]
    score_command(told)
    score_command([*told, "--add"])
    facts = json.loads((tmp_path / "f.jsonl").read_text().splitlines()[0])
    assert facts["runs"] == [{"arguments": ["--samples", "samples.xz"], "started": 1}]
