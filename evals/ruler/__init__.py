"""RULER: synthetic long-context tasks of any length, for any tokenizer.

    from evals.ruler import NiahSpec, generate

    for example in generate("vt", tokenizer, length=4096, samples=64, seed=7, variant="ruler_fit"):
        example.document, example.query      # strings; the prompt is document + query
        example.references                   # the expected answers
        example.max_new_tokens               # answer budget; document + query + budget <= length tokens
        example.info["depths"]               # where in the document each answer stands, 0..1

``task`` is one of ``TASKS`` (the 13), ``"passkey"``, or a ``NiahSpec``, e.g. eight keys of which three are
asked, in noise: ``NiahSpec("noise", keys=8, queries=3)``; several values of one key: ``NiahSpec("noise",
values=4)``; a haystack of nothing but needles: ``NiahSpec("needle")``.

``tokenizer`` is a transformers tokenizer, a ``tokenizers.Tokenizer``, a SentencePieceProcessor, an object with
``count(text)``, or a function from text to a number of tokens. Options: ``seed``, ``variant``
(``ruler_2024_06``, ``ruler_main``, ``star_attention``: byte for byte the published programs; ``ruler_fit``: the
main branch's wording, filled to the token), ``wrapper`` (chat wrapper), ``data`` (folder with essays, SQuAD,
HotpotQA: only tasks that read them need it) and ``splitter``.

The generator streams: one example is in memory at a time. Errors are ``evals.base.EvalError``.
"""

from evals.ruler.niah import NiahSpec
from evals.ruler.task import EXTRA_TASKS, TASKS, RulerTask, generate, needed_text
from evals.ruler.variants import VARIANTS

__all__ = ["EXTRA_TASKS", "TASKS", "VARIANTS", "NiahSpec", "RulerTask", "generate", "needed_text"]
