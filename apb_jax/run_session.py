"""``--save-session`` and ``--session``: a document prefilled by one run and asked by another."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apb_jax.engine import Engine
from apb_jax.errors import UserError
from apb_jax.generation import Answer
from apb_jax.measure.host_link import host_note, saved_note
from apb_jax.measure.plan import spread
from apb_jax.options import RunConfig
from apb_jax.sampling import Sampler
from apb_jax.session_store.manifest import read_manifest
from apb_jax.task import NEW_TOKENS_ABOUT_TEXT, document_task

if TYPE_CHECKING:
    from rich.console import Console

    from apb_jax.session import Session

UNASKED = "?"
"""Stands where a prompt needs a question and none was given; never asked."""


def method_options(config: RunConfig) -> dict[str, Any]:
    """Options of the method: a session saved without a question was prefilled without one."""
    from apb_jax.attention.registry import METHODS

    options = config.method_options
    if config.save_session is None or config.query is not None or config.method not in METHODS:
        return options
    if not METHODS[config.method].can.needs_query_in_prefill:
        return options
    if config.method != "apb":
        raise UserError(f"method {config.method!r} prefills with the question; add --query TEXT, or --method apb")
    return {"embed_query": False} | options


def run_session(config: RunConfig, text: str | None, engine: Engine, console: Console) -> dict[str, Any]:
    """Load or make the session, save it where asked for, and answer the question; returns the JSON object."""
    started = time.perf_counter()
    if config.session is not None:
        if (note := saved_note(engine, read_manifest(Path(config.session)))) is not None:
            console.print(f"note: {note}", style="yellow", highlight=False, markup=False)
        session = engine.load_session(config.session, _documents(config, text, engine))
        told = {"loaded": config.session, "load_s": time.perf_counter() - started}
    else:
        assert text is not None
        asked = config if config.query is not None else dataclasses.replace(config, query=UNASKED)
        task = document_task(asked, text, engine)
        engine.check_lengths([task.prompt], [task.prompt.query])
        engine = spread(engine, [task.prompt], 0, config.gpu_memory)
        for note in filter(None, (*task.notes, host_note(engine, [task.prompt]))):
            console.print(f"note: {note}", style="yellow", highlight=False, markup=False)
        session = engine.prefill([task.prompt])
        started = time.perf_counter()
        assert config.save_session is not None
        manifest = session.save(Path(config.save_session))
        told = {"saved": config.save_session, "save_s": time.perf_counter() - started, "bytes": manifest.bytes}
        line = f"saved: {config.save_session}, {manifest.bytes / 1e6:,.1f} MB in {told['save_s']:.2f} s"
        console.print(line, highlight=False, markup=False, emoji=False)
    for note in session.notes:
        console.print(f"note: {note}", style="yellow", highlight=False, markup=False)
    result = told | {"model": config.model, "method": session.method.name, "notes": list(session.notes)}
    result["precision"] = dataclasses.asdict(engine.settings.precision)
    result["document_tokens"] = [len(prompt.document) for prompt in session.prompts]
    result["prefill_s"] = session.prefill_s
    return result if config.query is None else result | _answer(config, session, console)


def _documents(config: RunConfig, text: str | None, engine: Engine) -> list[Any] | None:
    """Ids of ``--document``, to be compared with the saved ones; None where none was given."""
    return None if text is None else [engine.prompt(text, str(config.query)).document]


def _answer(config: RunConfig, session: Session, console: Console) -> dict[str, Any]:
    engine, query = session.engine, str(config.query)
    if len(session.prompts) > 1:
        raise UserError(f"{config.session} holds {len(session.prompts)} documents; --query asks one")
    taken = len(session.prompts[0].document) + len(session.queries(query)[0])
    room = max(1, min(NEW_TOKENS_ABOUT_TEXT, engine.model.config.max_positions - taken))
    wanted = config.max_new_tokens or room
    sampler = Sampler(config.temperature, config.top_p)
    answer = session.ask(query, wanted, sampler=sampler, seed=config.seed)
    assert isinstance(answer, Answer)
    console.print(f"Prediction: {answer.text}", highlight=False, markup=False, emoji=False)
    facts = {"query_s": answer.query_s, "decode_s": answer.decode_s, "compile_s": answer.compile_s}
    return facts | {"prediction": answer.text, "finish_reason": answer.finish_reason}
