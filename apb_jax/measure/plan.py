"""Whether a document fits, how long one may be, what it should take, and what would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from apb_jax.attention.inputs import Prompt
from apb_jax.attention.layout import Layout
from apb_jax.attention.method import AttentionMethod
from apb_jax.errors import UserError
from apb_jax.kv_memory import HOST, NOWHERE
from apb_jax.measure.auto import Calibration
from apb_jax.measure.devices import DeviceFigures, memory_limit
from apb_jax.measure.memory import (
    NEW_TOKENS,
    QUERY_TOKENS,
    Case,
    Memory,
    hypothetical,
    memory_for,
    memory_of,
    weight_bytes,
)
from apb_jax.measure.seconds import Expected, expected
from apb_jax.precision import FP8, INT8, MODEL
from apb_jax.weights.quantised import refusal as refusal_of_fp8
from pallas_kernels.device import HOPPER

if TYPE_CHECKING:
    from apb_jax.engine import Engine
    from apb_jax.session import Session

STAYING = 0.95
"""Of a device's limit may be taken for layers that stay on it: a plan is off by a few percent."""
GRID = 24
"""Lengths that are looked at from above: a table of budgets lets bytes fall where it changes to another row."""
MOST_DEVICES = 64
REMEDIES = 3
KV_HOST = "--kv host (slow answers)"


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


@dataclass(frozen=True)
class Plan:
    """One document under one method on one mesh."""

    case: Case
    method: str
    """What would run: full attention where the document does not fit the method asked for."""
    document_tokens: int
    shards: int
    memory: Memory
    limit: int | None
    """Bytes of a device that may be used; None: not known."""
    longest: int
    """Document tokens of the longest request that fits; the model's positions end there without a limit."""
    expected: Expected | None
    remedies: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the fullest device has the bytes."""
        return self.limit is None or self.memory.bytes_per_device <= self.limit

    def to_json(self) -> dict[str, Any]:
        """The command's last line."""
        return {
            "model": self.case.model,
            "method": self.method,
            "devices": self.case.devices * self.case.tp,
            "sp": self.case.devices,
            "tp": self.case.tp,
            "shards": self.shards,
            "document_tokens": self.document_tokens,
            "weights_dtype": FP8 if self.case.fp8 else MODEL,
            "fits": self.fits,
            "bytes_per_device": self.memory.bytes_per_device,
            "limit_bytes": self.limit,
            "longest_document_tokens": self.longest,
            "components": self.memory.components,
            "kv_dtype": self.case.kv,
            "kv_memory": self.case.kv_memory,
            "host_bytes": self.memory.host_bytes,
            "kv_layers_that_stay": self.case.kv_layers,
            "seconds": None if self.expected is None else self.expected.seconds,
            "seconds_from": None if self.expected is None else self.expected.basis,
            "would_fit": list(self.remedies),
        }


def fits(case: Case, document_tokens: int, limit: int, query_tokens: int, new_tokens: int) -> bool:
    """Whether a hypothetical request fits into ``limit`` bytes a device."""
    return memory_for(case, document_tokens, query_tokens, new_tokens).bytes_per_device <= limit


