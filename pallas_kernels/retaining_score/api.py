"""retaining_score: how much each token's KV deserves to be passed on, per KV head."""

import jax

from pallas_kernels.dispatch import Implementation, accepts_all, choose
from pallas_kernels.retaining_score.call import RowLimits, make_call
from pallas_kernels.retaining_score.reference import reference
from pallas_kernels.retaining_score.xla import xla

IMPLEMENTATIONS = (
    Implementation("xla", xla, accepts_all),
    Implementation("reference", reference, accepts_all, automatic=False),
)


def retaining_score(
    x: jax.Array | None,
    w1: jax.Array | None,
    w2: jax.Array,
    *,
    limits: RowLimits,
    pool: int = 5,
    hidden: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Retaining-head scores ``maxpool(silu(x @ w1) @ w2)`` (Locret, arXiv 2410.01805; as APB uses them).

    Args:
      x: [B, S, W], the pre-RoPE concat(Q, K, V); None in the folded form.
      w1: [W, F]; None in the folded form.
      w2: [F, K].
      limits: which rows exist and which may not be chosen (see `RowLimits`).
      pool: odd width of the max-pooling over rows, stride 1.
      hidden: [B, S, F], the folded form: ``x @ w1`` already computed as further columns of the QKV product.
      implementation: None for the automatic choice, or a name, which never falls back.

    Returns:
      Scores float32 [B, S, K].

    Raises:
      KernelInputError, Unsupported, ExceptionGroup: as `flash_attention`.
    """
    call = make_call(x, w1, w2, hidden, limits, pool)
    return choose("retaining_score", IMPLEMENTATIONS, implementation, call).run(call)
