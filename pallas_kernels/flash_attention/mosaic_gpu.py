"""Row-interval attention for Hopper in Pallas Mosaic GPU (wgmma, TMA, warp specialisation).

One block of threads works on 128 query rows of one head: a memory warpgroup streams key and value tiles
into a ring of shared-memory stages, two compute warpgroups own 64 rows each. Two such blocks of neighbouring query
heads of one KV head form a cluster and share every copy of keys and values. docs/kernels.md has the drawing.
The organisation follows FlashAttention-3 (arXiv 2407.08608).
"""

import dataclasses
import functools
import math
import operator

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tuned
from pallas_kernels.compat import array_type, load_smem, transpose_smem
from pallas_kernels.device import Device, current, refuse_unless_hopper
from pallas_kernels.flash_attention import work
from pallas_kernels.flash_attention.call import AttentionCall
from pallas_kernels.flash_attention.eight_bit import P_SHIFT, quantise_call, shifted
from pallas_kernels.flash_attention.probabilities import GROUP, KEY_ORDER, to_operand
from pallas_kernels.flash_attention.recompute import with_recomputed_gradient
from pallas_kernels.flash_attention.work import BLOCK_ROWS

COMPUTE_GROUPS = 2
GROUP_ROWS = BLOCK_ROWS // COMPUTE_GROUPS  # 64, the height of one wgmma
LOG2_E = math.log2(math.e)
VALUE_ALIGNMENT = 128  # 8-bit values lie transposed: a shared-memory tile is 128 keys wide


@dataclasses.dataclass(frozen=True)
class Config:
    """``block_keys`` keys a step (a multiple of 64), ``stages`` steps in shared memory.

    ``cluster``: query heads of one KV head that share each copy; 1 where it does not divide their number.
    """

    block_keys: int = 128
    stages: int = 2
    cluster: int = 2
    promote: bool = True
    """With 8-bit values: each step's product starts at 0 and is added in float32 (its own sums keep 14 bits)."""


def refuse(call: AttentionCall, device: Device) -> str | None:
    """Why the kernel cannot serve the call on the device, or None if it can."""
    return refuse_arrays(call.q.dtype, call.q.shape[-1], device)


def refuse_arrays(dtype: jax.typing.DTypeLike, dim: int, device: Device) -> str | None:
    """Why the kernel cannot serve queries of this type and head dimension on the device, or None if it can."""
    if reason := refuse_unless_hopper(device):
        return reason
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, q has {dtype}"
    if dim not in (64, 128):
        return f"takes head dimension 64 or 128, q has {dim}"
    return None


@dataclasses.dataclass(frozen=True)
class _Range:
    """One key range as one block of rows sees it: tiles of ``block_keys`` keys from local key ``first`` on.

    ``head`` (0 or 1) tiles begin before the first visible key, the next ``full`` are seen entirely by all
    rows, the rest up to ``tiles`` need a mask.
    """

    first: jax.Array
    head: jax.Array
    full: jax.Array
    tiles: jax.Array


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """The order of a block's tiles: those seen entirely, of all ranges, then those that need a mask."""

    block_keys: int
    ranges: tuple[_Range, ...]

    @property
    def unmasked(self):
        return functools.reduce(operator.add, [part.full for part in self.ranges])

    @property
    def steps(self):
        return functools.reduce(operator.add, [part.tiles for part in self.ranges])

    def place(self, step):
        """(range number, local first key of the tile) of a step; both int32 scalars."""
        source, key, done = jnp.int32(0), jnp.int32(0), jnp.int32(0)
        for masked in (False, True):
            for number, part in enumerate(self.ranges):
                count = part.tiles - part.full if masked else part.full
                tile = step - done
                skipped = jnp.where(tile < part.head, 0, part.full) if masked else part.head
                tile = tile + skipped
                here = (step >= done) & (step < done + count)
                source = jnp.where(here, jnp.int32(number), source)
                key = jnp.where(here, part.first + tile * self.block_keys, key)
                done = done + count
        return source, key


def _read_schedule(table, block, batch, ranges, block_keys):
    columns = [[table[batch, block, work.RANGE_COLUMNS + 4 * n + i] for i in range(4)] for n in range(ranges)]
    return _Schedule(block_keys, tuple(_Range(*column) for column in columns))


