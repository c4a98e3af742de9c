"""Whether a prefill fits the devices, said before it runs: never, or not now."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

import jax

from apb_jax.attention.inputs import Prompt
from apb_jax.engine import Engine
from apb_jax.errors import UserError
from apb_jax.measure.devices import memory_limit
from apb_jax.measure.memory import NEW_TOKENS, QUERY_TOKENS, Case, Memory, hypothetical, memory_of
from apb_jax.measure.plan import KV_HOST, gib, plan, refusal_of
from apb_jax.serve.refusal import Refusal, wrong
from apb_jax.serve.store import SessionStore


@dataclass(frozen=True)
class MemoryPlan:
    """The plan of ``measure.memory`` against what the fullest device has."""

    engine: Engine
    limit: int | None = None
    """Bytes of a device that may be used; None: what the devices say, and nothing is refused where they do not."""

    @cached_property
    def most(self) -> int | None:
        """The limit that counts."""
        return memory_limit(self.engine.mesh.devices.flat) if self.limit is None else self.limit

    @cached_property
    def case(self) -> Case:
        """The engine's shapes."""
        return Case.of(self.engine)

    def memory(self, tokens: int) -> Memory:
        """Of a document of so many tokens under the engine's method."""
        return memory_of(self.case, *self.case.chosen([self.prompt(tokens)]))

    @staticmethod
    def prompt(tokens: int) -> Prompt:
        """A request of this length."""
        return hypothetical(tokens, QUERY_TOKENS)

    def check(self, tokens: int, param: str) -> None:
        """400 for a document that an empty server could not prefill; what would do is said."""
        if self.most is None:
            return
        try:
            fits = self.memory(tokens).bytes_per_device <= self.most
        except UserError as error:
            raise wrong(param, str(error)) from error
        if fits:
            return
        found = plan(self.case, [self.prompt(tokens)], self.most, NEW_TOKENS)
        found = replace(found, remedies=tuple(one for one in found.remedies if one != KV_HOST))  # not the server's
        raise Refusal(400, refusal_of(found), param=param, code="memory_exceeded")

    def admit(self, tokens: int, store: SessionStore, *, loaded: bool = False) -> None:
        """Make room for a prefill (``loaded``: for a session alone): kept sessions go until it fits.

        Raises:
            Refusal: 507 where it does not fit beside what running answers hold.
        """
        parts = self.memory(tokens).components
        store.make_room(parts["document_kv"] * self.engine.mesh.size)
        if self.most is None:
            return
        needed = parts["document_kv"] if loaded else sum(parts.values()) - parts["weights"]
        while self.used() + needed > self.most:
            if store.let_go():
                continue
            held = self.used()
            raise Refusal(
                507,
                f"{tokens:,} document tokens need {gib(needed)} more on a device, {gib(max(0, self.most - held))} of "
                f"{gib(self.most)} are free beside the weights and the answers that are running; try again later",
                code="insufficient_memory",
                kind="server_error",
                headers={"Retry-After": "5"},
            )

    def used(self) -> int:
        """Bytes in use on the fullest device: as it says, else of all arrays that live on it."""
        devices = list(self.engine.mesh.devices.flat)
        told = [(device.memory_stats() or {}).get("bytes_in_use") for device in devices]
        if all(one is not None for one in told):
            return max(int(one or 0) for one in told)
        held: Counter[jax.Device] = Counter()
        for array in jax.live_arrays():
            if not array.is_deleted():
                for part in array.addressable_shards:
                    held[part.device] += part.data.nbytes
        return max(held[device] for device in devices)
