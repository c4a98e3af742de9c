"""The step that both attention kernels in the Triton language share."""

import triton
import triton.language as tl


@triton.jit
def attend(q, k, v, acc, peak, total, visible, SCALE_LOG2: tl.constexpr):
    """One step of the online softmax in base 2 (FlashAttention-2, arXiv 2307.08691); q [R, D], k and v [T, D].

    acc [R, D], peak [R] and total [R] are float32. ``visible`` [R, T], or None where every row sees every key;
    keys that no row sees must arrive as zeros.
    """
    scores = tl.dot(q, tl.trans(k)) * SCALE_LOG2
    if visible is not None:
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    shift = new_peak
    if visible is not None:
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(peak - shift)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None])
    return acc, new_peak, total * decay + tl.sum(p, axis=1)


@triton.jit
def finish(acc, peak, total, LOG2_E: tl.constexpr):
    """out [R, D] and natural log-sum-exp [R], both float32; a row that saw nothing gets 0 and -inf."""
    seen = total != 0  # true for NaN, which must not pass for a row that saw nothing
    safe = tl.where(seen, total, 1.0)
    out = tl.where(seen[:, None], acc / safe[:, None], 0.0)
    return out, tl.where(seen, (peak + tl.log2(safe)) / LOG2_E, float("-inf"))
