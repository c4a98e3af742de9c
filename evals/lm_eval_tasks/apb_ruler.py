"""RULER in this project's variants as a task of lm-evaluation-harness.

``--metadata '{"ruler_task": "vt", "length": 4096, "samples": 64, "variant": "ruler_main"}'`` chooses the prompts; the
tokenizer is the model's. Further keys: ``seed``, ``wrapper``, ``data``, ``splitter``. Scores are 0..1.
"""

from typing import Any

from apb_jax.weights.checkpoint import load
from evals.base import EvalError
from evals.ruler import RulerTask
from evals.ruler.scoring import METRICS, score_one
from evals.ruler.task import family_of

_OPTIONS = ("seed", "variant", "wrapper", "data", "splitter")


def dataset(**metadata: Any) -> dict[str, Any]:
    """The examples as a ``datasets`` split; the keywords are --metadata and --model_args together."""
    import datasets

    for name in ("ruler_task", "length"):
        if name not in metadata:
            raise EvalError(f'--metadata lacks {name!r}; give for example {{"ruler_task": "vt", "length": 4096}}')
    model = metadata.get("model") or metadata.get("pretrained")
    tokenizer = load(str(model), weights=metadata.get("weights")).tokenizer
    options = {key: metadata[key] for key in _OPTIONS if key in metadata}
    task = RulerTask(
        metadata["ruler_task"], tokenizer, int(metadata["length"]), metadata.get("samples", 500), **options
    )
    rows = [
        {"task": task.name, "document": e.document, "query": e.query, "outputs": list(e.references)}
        for e in task.examples()
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """RULER's official score of one answer."""
    return {"score": score_one(METRICS[family_of(doc["task"])], results[0], doc["outputs"])}
