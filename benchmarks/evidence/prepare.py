"""Benchmarks' samples under the model's own chat template, as token ids."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from apb_jax.prompt.codec import PromptCodec, make_codec
from apb_jax.retaining.corpus import Corpus, Record
from apb_jax.synthetic.packaged import NOVEL
from apb_jax.weights.checkpoint import load
from benchmarks.evidence.samples import Sample
from evals.base import Example
from evals.needle.task import HeatmapTask, even_depths
from evals.ruler.corpus import find, load_questions
from evals.ruler.prompt import make_form
from evals.ruler.task import TASKS, RulerTask, family_of
from evals.tokens import as_tokens

TEMPLATE_ROOM = 64
"""Tokens of a length that are left to the chat template."""
MOST_EMBEDDED = 100
"""A question of more tokens does not fit the anchor at 2K beside the template's opening."""
SCORED = 512
"""Tokens at the end of a text whose likelihood counts."""
NEEDLE_LENGTHS = {2048: 9, 4096: 9, 6144: 9, 8192: 9, 16384: 4, 32768: 3}
"""Rounds (of eleven depths) by length."""
TEXTS = 20
RULER_LENGTHS = (2048, 4096, 8192)
LONGEST = 32768
TRAINING_TOKENS = 3072


@dataclass(frozen=True)
class Job:
    """What one worker process builds."""

    kind: str
    length: int
    task: str
    samples: int
    model: str
    data: Path
    seed: int


@cache
def codec_of(model: str) -> PromptCodec:
    loaded = load(model)
    assert loaded.tokenizer is not None
    return make_codec(loaded.tokenizer, loaded.name)


def essays(data: Path) -> str:
    text: str = json.loads(find(data, "essays").read_text(encoding="utf-8"))["text"]
    return text


def jobs(model: str, data: Path, samples: int, seed: int) -> list[Job]:
    """The longest first, so that workers end together."""
    ruler = [Job("ruler", n, task, samples, model, data, seed) for n in RULER_LENGTHS for task in TASKS]
    needles = [Job("needle", n, "needle", rounds, model, data, seed) for n, rounds in NEEDLE_LENGTHS.items()]
    texts = [Job("text", LONGEST, "essays", TEXTS, model, data, seed)]
    heads = [Job("heads", TRAINING_TOKENS, "heads", 0, model, data, seed)]
    return sorted([*ruler, *needles, *texts, *heads], key=lambda job: -job.length)


def prepare(found: list[Job], processes: int) -> Iterator[list[Sample]]:
    """The samples of each job, in the order of the jobs."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(build, found)


def build(job: Job) -> list[Sample]:
    """The samples of one job."""
    return {"ruler": _ruler, "needle": _needles, "text": _texts, "heads": _training}[job.kind](job)


def ask(codec: PromptCodec, example: Example, family: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, query, embedded query): the question closes the user's turn, the answer's prefix opens the reply."""
    lead = make_form(family, corrected_spelling=True).answer_prefix.split("{")[0]
    cut = example.query.rindex(lead)
    question, prefix = codec.encode(example.query[:cut]), codec.encode(example.query[cut:])
    return codec.document(example.document), np.concatenate([question, codec.closing, prefix]), question


def _ruler(job: Job) -> list[Sample]:
    codec = codec_of(job.model)
    spare = 0
    if job.task in ("qa_1", "qa_2"):
        kind = {"qa_1": "squad", "qa_2": "hotpotqa"}[job.task]
        spare = min(20, len(load_questions(kind, find(job.data, kind)).questions) - job.samples)
    task = RulerTask(
        job.task, as_tokens(codec.tokenizer), job.length - TEMPLATE_ROOM, job.samples + spare,
        seed=job.seed, variant="ruler_fit", data=job.data,
    )  # fmt: skip
    out: list[Sample] = []
    for example in task.examples():
        document, query, embedded = ask(codec, example, family_of(job.task))
        if len(embedded) > MOST_EMBEDDED or len(out) == job.samples:
            continue
        assert len(document) + len(query) + example.max_new_tokens <= job.length
        out.append(
            Sample(
                "ruler",
                job.length,
                job.task,
                example.id,
                document,
                query,
                embedded,
                example.references,
                example.max_new_tokens,
            )
        )
    return out


def _needles(job: Job) -> list[Sample]:
    codec = codec_of(job.model)
    task = HeatmapTask(
        as_tokens(codec.tokenizer), essays(job.data), "essays", job.length, even_depths(11), job.samples, job.seed
    )
    return [
        Sample(
            "needle", job.length, "needle", example.id, *ask(codec, example, "niah"), example.references,
            example.max_new_tokens, dict(example.info),
        )
        for example in task.examples()
    ]  # fmt: skip


def _texts(job: Job) -> list[Sample]:
    codec = codec_of(job.model)
    ids = codec.encode(essays(job.data))
    step = (len(ids) - job.length) // max(1, job.samples - 1)
    return [
        Sample(
            "text", job.length, "essays", str(i), ids[start : start + job.length - SCORED],
            ids[start + job.length - SCORED : start + job.length], ids[:0],
        )
        for i, start in enumerate(range(0, step * job.samples, step))
    ]  # fmt: skip


def _training(job: Job) -> list[Sample]:
    """Needles of all kinds in a novel, and HotpotQA's training questions: no text or question that is tested on."""
    codec, out = codec_of(job.model), []
    novel = NOVEL.read_text(encoding="utf-8")
    for length in (1536, job.length):
        task = HeatmapTask(
            as_tokens(codec.tokenizer), novel, NOVEL.name, length, even_depths(11), 25, job.seed + 1, max_new_tokens=24
        )
        for example in task.examples():
            document, query, embedded = ask(codec, example, "niah")
            answer = codec.encode(f" {example.references[0]}.")
            out.append(_pair("needle", len(out), codec, document, embedded, query, answer))
    questions = json.loads((job.data / "hotpotqa_train_100.json").read_text(encoding="utf-8"))
    for row in questions:
        document = "\n\n".join(f"{title}\n{''.join(sentences)}" for title, sentences in row["context"])
        prompt = codec.prompt(document, row["question"])
        answer = codec.encode(str(row["answer"]))
        if len(prompt.document) <= job.length:
            out.append(_pair("hotpotqa", len(out), codec, prompt.document, prompt.embedded_query, prompt.query, answer))
    corpus = Corpus((Record(novel, None, None),), codec, job.length, 128)
    for record in corpus.pieces()[:60]:
        example = corpus.example(record)
        out.append(
            Sample("heads", job.length, "text", str(len(out)), example.prompt, example.answer, codec.opening[:0])
        )
    return out


def _pair(
    task: str, index: int, codec: PromptCodec, document: np.ndarray, embedded: np.ndarray, query: np.ndarray,
    answer: np.ndarray,
) -> Sample:  # fmt: skip
    """Question in front as in APB's anchor, then the document; the rows of question and answer give the labels."""
    opening = len(codec.opening)
    prompt = np.concatenate([document[:opening], embedded, document[opening:]])
    return Sample("heads", TRAINING_TOKENS, task, str(index), prompt, np.concatenate([query, answer]), embedded[:0])
