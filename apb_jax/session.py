"""A session: documents whose KV is there, on the devices or in host memory, asked as often as one likes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apb_jax.attention.inputs import Prompt
from apb_jax.attention.layout import Layout
from apb_jax.attention.method import AttentionMethod
from apb_jax.errors import UserError
from apb_jax.generation import Answer, Generation, OnTokens, teacher_forced, wanted_of
from apb_jax.host_kv import HostCache
from apb_jax.programs import Lengths
from apb_jax.prompt.ids import Text
from apb_jax.quantised_cache import AnyCache
from apb_jax.sampling import Sampler
from apb_jax.typed import check_value

if TYPE_CHECKING:
    from apb_jax.engine import Engine
    from apb_jax.session_store.manifest import Manifest


def is_batch(value: Text | Sequence[Text]) -> bool:
    """Whether this is a list of requests rather than one text or one list of ids."""
    return isinstance(value, list | tuple) and bool(value) and not isinstance(value[0], int | np.integer)


@dataclass
class Session:
    """Documents that were prefilled. Answers do not depend on each other or on their order."""

    engine: Engine
    method: AttentionMethod
    layout: Layout
    prompts: list[Prompt]
    lengths: Lengths
    cache: AnyCache | HostCache
    prefill_s: float
    compile_s: float
    notes: tuple[str, ...]

    def ask(
        self, query: Text | Sequence[Text] | None = None, max_new_tokens: int = 32, **options: Any
    ) -> Answer | list[Answer]:
        """Answer ``query`` (text or ids; a list of either asks each document its own; None: the prefilled ones).

        ``options``: those of ``start``. One answer for one document, a list for a batch.
        """
        generation = self.start(query, max_new_tokens, **options)
        while not generation.finished:
            generation.step()
        answers = generation.answers()
        return answers[0] if len(answers) == 1 else answers

    def generate(self, max_new_tokens: int = 32, **options: Any) -> list[Answer]:
        """Answer the queries that the documents were prefilled with: one answer a request."""
        answers = self.ask(None, max_new_tokens, **options)
        return answers if isinstance(answers, list) else [answers]

    def start(
        self,
        query: Text | Sequence[Text] | None = None,
        max_new_tokens: int = 32,
        *,
        sampler: Sampler = Sampler(),  # noqa: B008 - frozen
        seed: int = 0,
        stop_ids: Sequence[int] | None = None,
        logits: bool = False,
        answer_alone: bool = False,
        on_tokens: OnTokens | None = None,
    ) -> Generation:
        """The query phase now, and an answer to be decoded chunk by chunk; see ``Engine.generate``.

        ``answer_alone``: with ``logits``, those of the answer's tokens only, not of the query's rows.
        """
        wanted = wanted_of(
            self.engine, max_new_tokens, sampler=sampler, seed=seed, stop_ids=stop_ids, logits=logits,
            answer_alone=answer_alone, on_tokens=on_tokens,
        )  # fmt: skip
        queries = self.queries(query)
        self.engine.check_lengths(self.prompts, queries, max_new_tokens)
        return Generation(self, queries, wanted, on_tokens)

    def queries(self, query: Text | Sequence[Text] | None) -> list[np.ndarray]:
        """Token ids of every request's query."""
        if query is None:
            return [prompt.query for prompt in self.prompts]
        given = list(query) if is_batch(query) else [query] * len(self.prompts)
        if len(given) != len(self.prompts):
            raise UserError(f"{len(self.prompts)} documents and {len(given)} queries; give one query, or one each")
        made = [self.engine.prompt(p.document, q) for p, q in zip(self.prompts, given, strict=True)]  # type: ignore[arg-type]
        return [prompt.query for prompt in made]

    def save(self, folder: str | Path) -> Manifest:
        """Write the session to a new folder, from which ``Engine.load_session`` reads it on any number of shards."""
        from apb_jax.session_store.writer import save

        check_value("folder", folder, str, Path)
        return save(self, folder)

    def logits(self, continuation: Sequence[Sequence[int]] | None = None) -> list[np.ndarray]:
        """Logits float32 [query + continuation tokens, V] of each request with a given answer (teacher forcing)."""
        return teacher_forced(self, continuation)
