"""Engines of several methods over the same model, each on as many shards as its method can use."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax

from apb_jax.attention.registry import MethodSpec
from apb_jax.engine import Engine
from apb_jax.errors import UserError
from apb_jax.mesh import SP, make_mesh
from apb_jax.precision import Precision


@dataclass
class Beside:
    """``beside.of(spec)``: an engine on the mesh of ``first``, or on one device where the method knows one shard only.

    The one-device engine is made once (the weights are placed there once) and shared by all methods that need it.
    """

    first: Engine
    _single: Engine | None = field(default=None, init=False, repr=False)

    def of(self, spec: MethodSpec, precision: Precision | None = None) -> Engine:
        """``precision``: another one than the first engine's, on weights of its own.

        Raises UserError where the method cannot serve the model or mesh."""
        first, changes = self.first, {} if precision is None else {"precision": precision}
        alone = first.mesh.shape[SP] == 1 and first.settings.shards in (None, 1)
        if spec.can.max_shards != 1 or alone:
            shards = spec.shards_on(first.mesh.shape[SP], first.settings.shards)
            return first.with_method(spec, shards=shards, **changes)
        if jax.process_count() > 1:
            raise UserError(
                f"method {spec.name!r} runs on one device and cannot stand beside {jax.process_count()} processes; "
                "compare with it in a run of one process"
            )
        if self._single is None:
            settings = replace(first.settings, shards=None, slice_decode=False)
            self._single = Engine(first.model, spec, make_mesh(1), settings=settings, beside=first)
        return self._single.with_method(spec, **changes)
