"""Pass key retrieval in the wording of InfiniteBench, at any length (not one of RULER's 13 tasks)."""

from evals.ruler.atoms import NOISE, Draws
from evals.ruler.prompt import Form
from evals.ruler.sizing import Draft


class PasskeyMaker:
    """A five-digit key between noise sentences, at a uniformly random line. A unit is a noise line."""

    step = 5
    cap: int | None = None
    cap_before_growth = False
    overhead_tokens = 0

    def __init__(self, form: Form, draws: Draws):
        self._form, self._draws = form, draws

    def build(self, units: int) -> Draft:
        key = str(self._draws.py.randint(10000, 99999))
        line = self._draws.py.randint(0, units)
        sentence = f"The pass key is {key}. Remember it. {key} is the pass key.\n"
        context = f"{NOISE}\n" * line + sentence + f"{NOISE}\n" * (units - line)
        document = self._form.document(context=context)
        return Draft(
            document=document,
            query=self._form.query(query=""),
            references=(key,),
            sizing_extra=key,
            info={"depths": [round(document.find(key) / len(document), 4)]},
        )
