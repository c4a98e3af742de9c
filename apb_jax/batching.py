"""A batch in groups: an answer does not depend on what else is asked beside it.

Each request gets the method, with every hyper-parameter, that it would get alone. Requests of one method go through the
layers together; each group is a batch of its own, and the answers come back in the order of the requests.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from apb_jax.attention.inputs import Prompt
from apb_jax.attention.method import AttentionMethod
from apb_jax.errors import UserError
from apb_jax.generation import Answer, OnTokens, Wanted
from apb_jax.sampling import Sampler

if TYPE_CHECKING:
    from apb_jax.engine import Engine


@dataclass(frozen=True)
class Group:
    """Requests that one batch serves: their method, their places in the whole batch, and each one's notes."""

    method: AttentionMethod
    places: tuple[int, ...]
    notes: tuple[tuple[str, ...], ...]


def groups(engine: Engine, prompts: Sequence[Prompt]) -> list[Group]:
    """The batch in as few groups as its requests' own methods allow, in the order of their first requests."""
    found: dict[Hashable, list[tuple[int, AttentionMethod, tuple[str, ...]]]] = {}
    for place, prompt in enumerate(prompts):
        method, notes = engine.choose([prompt])
        key = method, method.batch_key(prompt, engine.placement.shards)
        found.setdefault(key, []).append((place, method, notes))
    return [
        Group(members[0][1], tuple(place for place, *_ in members), tuple(notes for *_, notes in members))
        for members in found.values()
    ]


def common_method(engine: Engine, prompts: Sequence[Prompt]) -> tuple[AttentionMethod, tuple[str, ...]]:
    """The one method of all these prompts, and all their notes.

    Raises:
        UserError: they have several; a session is of one.
    """
    found = groups(engine, prompts)
    if len(found) > 1:
        parts = "; ".join(f"{_numbers(group.places)}: {group.method}" for group in found)
        raise UserError(
            f"these {len(prompts)} documents get different methods or sizes ({parts}): prefill each group apart, or "
            "let Engine.generate do so"
        )
    return found[0].method, tuple(dict.fromkeys(note for notes in found[0].notes for note in notes))


def _numbers(places: tuple[int, ...]) -> str:
    shown = ", ".join(str(place) for place in places[:4]) + (", ..." if len(places) > 4 else "")
    return f"number {shown}"


def answer_batch(engine: Engine, prompts: Sequence[Prompt], max_new_tokens: int, **options: Any) -> list[Answer]:
    """An answer for every prompt, in order; ``options``: those of ``Session.start``. One group's KV at a time."""
    on_tokens: OnTokens | None = options.pop("on_tokens", None)
    stops = engine.stop_ids if options.get("stop_ids") is None else tuple(options["stop_ids"])
    wanted = Wanted(
        max_new_tokens, options.get("sampler", Sampler()), stop_ids=stops, logits=options.get("logits", False)
    )
    answers: dict[int, Answer] = {}
    for group in groups(engine, prompts):
        session = engine.prefill([prompts[place] for place in group.places], wanted)
        given = session.generate(max_new_tokens, on_tokens=_relayed(on_tokens, group.places), **options)
        for place, notes, answer in zip(group.places, group.notes, given, strict=True):
            answers[place] = replace(answer, notes=notes)
    return [answers[place] for place in range(len(prompts))]


def _relayed(on_tokens: OnTokens | None, places: tuple[int, ...]) -> OnTokens | None:
    """A listener of a group that tells ``on_tokens`` the requests' places in the whole batch."""
    return None if on_tokens is None else lambda request, fresh: on_tokens(places[request], fresh)
