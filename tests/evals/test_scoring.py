"""Every normalisation rule of the scorers, each with a case that fails without it."""

import pytest

from evals.base import EvalError
from evals.infinitebench.scoring import RULES, score_one
from evals.ruler import scoring as ruler


@pytest.mark.parametrize(
    ("metric", "prediction", "references", "expected"),
    [
        ("all", "IT IS PRDVY.", ["prdvy"], 1.0),  # both sides are lowered
        ("all", "prdvy", ["PRDVY", "CGOKP"], 0.5),  # the share that is found
        ("all", "the 12345678", ["234567"], 1.0),  # a substring, not a word
        ("part", "nothing but France", ["Paris", "France"], 1.0),  # any reference
        ("part", "nothing", ["Paris", "France"], 0.0),
        ("all", "new\x00york", ["new\nyork"], 1.0),  # control characters become line breaks
        ("all", "  \x07 answer \x1f", ["answer"], 1.0),
    ],
)
def test_ruler_matching(metric, prediction, references, expected):
    assert ruler.score_one(metric, prediction, references) == expected


def test_ruler_strips_before_and_after_cleaning():
    assert ruler.clean_prediction(" \x00 a\tb \x1f ") == "a\nb"


def test_ruler_task_score_is_a_rounded_percentage():
    assert ruler.task_score("all", ["a", "b", "c"], [["a"], ["x"], ["y"]]) == 33.33


def test_ruler_none_reference_zeroes_the_task():
    assert ruler.task_score("part", ["a", "a"], [[None], ["a"]]) == 0.0


def test_ruler_refuses_an_empty_answer():
    with pytest.raises(EvalError, match="empty answer"):
        ruler.score_one("all", "a", [])


def test_ruler_averages_are_those_of_its_readme():
    scores = dict(zip(ruler.LENGTHS, (95.5, 93.8, 91.6, 87.4, 84.7, 77.0), strict=True))
    assert ruler.weighted_averages(scores) == (85.4, 91.3)
    assert ruler.effective_length(scores) == 32768
    assert ruler.effective_length({4096: 85.6}) is None  # it must exceed the threshold
    assert ruler.weighted_averages({4096: 1.0}) is None


UUID = "24bc7fba-33c8-4dca-86fa-41e0d5736e0d"
DEBUG = ["parse_args", "B"]
CHOICE = ["Walking Georgie", "A"]

