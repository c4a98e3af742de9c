"""The real texts RULER builds on: essays, SQuAD and HotpotQA, read from a folder given by the user."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from apb_jax.install import install_hint
from apb_jax.json_text import parse_json
from evals.base import EvalError, require_choice

# The first existing name is read.
FILES = {
    "essays": ("PaulGrahamEssays.json", "paul_graham_essays.json"),
    "squad": ("dev-v2.0.json", "squad.json", "squad_dev_v2_part.json"),
    "hotpotqa": ("hotpot_dev_distractor_v1.json", "hotpotqa.json", "hotpotqa_dev_100.json"),
    "english_words": ("english_words.json",),
}

SPLITTERS = ("untrained", "english")


@dataclass(frozen=True)
class Question:
    """``gold`` and ``more`` are document numbers: those with the answer, and others of the same article."""

    text: str
    outputs: tuple[str, ...]
    gold: tuple[int, ...]
    more: tuple[int, ...] = ()


@dataclass(frozen=True)
class QuestionSet:
    documents: tuple[str, ...]
    questions: tuple[Question, ...]


def find(data: str | Path | None, what: str) -> Path:
    """Path of one of the texts in folder ``data``; EvalError says what is missing and how to get it."""
    names = FILES[what]
    if data is None:
        raise EvalError(f"{what} needed: pass --data DIR with {names[0]} in it (see `python -m evals data`)")
    folder = Path(data)
    if not folder.is_dir():
        raise EvalError(f"--data {folder}: no such folder (`python -m evals data` says what belongs into it)")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise EvalError(
        f"--data {folder}: no {what} file there, looked for {', '.join(names)} (see `python -m evals data`)"
    )


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvalError(f"{path}: not a JSON file ({error})") from error


def _field(record: dict, key: str, where: str) -> Any:
    if not isinstance(record, dict) or key not in record:
        held = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise EvalError(f"{where}: field {key!r} missing (it has: {held})")
    return record[key]


class Essays:
    """The essay text as words, and prefixes of it as sentences."""

    def __init__(self, path: Path, splitter: str):
        text = _field(_read_json(path), "text", str(path))
        self.words = re.sub(r"\s+", " ", text).split(" ")
        self._split = sentence_splitter(splitter)
        self._sentences = lru_cache(maxsize=4)(self._make_sentences)

    def _make_sentences(self, count: int, repeat: bool) -> tuple[str, ...]:
        words = self.words
        if repeat and count > len(words):
            words = words * (-(-count // len(words)))
        return tuple(self._split(" ".join(words[:count]).strip()))

    def sentences(self, count: int, *, repeat: bool) -> tuple[str, ...]:
        """Sentences of the first ``count`` words; ``repeat`` starts over where the essays end."""
        return self._sentences(count, repeat)


@cache
def sentence_splitter(name: str) -> Callable[[str], list[str]]:
    """``english`` is NLTK's trained punkt model (published prompts); ``untrained`` needs no download."""
    require_choice("sentence splitter", name, SPLITTERS)
    try:
        import nltk
    except ImportError as error:
        raise EvalError(f"essay tasks need nltk: {install_hint('evals')}") from error
    if name == "untrained":
        return nltk.tokenize.punkt.PunktSentenceTokenizer().tokenize
    try:
        return nltk.tokenize.punkt.PunktTokenizer("english").tokenize
    except LookupError as error:
        raise EvalError(
            "sentence splitter 'english' needs NLTK's punkt_tab model: python -m nltk.downloader punkt_tab "
            "(or use the splitter 'untrained')"
        ) from error


@cache
def load_essays(path: Path, splitter: str) -> Essays:
    return Essays(path, splitter)


@cache
def load_questions(kind: str, path: Path) -> QuestionSet:
    """Read ``squad`` or ``hotpotqa`` records in their original layouts."""
    return {"squad": _squad, "hotpotqa": _hotpotqa}[kind](path)


def _squad(path: Path) -> QuestionSet:
    articles = _field(_read_json(path), "data", str(path))
    contexts = [[_field(p, "context", str(path)) for p in a["paragraphs"]] for a in articles]
    documents = sorted({text for article in contexts for text in article})
    number = {text: i for i, text in enumerate(documents)}
    questions = []
    for article, texts in zip(articles, contexts, strict=True):
        for paragraph, text in zip(article["paragraphs"], texts, strict=True):
            others = tuple(number[t] for t in texts if t != text)
            for qa in paragraph["qas"]:
                # Course copies of the file leave the field out; such a question counts by its answers.
                if qa.get("is_impossible", not qa["answers"]):
                    continue
                outputs = tuple(answer["text"] for answer in qa["answers"])
                questions.append(Question(qa["question"], outputs, (number[text],), others))
    return QuestionSet(tuple(documents), tuple(questions))


def _hotpotqa(path: Path) -> QuestionSet:
    records = _read_json(path)
    per_record = [
        [f"{title}\n{''.join(sentences)}" for title, sentences in _field(r, "context", str(path))] for r in records
    ]
    documents = sorted({text for texts in per_record for text in texts})
    number = {text: i for i, text in enumerate(documents)}
    questions = [
        Question(
            _field(r, "question", str(path)),
            (_field(r, "answer", str(path)),),
            tuple(number[t] for t in texts),
        )
        for r, texts in zip(records, per_record, strict=True)
    ]
    return QuestionSet(tuple(documents), tuple(questions))


@cache
def load_english_words(path: Path) -> tuple[str, ...]:
    """RULER's long word list (a JSON object; its values are the words)."""
    return tuple(_read_json(path).values())
