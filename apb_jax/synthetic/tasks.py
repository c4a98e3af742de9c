"""Retrieval tasks of any length. The same generators make training rows and evaluation samples.

``single multikey haystack multivalue multiquery vt`` follow RULER's needle and variable-tracking tasks (arXiv
2404.06654); ``passkey`` is the pass-key task. In ``update``, ``relay`` and ``value`` what a later sentence means
depends on an earlier one, however far away: whoever reads the later part of the document alone cannot know it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from apb_jax.synthetic.encoder import Encoder
from apb_jax.synthetic.haystack import Haystack
from apb_jax.synthetic.sample import Line, Piece, Question, Role, Sample, different_digits, fill, length_of
from apb_jax.synthetic.vocabulary import Vocabulary

Key = tuple[str, str]


@dataclass(frozen=True)
class World:
    """What samples are made of: randomness, tokenizer, key words and haystacks to hide things in.

    ``varied``: many surface forms and number lengths (training); else one canonical form (evaluation).
    """

    rng: np.random.Generator
    encoder: Encoder
    vocabulary: Vocabulary
    haystacks: tuple[Haystack, ...]
    varied: bool = False
    bare_questions: bool = False
    """Questions without the wording around them (label, line breaks), which a chat template then adds."""

    def hay(self) -> Iterator[str]:
        """Sentences of one of the haystacks."""
        return self.haystacks[int(self.rng.integers(len(self.haystacks)))].order(self.rng)

    def pick(self, *choices: str) -> str:
        """One of the surface forms; the first in evaluation."""
        return choices[int(self.rng.integers(len(choices)))] if self.varied else choices[0]

    def chance(self, probability: float) -> bool:
        """True with this probability in training, never in evaluation."""
        return self.varied and bool(self.rng.random() < probability)

    def numbers(self, count: int, low: int = 7, high: int = 7) -> list[str]:
        """Different numbers; training mixes lengths of 3 (5 where many are drawn) to 12 digits."""
        if self.varied:
            shortest = 3 if count <= 50 else 5  # so that there are enough different ones
            low = int(self.rng.integers(shortest, 13)) if self.rng.random() < 0.6 else 7
            high = low if self.rng.random() < 0.5 else 12
        return different_digits(self.rng, count, low, high)


def _secret(text: str) -> Piece:
    return Piece(text, Role.SECRET)


def _repeat(text: str) -> Piece:
    return Piece(text, Role.REPEAT)


def _key(key: Key, role: Role = Role.SECRET) -> Line:
    """Role REPEAT: the adjective is free, the noun follows from it."""
    if role is Role.REPEAT:
        return (Piece(" " + key[0], role), Piece("-", Role.ANSWER), Piece(key[1], Role.ANSWER))
    return (Piece(" " + key[0], role), Piece("-", role), Piece(key[1], role))


def _statement(key: Key, value: str, form: int, *, stated: bool = False, known: bool = False) -> Line:
    """A sentence that gives ``key`` (``stated`` before?) the number ``value`` (``known`` from before?)."""
    number = Piece(value, Role.VALUE if known else Role.SECRET)
    named = _key(key, Role.REPEAT if stated else Role.SECRET)
    if form == 0:
        return (Piece(" One of the special magic numbers for"), *named, Piece(" is: "), number, Piece("."))
    if form == 1:
        return (Piece(" The special magic number for"), *named, Piece(" is: "), number, Piece("."))
    return (Piece(" Remember that the code for"), *named, Piece(" is "), number, Piece("."))


def _form(world: World) -> int:
    return int(world.rng.choice(3, p=[0.6, 0.2, 0.2])) if world.varied else 0


def _thing(form: int) -> str:
    return " code for" if form == 2 else " special magic number for"


def _ask(world: World, question: Line, answer: Line, values: tuple[str, ...], prefix: Line = ()) -> Question:
    """A question in one of the forms a prompt may have; ``prefix`` is RULER's start of the answer."""
    shape = int(world.rng.choice(5, p=[0.35, 0.25, 0.2, 0.1, 0.1])) if world.varied else 0
    if shape in (1, 4) and not prefix:
        shape = 2
    if world.bare_questions:
        return Question((replace(question[0], text=question[0].text.lstrip()), *question[1:]), answer, values)
    label, reply = Piece("\n\nQuestion:"), Piece("\nAnswer:")
    if shape == 0:
        text = (label, *question, reply)
    elif shape == 4:
        text = (label, *question, *prefix, reply)
    else:
        # The question begins a line, without its leading space (RULER's query part), or follows the text at once.
        head = replace(question[0], text=question[0].text.lstrip())
        line = () if world.chance(0.3) else (Piece("\n"),)
        text = (*line, head, *question[1:], *(prefix if shape == 1 else (reply,) if shape == 3 else ()))
    return Question(text, answer, values)


