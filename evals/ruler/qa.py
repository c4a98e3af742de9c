"""Question answering: the documents that hold the answer among distractor documents."""

from evals.base import EvalError
from evals.ruler.atoms import Draws
from evals.ruler.corpus import QuestionSet
from evals.ruler.prompt import Form
from evals.ruler.sizing import Draft


class QaMaker:
    """Builds prompts for one question after another. A unit is a document.

    ``question`` is the index of the question; set it before building.
    """

    step = 10
    cap_before_growth = False
    overhead_tokens = 0

    def __init__(self, form: Form, draws: Draws, questions: QuestionSet, *, copies: int, repeats: bool):
        self._form, self._draws = form, draws
        self._documents = questions.documents * copies
        self._questions, self._repeats = questions.questions, repeats
        self.cap = None if repeats else len(self._documents)
        self.question = 0

    def build(self, units: int) -> Draft:
        if self.question >= len(self._questions):
            raise EvalError(f"question {self.question + 1} asked, the data hold {len(self._questions)} questions")
        question = self._questions[self.question]
        gold = list(question.gold)
        documents = self._documents
        if units < len(documents):
            # The originals hang where fewer documents fit than hold the answer; the answer's documents stay.
            room = max(0, units - len(gold))
            if room > len(question.more):
                known = {*gold, *question.more}
                others = [i for i in range(len(documents)) if i not in known]
                chosen = gold + list(question.more) + self._draws.py.sample(others, room - len(question.more))
            else:
                chosen = gold + self._draws.py.sample(question.more, room)
            texts = [documents[i] for i in chosen]
        elif self._repeats:
            texts = list((documents * -(-units // len(documents)))[:units])
        else:
            texts = list(documents)
        return self._draft(question, texts)

    def _draft(self, question, texts: list[str]) -> Draft:
        gold_text = self._documents[question.gold[0]]
        texts = self._draws.shuffled(texts)
        context = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(texts, start=1))
        return Draft(
            document=self._form.document(context=context),
            query=self._form.query(query=question.text),
            references=question.outputs,
            sizing_extra=f" {list(question.outputs)}",
            info={"gold_rank": texts.index(gold_text) + 1, "documents": len(texts)},
        )


class FilledQaMaker(QaMaker):
    """As QaMaker, but a unit is a word of the documents: the last distractor is cut so that the length is filled."""

    step = 50

    def __init__(self, form: Form, draws: Draws, questions: QuestionSet):
        super().__init__(form, draws, questions, copies=1, repeats=True)
        self._order: dict[int, list[int]] = {}

    def build(self, units: int) -> Draft:
        if self.question >= len(self._questions):
            raise EvalError(f"question {self.question + 1} asked, the data hold {len(self._questions)} questions")
        question = self._questions[self.question]
        if self.question not in self._order:  # one draw a question: the probes of a search differ in size only
            known = {*question.gold, *question.more}
            others = [i for i in range(len(self._documents)) if i not in known]
            more = self._draws.py.sample(question.more, len(question.more))
            self._order = {self.question: more + self._draws.py.sample(others, len(others))}
        texts = [self._documents[i] for i in question.gold]
        left = units - sum(len(text.split()) for text in texts)
        distractors = [self._documents[i] for i in self._order[self.question]]
        place = 0
        while left > 0:
            text = distractors[place % len(distractors)]
            words = text.split(" ")
            texts.append(text if len(words) <= left else " ".join(words[:left]))
            left -= len(words)
            place += 1
        return self._draft(question, texts)
