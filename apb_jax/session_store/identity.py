"""What an engine must be like to answer from a saved session, as plain values that can be compared one by one."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from apb_jax.attention.method import AttentionMethod
from apb_jax.attention.registry import MethodSpec
from apb_jax.errors import UserError
from apb_jax.session_store.manifest import Manifest, SavedMethod
from apb_jax.weights.fingerprint import text_fingerprint, tokenizer_fingerprint

if TYPE_CHECKING:
    from apb_jax.engine import Engine
    from apb_jax.session import Session

FREE = ("max_positions", "bos_id", "eos_ids")
"""Facts of a model's configuration that change neither KV nor logits."""
LEFT_OPEN = "left open"


def identity(engine: Engine) -> dict[str, Any]:
    """Facts of an engine without its weights; nothing is read for it."""
    config, codec = engine.model.config, engine.codec
    facts = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in FREE}
    frame = None if codec is None else f"{codec.frame.name} ({text_fingerprint(asdict(codec.frame))})"
    return {
        **{name: value if isinstance(value, int | float | str) else repr(value) for name, value in facts.items()},
        "dtype": engine.model.dtype.name,
        **{f"{name}_dtype": value for name, value in engine.settings.precision.changed.items()},
        "tokenizer": tokenizer_fingerprint(codec.tokenizer) if codec else None,
        "template": frame,
        "bottom_right_query": engine.settings.bottom_right_query,
    }


def given_options(method: AttentionMethod | MethodSpec) -> dict[str, Any]:
    """The options of a method that have a value."""
    if isinstance(method, MethodSpec):
        return method.given
    return {name: value for name, value in vars(method).items() if value is not None}


def saved_method(session: Session) -> SavedMethod:
    """The method of a session as it was asked for and as it ran."""
    asked, ran = session.engine.method, session.method
    return SavedMethod(asked.name, given_options(asked), ran.name, dict(vars(ran)), session.layout.shards)


def check_engine(engine: Engine, manifest: Manifest, folder: object) -> None:
    """Refuse an engine that is not like the one that saved; its weights are looked at last.

    Raises:
        UserError: the first fact that differs, with both values.
    """
    _compare(folder, manifest.identity, identity(engine) | {"weights": manifest.identity["weights"]})
    _check_method(engine, manifest.method, folder)
    _compare(folder, {"weights": manifest.identity["weights"]}, {"weights": engine.fingerprint})


def _compare(folder: object, saved: dict[str, Any], here: dict[str, Any]) -> None:
    for name in (*here, *(name for name in saved if name not in here)):
        ours, theirs = here.get(name), saved.get(name)
        if ours != theirs:
            raise UserError(f"{folder} was saved with {name} {theirs!r}, here it is {ours!r}")


def _check_method(engine: Engine, saved: SavedMethod, folder: object) -> None:
    if engine.method.name != saved.asked:
        raise UserError(
            f"{folder} was saved with method {saved.asked!r}, here it is {engine.method.name!r}; "
            f"nearest legal choice: --method {saved.asked}"
        )
    ran = saved.fields if saved.name == saved.asked else {}
    for name, value in given_options(engine.method).items():
        if value not in (saved.options.get(name, LEFT_OPEN), ran.get(name, LEFT_OPEN)):
            theirs = ran.get(name, saved.options.get(name, LEFT_OPEN))
            raise UserError(f"{folder} was saved with {saved.asked}'s {name} {theirs!r}, here it is {value!r}")