def _value_answer(values: list[str]) -> Line:
    out: list[Piece] = []
    for i, value in enumerate(values):
        out += [Piece(", " if i else " ", Role.ANSWER), Piece(value, Role.VALUE)]
    return (*out, Piece(".", Role.ANSWER))


def _ask_number(world: World, key: Key, value: str, form: int) -> Question:
    thing = _thing(form)
    tail = " mentioned in the provided text"
    if world.chance(0.25):
        question = (
            Piece(" What are all the special magic numbers for"),
            *_key(key, Role.REPEAT),
            Piece(tail),
            Piece("?"),
        )
        prefix = (Piece(" The special magic numbers for"), *_key(key, Role.ANSWER), Piece(tail), Piece(" are"))
    else:
        question = (Piece(" What is the" + thing), *_key(key, Role.REPEAT), Piece(tail), Piece("?"))
        prefix = (Piece(" The" + thing), *_key(key, Role.ANSWER), Piece(tail), Piece(" is"))
    return _ask(world, question, _value_answer([value]), (value,), prefix)


def _opening(world: World) -> Line:
    if not world.chance(0.3):
        return ()
    return (
        Piece(
            world.pick(
                "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
                "I will quiz you about the numbers afterwards.",
                "A special magic number is hidden within the following text. Make sure to memorize it. "
                "I will quiz you about the number afterwards.",
            )
        ),
    )


def needles(world: World, tokens: int, keys: int, name: str) -> Sample:
    """A number for each of ``keys`` keys, and a question for each."""
    form = _form(world)
    pairs = list(zip(world.vocabulary.keys(world.rng, keys), world.numbers(keys), strict=True))
    lines = [_statement(key, value, form) for key, value in pairs]
    document = fill(world.rng, world.encoder, world.hay(), lines, tokens, opening=_opening(world))
    asked = world.rng.permutation(keys)
    return Sample(name, document, tuple(_ask_number(world, pairs[i][0], pairs[i][1], form) for i in asked))