# (task, prediction, label, {rule: score}); a rule that is not named scores like "official".
CASES = [
    # the first run of digits decides, letters around it do not matter, and it is compared as a string
    ("passkey", "The pass key is 71432.", "71432", {"official": 1}),
    ("passkey", "7 or 71432", "71432", {"official": 0}),
    ("passkey", "071432", "71432", {"official": 0}),
    ("passkey", "71432", ["71432"], {"official": 1}),
    ("number_string", "no digits", "1", {"official": 0}),
    # every one of the ten separators is blanked
    *[("kv_retrieval", f"x{mark}{UUID}{mark}y", UUID, {"official": 1, "apb": 0}) for mark in "\n:\"'.,?!{}"],
    ("kv_retrieval", f"x;{UUID}", UUID, {"official": 0, "minference": 0, "string": 0, "lm_eval": 0}),
    ("kv_retrieval", f"{UUID}</s>", UUID, {"official": 0, "minference": 1, "apb": 0}),
    ("kv_retrieval", f"The{UUID}", UUID, {"official": 0, "minference": 1, "apb": 0}),
    ("kv_retrieval", f"To{UUID}", UUID, {"official": 0, "minference": 1, "apb": 0}),
    ("kv_retrieval", UUID, [UUID], {"official": 0, "minference": 1, "apb": 1, "string": 1, "lm_eval": 1}),
    ("kv_retrieval", UUID, UUID, {"official": 1, "apb": 0}),
    # the last word, once marks are blanked, as an integer
    *[("code_run", f"is{mark}-7{mark}", -7, {"official": 1}) for mark in "\n.`'\":"],
    ("code_run", "7 is the value", 7, {"official": 0}),
    ("code_run", "", 7, {"official": 0}),
    ("code_run", "7", [7], {"official": 1}),
    # a letter with a mark at the very start
    ("code_debug", "B. because", DEBUG, {"official": 1}),
    ("code_debug", "  B: because", DEBUG, {"official": 1}),
    ("code_debug", "B because", DEBUG, {"official": 0, "string": 1, "lm_eval": 1}),
    ("code_debug", "`B. it", DEBUG, {"official": 0, "apb": 0, "string": 1, "lm_eval": 1}),
    ("code_debug", "OptionB. x", DEBUG, {"official": 0}),
    ("code_debug", "*B. x C", DEBUG, {"official": 0, "string": 0, "lm_eval": 0}),
    # the first prefix present decides, after one skipped character
    ("code_debug", "the answer is: B", DEBUG, {"official": 1}),
    ("code_debug", "the answer is: parse_args, C", DEBUG, {"official": 1, "lm_eval": 0}),
    ("code_debug", "it is: C, but the answer is: B", DEBUG, {"official": 1}),
    ("code_debug", "the answer is: C. the answer: B", DEBUG, {"official": 0, "string": 1, "lm_eval": 1}),
    ("code_debug", "the answer is: OptionB", DEBUG, {"official": 1, "lm_eval": 0}),
    ("code_debug", "the answer is: optionB", DEBUG, {"official": 1, "lm_eval": 0}),
    ("code_debug", "the answer is:", DEBUG, {"official": 0}),
    ("code_debug", "The Answer is: no, is parse_args", DEBUG, {"official": 0}),
    ("code_debug", "the answer is:**B** of X", DEBUG, {"official": 1}),
    ("code_debug", "the answer is: *B* of D", DEBUG, {"official": 1, "lm_eval": 0}),
    ("code_debug", "the answer is:  - B of D", DEBUG, {"official": 1, "string": 1, "lm_eval": 0}),
    ("code_debug", "the correct option is: B, D", DEBUG, {"official": 1, "lm_eval": 0}),
    # the last standalone capital of the first line that has one
    ("code_debug", "C is not it, B\nD", DEBUG, {"official": 0, "string": 1, "lm_eval": 1}),
    ("code_debug", "parse_args is wrong", DEBUG, {"official": 0, "string": 1, "lm_eval": 0}),
    # numbers
    ("math_find", "it is 88.", 88, {"official": 1}),
    ("math_find", "-88", 88, {"official": 1}),
    ("math_find", "88.9", 88, {"official": 1, "lm_eval": 0}),
    ("math_find", "1.5", 1.5, {"official": 1}),
    ("math_find", "none", 88, {"official": 0}),
    ("math_find", "88", [88], {"official": 1}),
    # dialogue: upper-cased words against the first name only
    ("longdialogue_qa_eng", "It's bill!", ["BILL", "BROUSSARD"], {"official": 1}),
    ("longdialogue_qa_eng", "broussard", ["BILL", "BROUSSARD"], {"official": 0, "string": 1, "lm_eval": 1}),
    ("longdialogue_qa_eng", "the oil man", ["OIL MAN"], {"official": 0, "string": 1, "lm_eval": 1}),
    ("longdialogue_qa_eng", "billy", ["BILL"], {"official": 0, "string": 1, "lm_eval": 1}),
    # choice
    ("longbook_choice_eng", "", CHOICE, {"official": 0}),
    ("longbook_choice_eng", "  A", CHOICE, {"official": 1}),
    ("longbook_choice_eng", "B or A", CHOICE, {"official": 0, "string": 1, "lm_eval": 1}),
    ("longbook_choice_eng", "Either way A", CHOICE, {"official": 1}),
    ("longbook_choice_eng", "Walking Georgie", CHOICE, {"official": 1, "lm_eval": 0}),
    ("longbook_choice_eng", "the answer is: Walking Georgie", CHOICE, {"official": 1, "lm_eval": 0}),
    ("longbook_choice_eng", "the answer is 'A'", CHOICE, {"official": 1}),
    ("longbook_choice_eng", "the answer is D, or A", CHOICE, {"official": 0, "string": 1, "lm_eval": 1}),
    ("longbook_choice_eng", "my option is A", CHOICE, {"official": 1}),
    ("longbook_choice_eng", "it may be (A)", CHOICE, {"official": 0, "string": 1, "lm_eval": 1}),
    ("longbook_choice_eng", "it may be {A}", CHOICE, {"official": 1}),
    ("longbook_choice_eng", "it may be AB then A", CHOICE, {"official": 0, "string": 1, "lm_eval": 1}),
    # F1 of words: case, punctuation, articles, white space, multiset, best reference
    ("longbook_qa_eng", "The  CAT!", ["a cat"], {"official": 1}),
    ("longbook_qa_eng", "cat cat", ["cat"], {"official": 2 / 3}),
    ("longbook_qa_eng", "dog", ["cat", "dog"], {"official": 1}),
    ("longbook_qa_eng", "", ["cat"], {"official": 0}),
    ("longbook_qa_eng", "t.h.e cat", ["cat"], {"official": 1, "lm_eval": 2 / 3}),
    ("longbook_qa_eng", "theatre", ["atre"], {"official": 0}),
    # F1 of characters: CJK and ASCII punctuation, case, white space
    ("longbook_qa_chn", "袁 雨琳》。A!", ["袁雨琳a"], {"official": 1}),
    ("longbook_qa_chn", "《袁雨琳", ["袁雨琳"], {"official": 6 / 7}),  # the original's list lacks this one
    ("longbook_qa_chn", "袁", ["袁雨琳"], {"official": 0.5}),
    ("longbook_qa_chn", "天、地〃人", ["天地人"], {"official": 1}),
    # prefix of running values
    ("math_calc", "[1, 4, 8]", [1, 4, 8], {"official": 1}),
    ("math_calc", "1 4 9 16", [1, 4, 8, 16], {"official": 0.5}),
    ("math_calc", "-1, 4", [1, 4], {"official": 1}),
    ("math_calc", "1", [[1, 4]], {"official": 0.5, "minference": 0, "apb": 0, "string": 0.5}),
    ("math_calc", "", [1], {"official": 0}),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("task", "prediction", "label", "expected"), CASES)
