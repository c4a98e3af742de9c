"""A prefill that keeps no KV: what MInference's end-to-end table times, so that 1M tokens fit on one card."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from apb_jax.attention.inputs import Prompt
from apb_jax.attention.method import AttentionMethod
from apb_jax.engine import Engine
from apb_jax.prefill import PrefillRows, PrefillState, prefill_recipe, run
from apb_jax.programs import Lengths


@dataclass(frozen=True)
class PrefillAlone:
    """One document's way through the layers, ``size`` layers at a time."""

    engine: Engine
    method: AttentionMethod
    tokens: Any
    rows: PrefillRows
    size: int

    @classmethod
    def of(cls, engine: Engine, prompt: Prompt, size: int) -> PrefillAlone:
        """Chooses the method and places its rows; ``size`` divides the model's layers. Reads no weight."""
        engine.check_method(1)
        engine.check_lengths([prompt], [prompt.query])
        method, _ = engine.choose([prompt])
        placement, place = engine.placement, engine.programs.place_rows
        layout = method.layout([prompt], placement.shards)
        asked = np.asarray([len(prompt.query)], np.int32)
        lengths = engine.programs.place(Lengths.of(layout, asked, placement))
        rows = PrefillRows(place(layout.positions, placement), lengths)
        return cls(engine, method, place(layout.tokens, placement), rows, size)

    @property
    def row_count(self) -> int:
        """Rows that go through the layers, padding and anchors included."""
        return int(self.tokens.shape[1])

    def compile_ahead(self) -> None:
        """Begin to compile the layers' program in the background."""
        programs, config = self.engine.programs, self.engine.model.config
        sharding = jax.sharding.NamedSharding(programs.mesh, PrefillState(self.tokens, None).specs().x)  # type: ignore[arg-type]
        x = jax.ShapeDtypeStruct((*self.tokens.shape, config.hidden_size), self.engine.model.dtype, sharding=sharding)
        state = PrefillState(x, None)  # type: ignore[arg-type]
        start = programs.place(np.int32(0))
        recipe = prefill_recipe(programs, self.method, self.size, state)
        programs.ahead(*recipe, (self.engine.state, state, self.rows, start))

    def layers(self) -> Iterator[tuple[int, float, jax.Array]]:
        """(layers done, seconds of the work so far, hidden rows) after each group; compilation is not counted.

        Hidden rows are donated to the next group.
        """
        programs, seconds = self.engine.programs, 0.0
        weights = self.engine.state
        compiled, started = programs.compile_s, time.perf_counter()
        for done, state in run(programs, self.method, weights, self.tokens, self.rows, None, self.size):
            jax.block_until_ready(state.x)
            seconds += time.perf_counter() - started - (programs.compile_s - compiled)
            if done:
                yield done, seconds, state.x
            compiled, started = programs.compile_s, time.perf_counter()


def widened(engine_model: Any, positions: int) -> Any:
    """A model with positions for a longer document: times do not depend on the rope."""
    config = engine_model.config
    return replace(engine_model, config=replace(config, max_positions=max(positions, config.max_positions)))