def _pick(source, values):
    """values[source] for a short list of ints and a scalar index on the device."""
    chosen = jnp.int32(values[0])
    for number, value in enumerate(values[1:], 1):
        chosen = jnp.where(source == number, jnp.int32(value), chosen)
    return chosen


def _kernel(
    q_ref, k_refs, v_refs, table, row_scale, value_scale, out_ref, lse_ref, scratch, *, config, scale, group, lengths
):  # fmt: skip
    """One block of threads; see the module docstring. ``scratch``: shared memory and barriers.

    ``row_scale`` [B, H, rows]: of the scores, times log2(e) (8-bit q and k); ``value_scale`` [B, H] (8-bit v).
    """
    (q_smem, k_smem, v_smem, lse_smem, out_smem), (q_ready, k_ready, v_ready), (k_free, v_free) = scratch
    block_keys, stages = config.block_keys, config.stages
    head, block, batch = (lax.axis_index(name) for name in ("heads", "blocks", "batch"))
    if config.cluster > 1:
        head = head * config.cluster + lax.axis_index("cluster")
    me = lax.axis_index("groups")
    schedule = _read_schedule(table, block, batch, len(lengths), block_keys)
    steps = schedule.steps
    dim = q_ref.shape[-1]
    dtype = v_refs[0].dtype
    shift_p = 0.0 if value_scale is None else P_SHIFT
    bases = [sum(lengths[:number]) for number in range(len(lengths))]

    def stage(step):
        return lax.rem(step, jnp.int32(stages))

    @pl.when(me < COMPUTE_GROUPS)
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        row = table[batch, block, work.ROW] + me * GROUP_ROWS
        first_stop, end = table[batch, block, work.FIRST_STOP] + me * GROUP_ROWS, table[batch, block, work.END]
        q_mine, out_mine = q_smem.at[me], (q_smem if out_smem is None else out_smem).at[me]
        per_row = plgpu.Layout.WGMMA.reduce(1)
        rows = pl.ds(row, GROUP_ROWS)
        plgpu.copy_gmem_to_smem(q_ref.at[batch, rows, head], q_mine, q_ready.at[me])
        if row_scale is not None:
            plgpu.copy_gmem_to_smem(row_scale.at[batch, head, rows], lse_smem.at[me], q_ready.at[me])
        plgpu.barrier_wait(q_ready.at[me])
        # Read once, not in every product: saves power.
        query = load_smem(q_mine, plgpu.Layout.WGMMA if row_scale is None else plgpu.Layout.WGMMA_8BIT)
        factor = scale * LOG2_E if row_scale is None else load_smem(lse_smem.at[me], per_row)

        peak = plgpu.layout_cast(jnp.full((GROUP_ROWS,), -jnp.inf, jnp.float32), per_row)
        total = plgpu.layout_cast(jnp.zeros((GROUP_ROWS,), jnp.float32), per_row)
        apart = value_scale is not None and config.promote

        def nothing():
            return plgpu.layout_cast(jnp.zeros((GROUP_ROWS, dim), jnp.float32), plgpu.Layout.WGMMA)

        acc = nothing()

        def hide(scores, step):
            """Scores of a masked tile with the keys that a row must not see at -inf."""
            source, key = schedule.place(step)
            first_key = key + _pick(source, bases)
            row_id = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA)
            key_id = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
            visible = (key_id - row_id) < first_stop - first_key
            visible &= key_id >= table[batch, block, work.START] - first_key
            visible &= key_id < jnp.minimum(end - first_key, _pick(source, lengths) - key)
            return jnp.where(visible, scores, -jnp.inf)

        def softmax(scores, peak, total, masked):
            """Probabilities relative to the new peak, which is kept times log2(e) times scale."""
            new_peak = jnp.maximum(peak, scores.max(axis=1) * factor)
            shift = jnp.where(new_peak == -jnp.inf, 0.0, new_peak) if masked else new_peak
            decay = jnp.exp2(peak - shift)
            spread = factor if row_scale is None else lax.broadcast_in_dim(factor, scores.shape, [0])
            under = shift - shift_p if shift_p else shift
            p = jnp.exp2(scores * spread - lax.broadcast_in_dim(under, scores.shape, [0]))
            return p, new_peak, total * decay + p.sum(axis=1), decay

        def as_operand(p):
            return p.astype(dtype) if value_scale is None else to_operand(p)

        def values(slot):
            """The values of a stage as keys x dim: those of 8 bits lie transposed."""
            return v_smem.at[slot] if value_scale is None else transpose_smem(v_smem.at[slot])

        def clear_unread_values(step):
            """Value rows that no row of this block sees may hold NaN, which a weight of 0 would not stop.

            Both groups write the same bytes, so neither has to wait for the other.
            """
            if value_scale is not None:
                return  # 8-bit values that no row sees are zeros already
            source, key = schedule.place(step)
            stop = jnp.minimum(table[batch, block, work.LAST_STOP] - _pick(source, bases), _pick(source, lengths)) - key
            begin = table[batch, block, work.START] - _pick(source, bases) - key

            @pl.when((begin > 0) | (stop < block_keys))
            def _():
                tile = v_smem.at[stage(step)]
                values = load_smem(tile, plgpu.Layout.WGMMA)
                key_id = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=plgpu.Layout.WGMMA)
                read = (key_id >= begin) & (key_id < stop)
                tile[...] = jnp.where(read, values, jnp.zeros_like(values))
                plgpu.commit_smem()

        def scaled(acc, decay):
            return acc * lax.broadcast_in_dim(decay, acc.shape, [0])

        def first_tile(scores_ref):
            plgpu.wgmma(scores_ref, query, transpose_smem(k_smem.at[0]))
            return scores_ref[...]

        def last_tile(acc_ref, p16, slot):
            plgpu.wgmma(acc_ref, p16, values(slot))

        def attend(step, carry, masked):
            """The values of the tile before and the scores of this one, issued back to back; then softmax.

            Meanwhile the other group's products fill the tensor cores.
            """
            acc, peak, total, p16 = carry
            slot, slot_before = stage(step), stage(step - 1)
            plgpu.barrier_wait(v_ready.at[slot_before])
            if masked:
                clear_unread_values(step - 1)
            plgpu.barrier_wait(k_ready.at[slot])

            def products(refs):
                scores_ref, acc_ref, peak_ref, total_ref, p_ref, decay_ref = refs
                plgpu.wgmma(acc_ref, p16, values(slot_before))
                plgpu.wgmma(scores_ref, query, transpose_smem(k_smem.at[slot]))
                scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=0)
                plgpu.barrier_arrive(v_free.at[slot_before])
                plgpu.barrier_arrive(k_free.at[slot])
                if masked:
                    scores = hide(scores, step)
                p, new_peak, new_total, decay = softmax(scores, peak, total, masked)
                peak_ref[...], total_ref[...], decay_ref[...] = new_peak, new_total, decay
                p_ref[...] = as_operand(p)

            no_scores = plgpu.layout_cast(jnp.zeros((GROUP_ROWS, block_keys), jnp.float32), plgpu.Layout.WGMMA)
            _, part, peak, total, p16, decay = pl.run_state(products)(
                (plgpu.ACC.init(no_scores), plgpu.ACC.init(nothing() if apart else acc), peak, total, p16, peak)
            )
            return scaled(acc + part if apart else part, decay), peak, total, p16

        def some_keys(acc, peak, total):
            plgpu.barrier_wait(k_ready.at[0])
            scores = pl.run_scoped(first_tile, plgpu.ACC((GROUP_ROWS, block_keys), jnp.float32))
            plgpu.barrier_arrive(k_free.at[0])
            p, peak, total, _ = softmax(hide(scores, jnp.int32(0)), peak, total, True)
            carry = acc, peak, total, as_operand(p)
            middle = jnp.maximum(schedule.unmasked, 1)
            carry = lax.fori_loop(1, middle, functools.partial(attend, masked=False), carry)
            carry = lax.fori_loop(middle, steps, functools.partial(attend, masked=True), carry)
            acc, peak, total, p16 = carry
            slot = stage(steps - 1)
            plgpu.barrier_wait(v_ready.at[slot])
            clear_unread_values(steps - 1)
            last = pl.run_state(functools.partial(last_tile, p16=p16, slot=slot))
            acc = acc + last(plgpu.ACC.init(nothing())) if apart else last(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, peak, total

        acc, peak, total = lax.cond(steps > 0, some_keys, lambda *carry: carry, acc, peak, total)
        whole = 1.0 if value_scale is None else value_scale[batch, head]
        inverse = jnp.where(total > 0, whole / total, 0.0)
        out_mine[...] = scaled(acc, inverse).astype(out_ref.dtype)
        lse = jnp.where(total > 0, (peak + jnp.log2(total) - shift_p) * (1 / LOG2_E), -jnp.inf)
        lse_smem.at[me][...] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_mine, out_ref.at[batch, rows, head])
        plgpu.copy_smem_to_gmem(lse_smem.at[me], lse_ref.at[batch, head, rows])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(me == COMPUTE_GROUPS)
    def _memory():
        plgpu.set_max_registers(24, action="decrease")
        kv_head = lax.div(head, jnp.int32(group))

        shared = {"collective_axes": "cluster"} if config.cluster > 1 else {}

        def refill(step, free):
            """Wait until the readers of the stage (those of the whole cluster) are done with the step before."""
            pl.when(step >= stages)(functools.partial(plgpu.barrier_wait, free.at[stage(step)]))

        done = jnp.int32(0)
        for masked in (False, True):  # the order of _Schedule.place, without a search in every step
            for part, k_ref, v_ref in zip(schedule.ranges, k_refs, v_refs, strict=True):
                count = part.tiles - part.full if masked else part.full

                def load(tile, _, part=part, k_ref=k_ref, v_ref=v_ref, masked=masked, done=done):
                    step = done + tile
                    slot = stage(step)
                    skipped = jnp.where(tile < part.head, 0, part.full) if masked else part.head
                    keys = pl.ds(part.first + (tile + skipped) * block_keys, block_keys)
                    refill(step, k_free)
                    window = k_ref.at[batch, keys, kv_head]
                    plgpu.copy_gmem_to_smem(window, k_smem.at[slot], k_ready.at[slot], **shared)
                    refill(step, v_free)
                    window = (
                        v_ref.at[batch, keys, kv_head] if value_scale is None else v_ref.at[batch, kv_head, :, keys]
                    )
                    plgpu.copy_gmem_to_smem(window, v_smem.at[slot], v_ready.at[slot], **shared)
                    return _

                lax.fori_loop(0, count, load, jnp.int32(0))
                done = done + count
        if config.cluster > 1:  # nobody leaves while another block may still arrive at its barriers

            @pl.loop(steps, steps + stages)
            def _(step):
                refill(step, k_free)
                refill(step, v_free)