def test_infinitebench_rule(task, prediction, label, expected, rule):
    if rule == "lm_eval" and task == "math_calc":
        with pytest.raises(EvalError, match="no such task"):
            score_one(task, prediction, label, rule=rule)
        return
    wanted = expected.get(rule, expected["official"])
    assert score_one(task, prediction, label, rule=rule) == pytest.approx(wanted)


def test_gpt4_loses_its_first_number_in_math_calc():
    assert score_one("math_calc", "5 1 4", [1, 4], model="gpt4") == 1.0
    assert score_one("math_calc", "5 1 4", [1, 4], model="yi-34b-200k") == 0.0


def test_summary_splits_sentences_at_line_breaks_and_takes_the_best_reference():
    reference = "the cat sat the dog ran"
    assert score_one("longbook_sum_eng", "the dog ran\nthe cat sat", [reference]) == pytest.approx(1.0)
    assert score_one("longbook_sum_eng", "the dog ran the cat sat", [reference]) < 0.8
    assert score_one("longbook_sum_eng", "the dog ran\nthe cat sat", [reference], rule="lm_eval") < 0.8
    assert score_one("longbook_sum_eng", "blue", ["red", "blue"]) == 1.0
    # only the harness stems; it reads one line
    assert score_one("longbook_sum_eng", "cats running", ["cat runs"]) == 0.0
    assert score_one("longbook_sum_eng", "cats running", ["cat runs"], rule="lm_eval") == 1.0


def test_math_find_refuses_a_string_label():
    with pytest.raises(EvalError, match="must be a number"):
        score_one("math_find", "88", "88")


def test_an_empty_label_is_refused():
    with pytest.raises(EvalError, match="empty answer"):
        score_one("passkey", "1", [])