def longest_document(
    case: Case, limit: int | None, query_tokens: int = QUERY_TOKENS, new_tokens: int = NEW_TOKENS
) -> int:
    """Document tokens of the longest request that fits and has positions; 0 where none does."""
    top = case.config.max_positions - query_tokens - new_tokens
    if top < 1 or limit is None:
        return max(0, top)

    def good(tokens: int) -> bool:
        return fits(case, tokens, limit, query_tokens, new_tokens)

    grid = sorted({max(1, round(top ** (step / GRID))) for step in range(GRID + 1)} | {top}, reverse=True)
    below = next((place for place, tokens in enumerate(grid) if good(tokens)), None)
    if below is None:
        return 0
    low = grid[below]
    high = grid[below - 1] if below else top + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def layers_that_stay(
    case: Case, method: AttentionMethod, layout: Layout, limit: int | None, asked: tuple[int, int]
) -> int:
    """How many layers' KV the devices can hold beside all else of a run with its KV in the host's memory."""
    if case.kv_memory != HOST or limit is None:
        return 0
    bare, one = (memory_of(replace(case, kv_layers=n), method, layout, *asked) for n in (0, 1))
    layer = (bare.host_bytes - one.host_bytes) // (case.devices * case.tp)
    room = int(STAYING * limit) - bare.bytes_per_device
    return max(0, min(case.config.num_layers, room // layer))


def spread(engine: Engine, prompts: Sequence[Prompt], new_tokens: int, limit: int | None = None) -> Engine:
    """The engine with as many layers' KV on its devices as fit, where its KV is kept in the host's memory."""
    limit = memory_limit(engine.mesh.devices.flat) if limit is None else limit
    case = Case.of(engine)
    asked = (max(len(prompt.query) for prompt in prompts), new_tokens)
    stay = layers_that_stay(case, *case.chosen(prompts), limit, asked)
    return engine if stay == engine.settings.kv_layers else engine.with_method(engine.method, kv_layers=stay)


def remedies(case: Case, document_tokens: int, limit: int, longest: int, asked: tuple[int, int]) -> tuple[str, ...]:
    """What would make the document fit, cheapest first; each was tried by the same arithmetic.

    ``asked``: query tokens and new tokens.
    """

    def helps(changed: Case) -> bool:
        try:
            changed.check()
            return fits(changed, document_tokens, limit, *asked)
        except UserError:  # no legal choice, such as a tp that does not divide the heads
            return False

    def first(flag: str, values: Sequence[int], change: Callable[[int], Case]) -> list[str]:
        for value in values:
            changed = change(value)
            if helps(changed):
                return [f"{flag} {value} ({changed.devices * changed.tp} devices)"]
        return []

    powers = [2**n for n in range(1, MOST_DEVICES.bit_length())]
    shards = case.placement.shards
    fp8 = replace(case, fp8=True)
    narrow = not case.fp8 and refusal_of_fp8(case.config, HOPPER, tp=case.tp) is None and helps(fp8)
    found = [] if case.itemsize == 2 or not helps(replace(case, itemsize=2)) else ["--dtype bf16"]
    found += ["--weights-dtype fp8"] if narrow else []
    if not case.method.can.exact:
        found += first("--shards", [shards * n for n in (2, 4)], lambda n: replace(case, shards=n))
    more = [n for n in powers if n > case.devices]
    found += first("--sp", more, lambda n: replace(case, devices=n, shards=None))
    found += first("--tp", [n for n in powers if n > case.tp], lambda n: replace(case, tp=n))
    if case.kv == MODEL and helps(replace(case, kv=INT8)):
        found.append("--kv-dtype int8")
    if case.kv_memory not in (HOST, NOWHERE) and helps(replace(case, kv_memory=HOST)):
        found.append(KV_HOST)
    if 0 < longest < document_tokens:
        found.append(f"a document of at most {longest:,} tokens")
    return tuple(found)


def plan(
    case: Case,
    prompts: Sequence[Prompt],
    limit: int | None,
    new_tokens: int = NEW_TOKENS,
    figures: DeviceFigures | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """Of one batch of requests; nothing is read or run."""
    case.check()
    method, layout = case.chosen(prompts)
    query_tokens = max(len(prompt.query) for prompt in prompts)
    longest = longest_document(replace(case, kv_layers=0), limit, query_tokens, new_tokens)
    case = replace(case, kv_layers=layers_that_stay(case, method, layout, limit, (query_tokens, new_tokens)))
    memory = memory_of(case, method, layout, query_tokens, new_tokens)
    tokens = int(layout.document_tokens.max())
    too_large = limit is not None and memory.bytes_per_device > limit
    return Plan(
        case=case,
        method=method.name,
        document_tokens=tokens,
        shards=case.placement.shards,
        memory=memory,
        limit=limit,
        longest=longest,
        expected=expected(case, method, layout, figures, calibration),
        remedies=remedies(case, tokens, limit or 0, longest, (query_tokens, new_tokens)) if too_large else (),
    )


def plan_length(case: Case, document_tokens: int, limit: int | None, **given: Any) -> Plan:
    """Of one request of this length; ``given``: more arguments of ``plan``."""
    return plan(case, [hypothetical(document_tokens)], limit, **given)


def refusal_of(found: Plan) -> str:
    """Why a plan does not fit, in one line: what is needed, of what, and what would do."""
    parts = sorted(found.memory.components.items(), key=lambda item: -item[1])[:REMEDIES]
    largest = ", ".join(f"{name.replace('_', ' ')} {gib(count)}" for name, count in parts)
    assert found.limit is not None
    would = "; it would fit with " + ", or ".join(found.remedies) if found.remedies else ""
    return (
        f"{found.document_tokens:,} document tokens under {found.method} need {gib(found.memory.bytes_per_device)} "
        f"on each of {found.case.devices * found.case.tp} devices ({largest}), and {gib(found.limit)} are "
        f"there{would}"
    )


def check_memory(
    engine: Engine,
    prompts: Sequence[Prompt],
    new_tokens: int,
    limit: int | None = None,
    beside: Sequence[Engine] = (),
    kept: bool = True,
) -> None:
    """Refuse requests that the engine's devices cannot hold, before a weight is read.

    ``limit``: bytes a device; None: what the devices say, and nothing is refused where they do not. ``beside``: engines
    of the same process; weights that they hold at another precision take from the limit. ``kept``: whether there is a
    cache.
    """
    limit = memory_limit(engine.mesh.devices.flat) if limit is None else limit
    if limit is None:
        return
    case = Case.of(engine) if kept else replace(Case.of(engine), kv_memory=NOWHERE)
    others = {one.model.fp8: Case.of(one) for one in beside if one.model.fp8 != engine.model.fp8}
    limit -= sum(weight_bytes(other) for other in others.values())
    method, layout = case.chosen(prompts)
    asked = (max(len(prompt.query) for prompt in prompts), new_tokens)
    if memory_of(case, method, layout, *asked).bytes_per_device > limit:
        raise UserError(refusal_of(plan(case, prompts, limit, new_tokens)))


def planned_bytes(session: Session, new_tokens: int) -> int:
    """What the plan says of a session that ran: stands beside its measured peak."""
    query_tokens = max(len(prompt.query) for prompt in session.prompts)
    case = Case.of(session.engine)
    return memory_of(case, session.method, session.layout, query_tokens, new_tokens).bytes_per_device