def _pad_keys(ranges):
    """Ranges whose length is no multiple of 8, the height of a shared-memory tile, get zero rows at the end."""
    return tuple(
        jnp.pad(key, ((0, 0), (0, -key.shape[1] % 8), (0, 0), (0, 0))) if key.shape[1] % 8 else key for key in ranges
    )


def _tile(dtype, columns):
    """Shared-memory form of rows of ``columns`` elements: wgmma wants tiles 8 rows high and up to 128 bytes wide."""
    wide = min(128, columns * jnp.dtype(dtype).itemsize)
    return (plgpu.TilingTransform((8, wide // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(wide))


def _transposed(value):
    """e4m3 values [B, T, K, D] as [B, K, D, T padded to whole tiles], the keys of each group of 16 in `KEY_ORDER`."""
    batch, length, heads, dim = value.shape
    padded = jnp.pad(value, ((0, 0), (0, -length % VALUE_ALIGNMENT), (0, 0), (0, 0)))
    groups = padded.reshape(batch, -1, GROUP, heads, dim)[:, :, jnp.array(KEY_ORDER)]
    return groups.transpose(0, 3, 4, 1, 2).reshape(batch, heads, dim, -1)


def forward(call: AttentionCall, config: Config) -> tuple[jax.Array, jax.Array]:
    """out [B, S, H, D] in q's dtype and lse_nat float32 [B, H, S]; not differentiable."""
    if (call.heads // call.kv_heads) % config.cluster:
        config = dataclasses.replace(config, cluster=1)
    batch, _, heads, dim = call.q.shape
    q, keys, values, scales, shift, transposed = call.q, call.k, call.v, [], None, False
    if call.eight is not None:
        found = quantise_call(q, keys, values, call.rows, call.scale, call.eight)
        q, keys, values, shift, transposed = found.q, found.k, found.v, found.shift, found.value_scale is not None
        scales = [work.pad_segments(found.row_scale * LOG2_E, call.rows, axis=2)]
        if transposed:
            scales, values = [*scales, found.value_scale], tuple(map(_transposed, values))
    q = work.pad_segments(q, call.rows)
    rows = q.shape[1]
    lengths = tuple(key.shape[1] for key in call.k)
    table = work.work_table(call, config.block_keys, VALUE_ALIGNMENT if transposed else work.KEY_ALIGNMENT)
    v_tile = (dim, config.block_keys) if transposed else (config.block_keys, dim)
    out_type = call.q.dtype
    groups, stages = COMPUTE_GROUPS, config.stages
    memory: tuple = (
        plgpu.SMEM((groups, GROUP_ROWS, dim), q.dtype, transforms=_tile(q.dtype, dim)),
        plgpu.SMEM((stages, config.block_keys, dim), q.dtype, transforms=_tile(q.dtype, dim)),
        plgpu.SMEM((stages, *v_tile), values[0].dtype, transforms=_tile(values[0].dtype, v_tile[1])),
        plgpu.SMEM((groups, GROUP_ROWS), jnp.float32),
    )
    memory += (plgpu.SMEM((groups, GROUP_ROWS, dim), out_type, transforms=_tile(out_type, dim)),) if scales else ()
    ready = plgpu.Barrier(num_barriers=stages)
    q_ready = plgpu.Barrier(num_arrivals=2 if scales else 1, num_barriers=groups)
    clustered = config.cluster > 1
    kind = functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",)) if clustered else plgpu.Barrier
    free = kind(num_arrivals=groups, num_barriers=stages)
    ranges = len(call.k)
    group = heads // call.kv_heads

    def entry(q_ref, *refs):
        k_refs, v_refs = refs[:ranges], refs[ranges : 2 * ranges]
        table_ref, *scale_refs, out_ref, lse_ref = refs[2 * ranges :]
        scale_refs += [None] * (2 - len(scale_refs))

        def body(memory, *barriers):
            scratch = ((*memory, *[None] * (5 - len(memory))), *barriers)
            _kernel(
                q_ref, k_refs, v_refs, table_ref, *scale_refs, out_ref, lse_ref, scratch,
                config=config, scale=call.scale, group=group, lengths=lengths,
            )  # fmt: skip

        pl.run_scoped(body, memory, (q_ready, ready, ready), (free, free), collective_axes="groups")

    out, lse = plgpu.kernel(
        entry,
        out_type=(
            array_type((batch, rows, heads, dim), out_type, call.q),
            array_type((batch, heads, rows), jnp.float32, call.q),
        ),
        grid=(heads // config.cluster, table.shape[1], batch),
        grid_names=("heads", "blocks", "batch"),
        cluster=(config.cluster,) if clustered else (),
        cluster_names=("cluster",) if clustered else (),
        num_threads=COMPUTE_GROUPS + 1,
        thread_name="groups",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=256,  # reductions stay inside a warp; the default would not fit
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )(q, *_pad_keys(keys), *(values if transposed else _pad_keys(values)), table, *scales)
    lse = work.unpad_segments(lse, call.rows, 2)
    return work.unpad_segments(out, call.rows, 1), lse if shift is None else shifted(lse, shift)


def mosaic_gpu(call: AttentionCall, config: Config | None = None) -> tuple[jax.Array, jax.Array]:
    """out [B, S, H, D] in q's dtype and lse_nat float32 [B, H, S]; the gradient recomputes through XLA."""
    if config is None:
        config = Config(**tuned.parameters("flash_attention", call.q.shape[-1], current()))  # type: ignore[arg-type]
    return with_recomputed_gradient(functools.partial(forward, config=config), call)
