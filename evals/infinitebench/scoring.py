"""InfiniteBench's scorers: the official rules, and those of the forks that score the same answers differently.

Rules: ``official`` (OpenBMB), ``minference``, ``apb``, ``string``, ``lm_eval``. A table must name its rule.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from apb_jax.install import install_hint
from evals.base import EvalError, require_choice
from evals.infinitebench.records import TASKS, cjk_punctuation

RULES = ("official", "minference", "apb", "string", "lm_eval")

Label = Any  # as stored: a string, a number, a list of either, or [answer text, letter]


def score_one(task: str, prediction: str, label: Label, *, rule: str = "official", model: str | None = None) -> float:
    """Score 0..1 of one prediction.

    Args:
      task: one of the twelve tasks.
      prediction: the model's text.
      label: the reference as stored in the record; ``[answer text, letter]`` for the two choice tasks.
      rule: whose scorer to follow.
      model: ``gpt4`` drops the first number of a math_calc answer (the official program does).
    """
    require_choice("InfiniteBench task", task, TASKS)
    require_choice("scoring rule", rule, RULES)
    if label in (None, "", []):
        raise EvalError(f"{task}: a record with an empty answer cannot be scored")
    if task == "math_calc":
        return _math_calc(prediction, label, rule, drop_first=model == "gpt4")
    return float(_SCORERS[task](prediction, label, rule))


def _first(label: Label) -> Label:
    return label[0] if isinstance(label, list) else label


def _blank(text: str, *pieces: str) -> str:
    for piece in pieces:
        text = text.replace(piece, " ")
    return text


def _single_spaced(text: str) -> str:
    return re.sub(" {2,}", " ", text)


def _after_prefix(text: str, prefixes: Sequence[str], starts: Sequence[str]) -> bool | None:
    """Whether one of ``starts`` follows the first prefix present (one character is skipped); None: none present."""
    for prefix in prefixes:
        place = text.find(prefix)
        if place < 0:
            continue
        rest = text[place + len(prefix) + 1 :]
        return any(rest.startswith(start) for start in starts) if rest else False
    return None


def _last_letter(text: str, letters: str) -> str | None:
    """The last standalone capital of ``letters`` on the first line that holds one."""
    found = re.search(rf"\b[{letters}]\b(?!.*\b[{letters}]\b)", text)
    return found.group() if found else None


# -- retrieval --------------------------------------------------------------------------------------------------------


def _first_digits(prediction: str, label: Label, rule: str) -> bool:
    pieces = [piece for piece in re.split("[^0-9]", prediction) if piece]
    return bool(pieces) and pieces[0] == str(_first(label))


_WORD_BREAKS = ("\n", ":", '"', "'", ".", ",", "?", "!", "{", "}")


def _kv_retrieval(prediction: str, label: Label, rule: str) -> bool:
    extra = ("</s>", "The", "To") if rule in ("minference", "apb") else ()
    words = _blank(prediction, *_WORD_BREAKS, *extra).split()
    if rule == "apb":
        return label[0] in words  # of a plain string this is its first character
    if rule == "official":
        return label in words  # a list is never a word
    if rule == "lm_eval":
        return any(answer in words for answer in (label if isinstance(label, list) else [label]))
    return _first(label) in words


# -- code -------------------------------------------------------------------------------------------------------------


LONGEST_NUMBER = 4000
"""Digits beyond which a run of digits equals no reference; Python converts no more than 4,300 to an int."""


def _whole(digits: str) -> int | None:
    """The integer a text spells, or None for one longer than any reference."""
    return int(digits) if len(digits) <= LONGEST_NUMBER else None


def _code_run(prediction: str, label: Label, rule: str) -> bool:
    words = _blank(prediction.strip(), "\n", ".", "`", "'", '"', ":").split()
    if not words or not re.fullmatch(r"[+-]?\d+(_\d+)*", words[-1]):
        return False
    return _whole(words[-1]) == _first(label)


_CODE_BLANKS = ("\n", "`", "'", '"', "-", "*", "Option", "option")
_CODE_PREFIXES = ("answer is:", "is:", "answer:")


def _code_debug(prediction: str, label: Label, rule: str) -> bool:
    function, letter = label
    text = prediction.strip()
    if rule in ("string", "lm_eval"):
        found = _last_letter(text, "A-J") == letter
        if found or rule == "lm_eval":
            return found
    if rule in ("official", "minference") and text[:2] in (f"{letter}.", f"{letter}:"):
        return True
    text = _single_spaced(_blank(text, *_CODE_BLANKS))
    if rule == "apb" and text[:2] in (f"{letter}.", f"{letter}:"):
        return True
    if rule == "string" and text.startswith((letter, function)):
        return True
    prefixes = _CODE_PREFIXES if rule in ("minference", "apb") else (*_CODE_PREFIXES, "correct option is:")
    return bool(_after_prefix(text, prefixes, (letter, function)))


# -- books and dialogue -----------------------------------------------------------------------------------------------


def _longdialogue(prediction: str, label: Label, rule: str) -> bool:
    names = label if isinstance(label, list) else [label]
    if rule in ("string", "lm_eval"):
        return any(name.upper() in prediction.upper() for name in names)
    words = _blank(prediction.strip(), *_WORD_BREAKS).split()
    return names[0] in [word.upper() for word in words]


_CHOICE_BLANKS = ("\n", '"', "'", ".", ",", "?", "!", "{", "}")
_CHOICE_PREFIXES = ("answer is:", "answer:", "answer is", "option is")


def _longbook_choice(prediction: str, label: Label, rule: str) -> bool:
    text = prediction.strip()
    if not text:
        return False
    if rule in ("string", "lm_eval"):
        found = _last_letter(text, "A-D") == label[1]
        if found or rule == "lm_eval":
            return found
    if text[0] in "ABCD":
        return text[0] in label
    if text in label:
        return True
    text = _single_spaced(_blank(text, *_CHOICE_BLANKS))
    decided = _after_prefix(text, _CHOICE_PREFIXES, label)
    if decided is not None:
        return decided
    for word in text.split():
        if word in "ABCD":  # a substring test in the original: "AB" decides too
            return word in label
    return False


def _f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    common = sum((Counter(prediction) & Counter(reference)).values())
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def _without(text: str, characters: str) -> str:
    return text.translate(dict.fromkeys(map(ord, characters)))


def _english_tokens(text: str, rule: str) -> list[str]:
    text = text.lower()
    articles = r"\b(a|an|the)\b"
    if rule == "lm_eval":
        return _without(re.sub(articles, " ", text), string.punctuation).split()
    return re.sub(articles, " ", _without(text, string.punctuation)).split()


def _chinese_tokens(text: str) -> list[str]:
    return list("".join(_without(text.lower(), string.punctuation + cjk_punctuation()).split()))


def _longbook_qa_eng(prediction: str, label: Label, rule: str) -> float:
    references = label if isinstance(label, list) else [label]
    tokens = _english_tokens(prediction, rule)
    return max(_f1(tokens, _english_tokens(reference, rule)) for reference in references)


def _longbook_qa_chn(prediction: str, label: Label, rule: str) -> float:
    references = label if isinstance(label, list) else [label]
    tokens = _chinese_tokens(prediction)
    return max(_f1(tokens, _chinese_tokens(reference)) for reference in references)


@cache
def _rouge(stemmer: bool):
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise EvalError(f"longbook_sum_eng needs rouge-score: {install_hint('evals')}") from error
    return RougeScorer(["rougeLsum"], use_stemmer=stemmer)


def _longbook_sum(prediction: str, label: Label, rule: str) -> float:
    references = label if isinstance(label, list) else [label]
    if rule == "lm_eval":
        prediction = re.sub(r"[\x00-\x1f]", " ", prediction)
        references = [re.sub(r"[\x00-\x1f]", " ", reference) for reference in references]
    scorer = _rouge(rule == "lm_eval")
    return max(scorer.score(reference, prediction)["rougeLsum"].fmeasure for reference in references)


# -- mathematics ------------------------------------------------------------------------------------------------------


def _math_find(prediction: str, label: Label, rule: str) -> bool:
    label = _first(label)
    found = re.search(r"\d+\.\d+|\d+", prediction)
    if found is None:
        return False
    if rule == "lm_eval" or isinstance(label, float):
        return float(found.group()) == float(label)
    if not isinstance(label, int):
        raise EvalError(f"math_find: the answer must be a number, got {label!r} (datasets turns numbers into strings)")
    value = float(found.group())  # as the original: digits beyond a double's are lost, beyond its range it is infinite
    return math.isfinite(value) and int(value) == label


def _math_calc(prediction: str, label: Label, rule: str, *, drop_first: bool) -> float:
    if rule == "lm_eval":
        raise EvalError("math_calc: lm-evaluation-harness has no such task; use rule 'official'")
    if not isinstance(label, list):
        raise EvalError(f"math_calc: the answer must be a list of numbers, got {label!r}")
    if isinstance(label[0], list) and rule in ("official", "string"):
        label = label[0]
    numbers = [_whole(digits) for digits in re.findall("[0-9]+", prediction)]
    if drop_first:
        numbers = numbers[1:]
    right = 0
    for expected, got in zip(label, numbers, strict=False):
        if expected != got:
            break
        right += 1
    return right / len(label)


_SCORERS: dict[str, Callable[[str, Label, str], bool | float]] = {
    "passkey": _first_digits,
    "number_string": _first_digits,
    "kv_retrieval": _kv_retrieval,
    "longdialogue_qa_eng": _longdialogue,
    "longbook_sum_eng": _longbook_sum,
    "longbook_choice_eng": _longbook_choice,
    "longbook_qa_eng": _longbook_qa_eng,
    "longbook_qa_chn": _longbook_qa_chn,
    "math_find": _math_find,
    "code_run": _code_run,
    "code_debug": _code_debug,
}