def _key_count(world: World, tokens: int, fixed: int) -> int:
    """Keys in a document: ``fixed`` in evaluation, else 1 to 32 as far as half of the document holds them."""
    if not world.varied:
        return fixed
    most = max(1, min(32, tokens // 60))
    return int(min(most, np.exp(world.rng.uniform(0, np.log(most + 1)))))


def single(world: World, tokens: int) -> Sample:
    """One needle."""
    return needles(world, tokens, 1, "single")


def multikey(world: World, tokens: int) -> Sample:
    """Four keys, one asked."""
    return needles(world, tokens, _key_count(world, tokens, 4), "multikey")


def passkey(world: World, tokens: int) -> Sample:
    """The pass-key task."""
    value = different_digits(world.rng, 1, 5, 12)[0]
    line: Line = (Piece(" The pass key is "), _secret(value), Piece("."))
    if not world.chance(0.5):
        line += (Piece(" Remember it."), Piece(" "), Piece(value, Role.ANSWER), Piece(" is the pass key."))
    question: Line = (Piece(" What is the pass key?"),)
    ask = _ask(world, question, _value_answer([value]), (value,), (Piece(" The pass key is"),))
    document = fill(world.rng, world.encoder, world.hay(), [line], tokens)
    return Sample("passkey", document, (ask,))


def haystack(world: World, tokens: int) -> Sample:
    """A document of needles only (RULER multikey_2); in training some are repeated, which trains recall in place."""
    form, rng = _form(world), world.rng
    count = max(2, tokens // length_of(_statement(("a", "b"), "12345", form), world.encoder))
    keys, values = world.vocabulary.keys(rng, count), world.numbers(count)
    repeat = 0.4 if world.chance(0.8) else 0.0
    lines: list[Line] = []
    stated: list[int] = []
    room = tokens
    while len(stated) < count:
        again = bool(stated) and rng.random() < repeat
        i = stated[int(rng.integers(len(stated)))] if again else len(stated)
        line = _statement(keys[i], values[i], form, stated=again, known=again)
        room -= length_of(line, world.encoder)
        if room < 0 and stated:
            break
        lines.append(line)
        if not again:
            stated.append(i)
    asked = rng.permutation(len(stated))[:64]
    return Sample("haystack", tuple(lines), tuple(_ask_number(world, keys[i], values[i], form) for i in asked))


def multivalue(world: World, tokens: int) -> Sample:
    """One key with four values (two to four in training), all asked, answered in order of appearance."""
    rng = world.rng
    keys = int(rng.integers(1, max(2, min(8, tokens // 150)))) if world.varied else 1
    lines: list[Line] = []
    questions: list[Question] = []
    chosen = world.vocabulary.keys(rng, keys)
    per_key = [int(rng.integers(2, 5)) if world.varied else 4 for _ in chosen]
    numbers = world.numbers(sum(per_key))
    order = rng.permutation(np.repeat(np.arange(keys), per_key))
    values: list[list[str]] = [[] for _ in chosen]
    for i, number in zip(order, numbers, strict=True):
        values[i].append(number)
        lines.append(_statement(chosen[i], number, 0, stated=len(values[i]) > 1))
    for i in rng.permutation(keys):
        tail = (*_key(chosen[i], Role.REPEAT), Piece(" mentioned in the provided text"))
        question = (Piece(" What are all the special magic numbers for"), *tail, Piece("?"))
        prefix = (Piece(" The special magic numbers for"), *tail, Piece(" are"))
        questions.append(_ask(world, question, _value_answer(values[i]), tuple(values[i]), prefix))
    document = fill(rng, world.encoder, world.hay(), lines, tokens, opening=_opening(world))
    return Sample("multivalue", document, tuple(questions))


def multiquery(world: World, tokens: int) -> Sample:
    """Several keys in one question (four; two to four in training); the answer names each key before its number."""
    rng = world.rng
    keys = max(4, _key_count(world, tokens, 4)) if tokens >= 400 else 2
    pairs = list(zip(world.vocabulary.keys(rng, keys), world.numbers(keys), strict=True))
    lines = [_statement(key, value, 0) for key, value in pairs]
    document = fill(rng, world.encoder, world.hay(), lines, tokens, opening=_opening(world))
    questions = []
    for _ in range(max(1, keys // 3) if world.varied else 1):
        count = int(rng.integers(2, min(4, keys) + 1)) if world.varied else min(4, keys)
        asked = [pairs[i] for i in rng.permutation(keys)[:count]]
        named: list[Piece] = []
        answer: list[Piece] = []
        for i, (key, value) in enumerate(asked):
            named += [Piece("," if count > 2 else ""), Piece(" and")][: 2 if i == count - 1 else 1] if i else []
            named += _key(key, Role.REPEAT)
            answer += [Piece(",", Role.ANSWER)] if i else []
            answer += [*_key(key, Role.VALUE), Piece(": ", Role.ANSWER), Piece(value, Role.VALUE)]
        tail = (*(p for p in named if p.text), Piece(" mentioned in the provided text"))
        question = (Piece(" What are all the special magic numbers for"), *tail, Piece("?"))
        prefix = (Piece(" The special magic numbers for"), *tail, Piece(" are"))
        done = (*answer, Piece(".", Role.ANSWER))
        questions.append(_ask(world, question, done, tuple(v for _, v in asked), prefix))
    return Sample("multiquery", document, tuple(questions))


def _chains(world: World, tokens: int, chains: int, hops: int) -> tuple[list[list[str]], list[str], list[Line]]:
    rng = world.rng
    names = world.vocabulary.names(rng, chains * (hops + 1))
    groups = [names[i * (hops + 1) : (i + 1) * (hops + 1)] for i in range(chains)]
    values = different_digits(rng, chains, 5, 5)
    step = [0] * chains
    lines: list[Line] = []
    for chain in rng.permutation(np.repeat(np.arange(chains), hops + 1)):
        name, at = groups[chain][step[chain]], step[chain]
        start = (Piece(" VAR"), _secret(" " + name), Piece(" ="))
        source = (
            (Piece(" "), _secret(values[chain])) if at == 0 else (Piece(" VAR"), _repeat(" " + groups[chain][at - 1]))
        )
        end = (Piece("\n"),) if world.varied and rng.random() < 0.3 else ()
        lines.append((*start, *source, *end))
        step[chain] += 1
    return groups, values, lines


def vt(world: World, tokens: int) -> Sample:
    """RULER's variable tracking: list all variables of a chain of four hops."""
    rng = world.rng
    chains = int(rng.integers(1, 4 if tokens >= 400 else 2)) if world.varied else 1
    hops = int(rng.integers(1, 5)) if world.varied else 4
    groups, values, lines = _chains(world, tokens, chains, hops)
    document = fill(rng, world.encoder, world.hay(), lines, tokens)
    questions = []
    for i in rng.permutation(chains):
        number = Piece(" "), _repeat(values[i])
        question = (Piece(" Find all variables that are assigned the value"), *number, Piece(" in the text above."))
        count = str(len(groups[i]))
        spelling = world.pick(" variables are assigned the value", " variables are assgined the value")
        prefix = (
            Piece(" Answer: According to the chain(s) of variable assignment in the text above, "),
            Piece(count), Piece(spelling), *number, Piece(", they are:"),
        )  # fmt: skip
        answer = tuple(Piece(" " + name, Role.VALUE) for name in groups[i])
        questions.append(_ask(world, question, answer, tuple(groups[i]), prefix))
    return Sample("vt", document, tuple(questions))


def value(world: World, tokens: int) -> Sample:
    """Variable tracking the other way: the number that a variable holds after one to three assignments."""
    rng = world.rng
    groups, values, lines = _chains(world, tokens, 2, int(rng.integers(1, 4)))
    document = fill(rng, world.encoder, world.hay(), lines, tokens)
    questions = []
    for i in rng.permutation(2):
        name = groups[i][-1]
        question = (Piece(" What is the value of VAR"), _repeat(" " + name), Piece("?"))
        questions.append(_ask(world, question, _value_answer([values[i]]), (values[i],)))
    return Sample("value", document, tuple(questions))


def relay(world: World, tokens: int) -> Sample:
    """A person's number is said to be the same as another's: one hop between two sentences."""
    rng = world.rng
    pairs = int(rng.integers(2, max(3, min(8, tokens // 100)))) if world.varied else 4
    people = world.vocabulary.persons(rng, 2 * pairs)
    values = different_digits(rng, pairs, 5, 7)
    lines: list[Line] = [()] * (2 * pairs)
    places = rng.permutation(2 * pairs)
    questions = []
    for i in range(pairs):
        source, target = people[2 * i : 2 * i + 2]
        first, second = sorted(places[2 * i : 2 * i + 2])
        lines[first] = (
            Piece(" The number of"), _secret(" " + source), Piece(" is "), _secret(values[i]), Piece(".")
        )  # fmt: skip
        same = (Piece(" has the same number as"), _secret(" " + source), Piece("."))
        lines[second] = (_secret(" " + target), *same)
        for who in (target, source) if world.varied else (target,):
            question = (Piece(" What is the number of"), _secret(" " + who), Piece("?"))
            questions.append(_ask(world, question, _value_answer([values[i]]), (values[i],)))
    document = fill(rng, world.encoder, world.hay(), lines, tokens)
    return Sample("relay", document, tuple(questions[i] for i in rng.permutation(len(questions))))


def update(world: World, tokens: int) -> Sample:
    """Keys stated twice (once to three times in training) with different numbers; the first or the latest is asked.

    The sentences are alike: that one is the second of its key shows only in the first.
    """
    rng = world.rng
    most = max(1, min(12, tokens // 150))
    keys = int(min(most, np.exp(rng.uniform(0, np.log(most + 1))))) if world.varied else 4
    counts = [int(rng.choice([1, 2, 3], p=[0.1, 0.7, 0.2])) if world.varied else 2 for _ in range(keys)]
    chosen, numbers = world.vocabulary.keys(rng, keys), world.numbers(sum(counts))
    values: list[list[str]] = [[] for _ in chosen]
    lines: list[Line] = []
    for i, number in zip(rng.permutation(np.repeat(np.arange(keys), counts)), numbers, strict=True):
        values[i].append(number)
        lines.append(_statement(chosen[i], number, 1, stated=len(values[i]) > 1))
    document = fill(rng, world.encoder, world.hay(), lines, tokens)
    questions = []
    for i in rng.permutation(keys):
        for which in rng.permutation(2) if world.varied else rng.integers(0, 2, 1):
            answer = values[i][0] if which == 0 else values[i][-1]
            thing = " first special magic number for" if which == 0 else " latest special magic number for"
            tail = (*_key(chosen[i], Role.REPEAT), Piece(" mentioned in the provided text"))
            prefix = (Piece(" The" + thing), *tail, Piece(" is"))
            question = (Piece(" What is the" + thing), *tail, Piece("?"))
            questions.append(_ask(world, question, _value_answer([answer]), (answer,), prefix))
    return Sample("update", document, tuple(questions))


def text(world: World, tokens: int) -> Sample:
    """Plain text, nothing asked."""
    return Sample("text", fill(world.rng, world.encoder, world.hay(), [], tokens), ())


TASKS: dict[str, Callable[[World, int], Sample]] = {
    f.__name__: f
    for f in (
        single, multikey, haystack, passkey, multivalue, multiquery, vt, value, relay, update, text
    )
}  # fmt: skip
"""Generators by name: (world, document tokens) -> Sample."""

QUESTION_TASKS = tuple(name for name in TASKS if name != "text")
