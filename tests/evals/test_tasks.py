"""Needle, InfiniteBench, perplexity and latency: what is asked, cut, scored and timed."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from fake_system import RegexSystem, run, word_tokens
from rich.console import Console

from apb_jax.synthetic.packaged import NOVEL
from evals.base import Completion, EvalError, Example, Scored
from evals.infinitebench.prompts import SETS, PromptText, cut_middle, make_prompt
from evals.infinitebench.records import NEW_TOKENS, TASKS, Record, make_record, read_records, templates
from evals.infinitebench.task import InfiniteBenchTask
from evals.latency.task import LatencyPlan, document_of, minference_table, run_latency
from evals.needle.four import FourNeedlesTask
from evals.needle.place import fill, insert
from evals.needle.task import HeatmapTask, even_depths
from evals.perplexity.task import PerplexityPlan, run_perplexity
from evals.ruler.prompt import make_form, split_prompt, wrapper_names
from evals.store import RunFolder, read_rows

QUIET = Console(quiet=True)
TEXT = NOVEL.read_text()

# -- prompts of RULER -------------------------------------------------------------------------------------------------


def test_singular_wording_reaches_the_chat_wrapper_as_in_the_originals():
    form = make_form("niah", wrapper="llama3", singular=True)
    assert "You is a helpful assistant." in form.head
    assert form.context.startswith("A special magic {type_needle_v} is hidden")
    assert form.question.startswith("What is the special magic ")
    assert (
        "You are a helpful assistant."
        in make_form("niah", wrapper="llama3", singular=True, keep_wrapper_grammar=True).head
    )


def test_each_variant_keeps_its_spelling():
    assert "assgined" in make_form("vt").answer_prefix
    assert "assigned" in make_form("vt", corrected_spelling=True).answer_prefix


@pytest.mark.parametrize("family", ["niah", "vt", "cwe", "fwe", "qa", "passkey"])
@pytest.mark.parametrize("wrapper", wrapper_names())
def test_a_joined_prompt_is_cut_where_the_question_begins(family, wrapper):
    form = make_form(family, wrapper=wrapper)
    fields = {"context": "some text\n", "query": "x", "type_needle_v": "numbers", "num_v": 5}
    document, query = form.document(**fields), form.query(**fields)
    assert split_prompt(document + query) == (document, query)


def test_an_unknown_prompt_is_not_cut():
    with pytest.raises(EvalError, match="no RULER question"):
        split_prompt("What now?")


# -- needle -----------------------------------------------------------------------------------------------------------


def heatmap(**changes) -> HeatmapTask:
    options = {"length": 2048, "depths": even_depths(11), **changes}
    return HeatmapTask(word_tokens(), TEXT, "novel", **options)


def test_depths():
    assert even_depths(10) == (0, 11, 22, 33, 44, 56, 67, 78, 89, 100)
    assert even_depths(1) == (0,)


@pytest.mark.parametrize("form", ["minference", "ruler"])
def test_needles_stand_at_their_depths_behind_a_sentence(form):
    tokens = word_tokens()
    for example in heatmap(form=form, rounds=2).examples():
        (number,) = example.references
        assert example.document.count(number) == 1
        before = example.document.split(number)[0]
        at = 100 * len(before) / len(example.document)
        assert abs(at - example.info["depth"]) < 9
        assert tokens.count(example.prompt) + example.max_new_tokens <= 2048
        assert example.info["key"] in example.query


def test_a_needle_moves_back_to_the_end_of_a_sentence():
    tokens = word_tokens()
    ids = tokens.encode("One two. Three four. Five six")
    assert insert(tokens, ids, "[N]", 80) == "One two. Three four.[N] Five six"
    assert insert(tokens, ids, "[N]", 40) == "One two.[N] Three four. Five six"
    assert insert(tokens, ids, "[N]", 10) == "[N]One two. Three four. Five six"
    assert insert(tokens, ids, "[N]", 100) == "One two. Three four. Five six[N]"
    assert insert(tokens, tokens.encode("a b c d"), "[N]", 50) == "[N]a b c d"


def test_a_haystack_starts_over():
    assert fill([1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    with pytest.raises(EvalError, match="no tokens"):
        fill([], 3)


def test_lengths_can_be_added_without_moving_other_samples():
    first = [e.prompt for e in heatmap(length=1024).examples()]
    assert first == [e.prompt for e in heatmap(length=1024).examples()]
    assert [e.info["key"] for e in heatmap(length=4096).examples()] != [
        e.info["key"] for e in heatmap(length=1024).examples()
    ]


def test_needle_scores_digits_in_the_answer():
    example = Example("0", "d", "q", ("1234567",), 8)
    assert heatmap().score(example, "It is 1234567.") == 1.0
    assert heatmap().score(example, "It is 123456.") == 0.0


def test_four_needles():
    tokens = word_tokens()
    task = FourNeedlesTask(tokens, TEXT, "novel", 4096, samples=20)
    examples = list(task.examples())
    assert len({e.references for e in examples}) == 1  # the keys are drawn once
    assert len({e.document for e in examples}) == 20
    for example in examples:
        assert tokens.count(example.prompt) + 128 <= 4096
        assert 4096 - tokens.count(example.prompt) - 128 < 400
        depths = example.info["depths"]
        assert depths == sorted(depths)
        assert depths[0] < 0.06  # the first needle stands in front of everything
    keys = examples[0].references
    assert task.score(examples[0], " ".join(keys[:2])) == 1.0
    assert task.score(examples[0], keys[0]) == 0.0
    over = next(FourNeedlesTask(tokens, TEXT, "novel", 4096, samples=1, fits=False).examples())
    assert tokens.count(over.prompt) > 4096 - 128  # the original returns the first prompt that is too long


# -- InfiniteBench ----------------------------------------------------------------------------------------------------

OPTIONS = ("Snowfield", "Hayslope", "Hall Farm", "Stoniton")


def record(task: str, context: str = "CONTEXT") -> Record:
    inputs = {
        "code_run": "Please give me the value of func_12(-3).",
        "math_find": "You should answer with only one number, no other words. The largest number of the list is: ",
    }
    options = OPTIONS if task in ("longbook_choice_eng", "code_debug") else ()
    return Record(7, context, inputs.get(task, "QUESTION?"), ["x"], options)


@pytest.mark.parametrize("template", SETS)
@pytest.mark.parametrize("task", TASKS)
def test_every_template_splits_after_the_context(task, template):
    if template == "gpt4" and task in ("longbook_sum_eng", "math_calc"):
        with pytest.raises(EvalError, match="no query is left; use 'yarn'"):
            make_prompt(task, record(task), template)
        return
    prompt = make_prompt(task, record(task), template)
    assert "CONTEXT" in prompt.document
    assert "CONTEXT" not in prompt.query
    assert "{" not in prompt.document + prompt.query
    assert prompt.embedded.strip()


def test_template_values():
    yarn = templates()["yarn"]
    prompt = make_prompt("math_find", record("math_find"), "yarn")
    assert prompt.document.startswith("What is the largest number in the following list?\n\nCONTEXT")
    prompt = make_prompt("code_run", record("code_run"), "yarn")
    assert "a function called func_12 in" in prompt.document
    assert prompt.query.endswith("The value of func_12(-3) is")
    prompt = make_prompt("longbook_choice_eng", record("longbook_choice_eng"), "yarn")
    assert "A. Snowfield\nB. Hayslope\nC. Hall Farm\nD. Stoniton" in prompt.query
    both = make_prompt("longbook_qa_eng", record("longbook_qa_eng"), "yarn")
    assert both.document + both.query == yarn["longbook_qa_eng"].format(context="CONTEXT", question="QUESTION?")


def test_apb_templates_ask_about_two_stars_and_open_a_chat():
    prompt = make_prompt("longdialogue_qa_eng", record("longdialogue_qa_eng"), "apb-llama")
    assert prompt.document.startswith("<|begin_of_text|><|start_header_id|>system")
    assert "**MASK**" in prompt.document
    assert prompt.query.startswith("<|eot_id|>")
    assert make_prompt("longbook_sum_eng", record("longbook_sum_eng"), "apb-yi").query == "Summary:"
    debug = make_prompt("code_debug", record("code_debug"), "apb-qwen")
    assert debug.embedded.startswith("Options:\nA. Snowfield")
    assert debug.embedded.endswith("The correct option is:")


def test_truncation_takes_out_the_middle():
    tokens = word_tokens()
    words = " ".join(f"w{i}" for i in range(100))
    prompt = PromptText(words, "?end", "e")
    whole = tokens.encode(prompt.document + prompt.query)
    cut, facts = cut_middle(tokens, prompt, 51)
    kept = [*whole[:25], *whole[len(whole) - 25 :]]  # M // 2 from both ends
    assert cut.document + cut.query == tokens.decode(kept)
    assert facts == {"tokens": 50, "cut_tokens": len(whole) - 50}
    assert cut.query == "?end"
    assert cut_middle(tokens, prompt, 1000)[0] is prompt
    with pytest.raises(EvalError, match="the question alone"):
        cut_middle(tokens, PromptText(words, words, "e"), 50)


@pytest.mark.parametrize(
    ("task", "answer", "label"),
    [
        ("math_find", ["88"], 88),  # datasets turns all answers into strings
        ("math_find", "8.5", 8.5),
        ("code_run", ["-4"], -4),
        ("math_calc", ["1", "2"], [1, 2]),
        ("math_calc", [[1, 2]], [1, 2]),
        ("kv_retrieval", ["u"], "u"),
        ("longbook_choice_eng", ["Hall Farm"], ["Hall Farm", "C"]),
        ("code_debug", ["Hayslope", "B"], ["Hayslope", "B"]),
        ("longbook_qa_eng", ["a", "b"], ["a", "b"]),
    ],
)
def test_labels_come_back_in_the_scorers_form(task, answer, label):
    row = {"context": "c", "input": "i", "answer": answer, "options": list(OPTIONS)}
    assert make_record(task, row, "here").label == label


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"context": "c", "input": "i"}, "field 'answer' missing"),
        ({"context": "c", "input": "i", "answer": [], "options": list(OPTIONS)}, "with an empty answer"),
        ({"context": "c", "input": "i", "answer": ["no"], "options": list(OPTIONS)}, "none of the 4 options"),
    ],
)
def test_wrong_records_are_refused(row, expected):
    with pytest.raises(EvalError, match=expected):
        make_record("code_debug", row, "code_debug record 0")


def passkey_rows(count: int) -> list[dict]:
    noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    rows = []
    for i in range(count):
        key = str(10000 + 7 * i)
        line = f"magic number is: {key}\n"
        context = noise * (3 * i) + line + noise * (30 - 3 * i)
        rows.append({"id": i, "context": context, "input": "What is the pass key?", "answer": [key], "options": []})
    return rows


def test_infinitebench_runs_on_a_local_folder(tmp_path, capsys):
    (tmp_path / "passkey.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passkey_rows(6)))
    assert [r.label for r in read_records("passkey", tmp_path)][:2] == [["10000"], ["10007"]]
    command = ["infinitebench", "--model", "regex", "--method", "full,forgetful", "--seq", "8k", "--tasks", "passkey"]
    assert run([*command, "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    scores = {
        method: json.loads((tmp_path / "out" / method / "metrics.json").read_text())["results"][0]
        for method in ("full", "forgetful")
    }
    assert scores["full"]["score"] == 100.0
    assert scores["forgetful"]["score"] < 100.0
    row = next(read_rows(tmp_path / "out" / "full"))
    assert row["label"] == ["10000"]
    assert run(["score", "infinitebench", "--task", "passkey", str(tmp_path / "out/full/predictions.jsonl")]) == 0


def test_answer_budgets_follow_the_rule():
    tokens = word_tokens()
    assert InfiniteBenchTask("passkey", tokens, 8192).max_new_tokens == NEW_TOKENS["passkey"][0] == 6
    assert InfiniteBenchTask("passkey", tokens, 8192, rule="minference").max_new_tokens == 15


# -- perplexity -------------------------------------------------------------------------------------------------------


class Uniform:
    """Every token is equally likely: the perplexity is the number of tokens in the vocabulary."""

    max_length = None

    def __init__(self):
        self.asked: list[tuple[int, int]] = []

    def log_probs(self, document, segment):
        self.asked.append((len(document), len(segment)))
        return Scored(np.full(len(segment), -math.log(50), np.float32), {"method": "uniform"})

    def describe(self):
        return {"model": "uniform", "method": "full"}


def perplexity_of(tmp_path: Path, scorer, console=QUIET, **changes) -> dict:
    options = {"lengths": (1024,), "window": 100, **changes}
    plan = PerplexityPlan(word_tokens(), {"novel": TEXT}, **options)
    with RunFolder(tmp_path, {"benchmark": "perplexity"}) as folder:
        return run_perplexity(scorer, plan, folder, console=console, label="uniform")


def test_uniform_predictions_have_the_vocabulary_as_perplexity(tmp_path):
    """On a terminal a bar moves meanwhile, and ends full."""
    scorer, screen = Uniform(), io.StringIO()
    (result,) = perplexity_of(tmp_path, scorer, Console(file=screen, force_terminal=True, width=100))["results"]
    assert "uniform" in screen.getvalue()
    assert "100%" in screen.getvalue()
    assert result == {
        "length": 1024,
        "perplexity": 50.0,
        "texts": 1,
        "too_short": 0,
        "ran": [{"method": "uniform", "samples": 1}],
    }
    assert scorer.asked == [(924, 100)]


def test_the_published_protocol_scores_all_but_the_chunk_heads(tmp_path):
    scorer = Uniform()
    perplexity_of(tmp_path, scorer, lengths=(12000,), window=4000, protocol="minference")
    (row,) = read_rows(tmp_path)
    assert row["scored"] == 12000 - 2  # the first token of the text and of the second 10,000
    assert scorer.asked[0] == (1, 4000)
    short = Uniform()
    perplexity_of(tmp_path / "s", short, lengths=(10000,), window=4000, protocol="minference")
    assert next(read_rows(tmp_path / "s"))["scored"] == 9999


def test_perplexity_is_the_mean_of_the_texts_perplexities(tmp_path):
    class ByText(Uniform):
        def log_probs(self, document, segment):
            return Scored(np.full(len(segment), -math.log(10 if len(self.asked) == 0 else 30)))

    scorer = ByText()
    plan = PerplexityPlan(word_tokens(), {"a": TEXT, "b": TEXT[5000:], "short": "too short"}, (1024,), 100)
    with RunFolder(tmp_path, {"benchmark": "perplexity"}) as folder:
        original = scorer.log_probs

        def alternating(document, segment):
            result = original(document, segment)
            scorer.asked.append((0, 0))
            return result

        scorer.log_probs = alternating
        (result,) = run_perplexity(scorer, plan, folder, console=QUIET, label="x")["results"]
    assert result["perplexity"] == pytest.approx(20.0)  # (10 + 30) / 2, not exp of the mean NLL
    assert (result["texts"], result["too_short"]) == (2, 1)


def test_infinite_losses_are_refused(tmp_path):
    class Broken(Uniform):
        def log_probs(self, document, segment):
            return Scored(np.full(len(segment), -np.inf))

    with pytest.raises(EvalError, match="not finite"):
        perplexity_of(tmp_path, Broken())


# -- latency ----------------------------------------------------------------------------------------------------------


class Clock(RegexSystem):
    """Takes one second per thousand prompt tokens and ten milliseconds per new token; the first call is slow."""

    def generate(self, document, query, max_new_tokens, *, embedded_query=None, ignore_stop=False):
        assert ignore_stop  # every method decodes the same number of tokens
        self.calls += 1
        prompt = self.count(document) + self.count(query)
        compiling = 100.0 if self.calls == 1 else 0.0
        return Completion("x", prompt, max_new_tokens, prompt / 1000 + compiling, 0.01 * (max_new_tokens - 1))


def test_latency_figures(tmp_path):
    plan = LatencyPlan(TEXT, "novel", (1000, 2000), repeats=3, warmups=1, new_tokens=11)
    system, screen = Clock(), io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    with RunFolder(tmp_path, {"benchmark": "latency"}) as folder:
        first, second = run_latency(system, plan, folder, console=console, label="clock")["results"]
    assert all(f"clock {length}" in screen.getvalue() for length in plan.lengths)
    assert "100%" in screen.getvalue()
    assert system.calls == 2 * (3 + 1)
    assert 0 <= 1000 - first["prompt_tokens"] <= 3
    assert first["prefill_s"] == pytest.approx(first["prompt_tokens"] / 1000)  # the warm-up is not in it
    assert first["decode_ms_per_token"] == pytest.approx(10)
    tokens = second["prompt_tokens"] + 11
    assert second["tokens_per_s"] == pytest.approx(tokens / (second["prompt_tokens"] / 1000 + 0.1), abs=0.01)


def test_latency_of_the_prefill_alone(tmp_path):
    plan = LatencyPlan(TEXT, "novel", (1000,), repeats=1, new_tokens=1)
    with RunFolder(tmp_path, {"benchmark": "latency"}) as folder:
        (result,) = run_latency(Clock(), plan, folder, console=QUIET, label="x")["results"]
    assert result["decode_ms_per_token"] is None


def test_latency_without_kv(tmp_path):
    class Alone(Clock):
        def generate(self, *given, **options):
            raise AssertionError("nothing is asked")

        def prefill_alone(self, document, query):
            return Completion("", self.count(document), 0, self.count(document) / 500, 0.0)

    plan = LatencyPlan(TEXT, "novel", (1000,), repeats=2, new_tokens=1, kv=False)
    with RunFolder(tmp_path / "a", {"benchmark": "latency"}) as folder:
        (result,) = run_latency(Alone(), plan, folder, console=QUIET, label="x")["results"]
    assert result["prefill_s"] == pytest.approx(result["prompt_tokens"] / 500)
    assert result["generated_tokens"] == 0
    assert result["decode_ms_per_token"] is None
    with RunFolder(tmp_path / "b", {"benchmark": "latency"}) as folder, pytest.raises(EvalError, match="drop --no-kv"):
        run_latency(Clock(), plan, folder, console=QUIET, label="x")


def test_the_document_is_the_longest_that_fits():
    count = word_tokens().count
    document = document_of("a b c", "q", 20, count)
    assert count(document) + count("q") == 20
    assert document.startswith("a b c a b")


def test_minference_table_layout():
    table = minference_table({"full": {10000: 0.5, 100000: 24.883}, "apb": {10000: 0.25}})
    assert table == "\tfull\tapb\n10K\t0.50000\t0.25000\n100K\t24.88300\t\n"
