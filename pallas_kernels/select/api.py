"""select_topk: the best-scored tokens of each KV head and their keys and values, in one contiguous buffer."""

import jax

from pallas_kernels.compat import vary_together
from pallas_kernels.dispatch import Implementation, accepts_all, choose
from pallas_kernels.select.call import SelectCall
from pallas_kernels.select.reference import reference
from pallas_kernels.select.xla import xla

IMPLEMENTATIONS = (
    Implementation("xla", xla, accepts_all),
    Implementation("reference", reference, accepts_all, automatic=False),
)


def select_topk(
    scores: jax.Array, k: jax.Array, v: jax.Array, count: int, implementation: str | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The ``count`` best-scored rows per KV head, and their K and V.

    Args:
      scores: float32 [B, S, K], no NaN.
      k, v: [B, S, K, D].
      count: 1 <= count <= S.
      implementation: None for the automatic choice, or a name, which never falls back.

    Returns:
      index int32 [B, count, K], best first and the lowest index first among equals; k_sel and v_sel
      [B, count, K, D], the rows at ``index``.

    Raises:
      KernelInputError, Unsupported, ExceptionGroup: as `flash_attention`.
    """
    scores, k, v = vary_together((scores, k, v))
    call = SelectCall(scores, k, v, count)
    return choose("select_topk", IMPLEMENTATIONS, implementation, call).run(call)
