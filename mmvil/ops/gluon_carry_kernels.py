"""Device code of the chunkwise mLSTM for Hopper, in Gluon: a program carries the state through its part of a sequence.

Notation and weights are those of `triton_chunkwise_states`. A program owns a segment of whole tiles and CB of the value
columns of one head, and holds their state C^T (columns, DH) in registers. For each tile it takes the products with the
state, adds those of the own tile, and moves the state on: queries, keys and values are read once, and states between
chunks are written only where a backward pass will need them. One more column of values, all ones, makes row CB of the
state the normaliser's, sum_s exp(g_s - R) k_s.

Triton's own pipeliner does not arrive at this: it holds more in registers than there are. Its interpreter does not run
Gluon; tests have a stand-in for the language.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from . import triton_gates

LOG2_E = gl.constexpr(1.4426950408889634)
LARGEST_EXPONENT = gl.constexpr(triton_gates.LARGEST_EXPONENT.value)


@gluon.jit
def clamped_exp(exponent):
    """Compute exp of a difference that is at most 0 but for rounding."""
    return gl.exp2(gl.minimum(exponent, 0.0) * LOG2_E)


@gluon.jit
def head_start(
    base, head, heads, batch_stride, head_stride, row_stride, length, REVERSE: gl.constexpr, UNIT: gl.constexpr
):
    """Address of the first position of a head, and the step to the next; strides come in units of UNIT elements."""
    offset = (head // heads).to(gl.int64) * batch_stride + (head % heads).to(gl.int64) * head_stride
    if REVERSE:
        offset += (length - 1).to(gl.int64) * row_stride
        row_stride = -row_stride
    return base + offset * UNIT, row_stride * UNIT


@gluon.jit
def copy_rows(shared, base, step, start, length, COLUMNS: gl.constexpr):
    """Start to copy COLUMNS columns of a tile; what lies behind the last position is a copy of it."""
    ROWS: gl.constexpr = shared.shape[0]
    WIDTH: gl.constexpr = shared.shape[1]
    LANES: gl.constexpr = WIDTH // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    row = gl.minimum(start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)), length - 1)
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    pointers = base + row[:, None] * step + column[None, :]
    if COLUMNS < WIDTH:
        async_copy.async_copy_global_to_shared(shared, pointers, mask=(row[:, None] >= 0) & (column < COLUMNS)[None, :])
    else:
        async_copy.async_copy_global_to_shared(shared, pointers)


@gluon.jit
def copy_numbers(shared, base, start, length):
    """Start to copy one float32 a position."""
    SIZE: gl.constexpr = shared.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    position = gl.minimum(start + gl.arange(0, SIZE, layout=layout), length - 1)
    async_copy.async_copy_global_to_shared(shared, base + position)


@gluon.jit
def copy_keys_and_values(
    keys_a, keys_b, values, gates, k, k_step, v, v_step, gate, start, length, KA: gl.constexpr, KB: gl.constexpr,
    CB: gl.constexpr,
):  # fmt: skip
    """Start to copy what the state takes from a tile."""
    copy_rows(keys_a, k, k_step, start, length, KA)
    if KB > 0:
        copy_rows(keys_b, k + KA, k_step, start, length, KB)
    copy_rows(values, v, v_step, start, length, CB)
    copy_numbers(gates, gate, start, length)


@gluon.jit
def write_weighted(weighted, values, gates, CB: gl.constexpr, layout: gl.constexpr):
    """Write exp(g - E after the tile) times each value, and in column CB times one."""
    WIDTH: gl.constexpr = values.shape[1]
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    weight = gl.exp2(gates.load(gl.SliceLayout(1, layout)) * LOG2_E)
    scaled = gl.where((column == CB)[None, :], 1.0, values.load(layout).to(gl.float32)) * weight[:, None]
    weighted.store(scaled.to(weighted.dtype))


@gluon.jit
def add_tile(state_a, state_b, weighted, keys_a, keys_b, KB: gl.constexpr):
    """Start to add weighted^T @ keys to the state."""
    state_a = warpgroup_mma(weighted.permute((1, 0)), keys_a, state_a, is_async=True)
    if KB > 0:
        state_b = warpgroup_mma(weighted.permute((1, 0)), keys_b, state_b, is_async=True)
    return state_a, state_b


@gluon.jit
def state_pointers(base, index, columns: gl.constexpr, dim: gl.constexpr, FIRST: gl.constexpr, layout: gl.constexpr,
                   WIDTH: gl.constexpr):  # fmt: skip
    """Addresses of WIDTH of a stored state's channels."""
    row = gl.arange(0, columns, layout=gl.SliceLayout(1, layout))
    channel = FIRST + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    return base + index.to(gl.int64) * (columns * dim) + row[:, None] * dim + channel[None, :]


@gluon.jit(do_not_specialize=['k_batch', 'k_head', 'k_row', 'v_batch', 'v_head', 'v_row', 'heads', 'length', 'segments',
                              'segment'])  # fmt: skip
def segment_state_kernel(
    k, v, gate, border, segment_states, k_batch, k_head, k_row, v_batch, v_head, v_row, heads, length, segments,
    segment, DH: gl.constexpr, KA: gl.constexpr, KB: gl.constexpr, CA: gl.constexpr, CB: gl.constexpr,
    SPLIT: gl.constexpr, TILE: gl.constexpr, BUFFERS: gl.constexpr, REVERSE: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """What each segment but the last adds to the state after it: (heads, segments - 1, SPLIT, CA, DH)."""
    DTYPE: gl.constexpr = k.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    WB: gl.constexpr = KB if KB > 0 else KA
    a_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KA, 16])
    b_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WB, 16])
    t_layout: gl.constexpr = gl.DotOperandLayout(0, a_layout, 2)
    shared_a: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, KA], DTYPE)
    shared_b: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, WB], DTYPE)
    shared_v: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, CA], DTYPE)

    index = gl.program_id(0)
    block = index % SPLIT
    head = index // SPLIT // (segments - 1)
    first = index // SPLIT % (segments - 1) * segment
    k, k_step = head_start(k, head, heads, k_batch, k_head, k_row, length, REVERSE, UNIT)
    v, v_step = head_start(v, head, heads, v_batch, v_head, v_row, length, REVERSE, UNIT)
    v += block * CB
    gate += head.to(gl.int64) * length
    border += head * (gl.cdiv(length, TILE) + 1)

    keys_a = gl.allocate_shared_memory(DTYPE, [BUFFERS, TILE, KA], shared_a)
    keys_b = keys_a
    if KB > 0:
        keys_b = gl.allocate_shared_memory(DTYPE, [BUFFERS, TILE, WB], shared_b)
    values = gl.allocate_shared_memory(DTYPE, [BUFFERS, TILE, CA], shared_v)
    gates = gl.allocate_shared_memory(gl.float32, [BUFFERS, TILE], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    state_a = gl.zeros((CA, KA), gl.float32, layout=a_layout)
    state_b = state_a
    if KB > 0:
        state_b = gl.zeros((CA, WB), gl.float32, layout=b_layout)

    for ahead in gl.static_range(BUFFERS - 1):
        copy_keys_and_values(
            keys_a.index(ahead), keys_b.index(ahead), values.index(ahead), gates.index(ahead), k, k_step, v, v_step,
            gate, first + ahead * TILE, length, KA, KB, CB,
        )  # fmt: skip
        async_copy.commit_group()
    row = gl.arange(0, CA, layout=gl.SliceLayout(1, t_layout))
    for step in range(segment // TILE):
        now = step % BUFFERS
        start = first + step * TILE
        async_copy.wait_group(BUFFERS - 2)
        # Weighted in registers, so that no fence waits for copies that are still on their way.
        fade = gl.exp2(gates.index(now).load(gl.SliceLayout(0, t_layout)) * LOG2_E)
        scaled = values.index(now).permute((1, 0)).load(t_layout).to(gl.float32)
        weighted = (gl.where((row == CB)[:, None], 1.0, scaled) * fade[None, :]).to(DTYPE)
        keep = clamped_exp((gl.load(border + start // TILE) - gl.load(border + start // TILE + 1)).to(gl.float32))
        state_a = warpgroup_mma(weighted, keys_a.index(now), state_a * keep, is_async=True)
        if KB > 0:
            other = gl.convert_layout(weighted, gl.DotOperandLayout(0, b_layout, 2))
            state_b = warpgroup_mma(other, keys_b.index(now), state_b * keep, is_async=True)
        free = (step + BUFFERS - 1) % BUFFERS
        copy_keys_and_values(
            keys_a.index(free), keys_b.index(free), values.index(free), gates.index(free), k, k_step, v, v_step, gate,
            start + (BUFFERS - 1) * TILE, length, KA, KB, CB,
        )  # fmt: skip
        async_copy.commit_group()
        state_a = warpgroup_mma_wait(0, deps=[state_a])
        weighted = warpgroup_mma_wait(0, deps=[weighted])
        if KB > 0:
            state_b = warpgroup_mma_wait(0, deps=[state_b])
            other = warpgroup_mma_wait(0, deps=[other])
    async_copy.wait_group(0)
    gl.store(state_pointers(segment_states, index, CA, DH, 0, a_layout, KA), state_a.to(DTYPE))
    if KB > 0:
        gl.store(state_pointers(segment_states, index, CA, DH, KA, b_layout, WB), state_b.to(DTYPE))


@gluon.jit
def store_chunk_state(
    states, normalisers, index, state, block, FIRST: gl.constexpr, DH: gl.constexpr, CB: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Write the state before a chunk as the backward pass reads it, (DH, DH), and the normaliser's, (DH)."""
    column = gl.arange(0, state.shape[0], layout=gl.SliceLayout(1, LAYOUT))[:, None]
    channel = FIRST + gl.arange(0, state.shape[1], layout=gl.SliceLayout(0, LAYOUT))[None, :]
    pointers = states + index.to(gl.int64) * (DH * DH) + channel * DH + block * CB + column
    gl.store(pointers, state.to(states.dtype.element_ty), mask=(column < CB) & (channel >= 0))
    gl.store(
        normalisers + index * DH + channel + 0 * column, state, mask=(column == CB) & (channel >= 0) & (block == 0)
    )


@gluon.jit(do_not_specialize=['q_batch', 'q_head', 'q_row', 'k_batch', 'k_head', 'k_row', 'v_batch', 'v_head', 'v_row',
                              'h_batch', 'h_head', 'h_row', 'heads', 'length', 'segments', 'segment', 'chunks', 'scale',
                              'eps'])  # fmt: skip
def carry_kernel(
    q, k, v, h, segment_states, states, state_normalisers, gate, maximum, border, stabiliser, normaliser,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, h_batch, h_head, h_row,
    heads, length, segments, segment, chunks, scale, eps,
    DH: gl.constexpr, KA: gl.constexpr, KB: gl.constexpr, CA: gl.constexpr, CB: gl.constexpr, SPLIT: gl.constexpr,
    TILE: gl.constexpr, PER_CHUNK: gl.constexpr, KEEP: gl.constexpr, REVERSE: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """h of one segment, and n / d.

    KEEP: n instead, and the state before each chunk, as `chunk_state_kernel` and its scan make it. `segment_states`
    holds the states before all segments but the first, see `segment_state_kernel`.
    """
    DTYPE: gl.constexpr = q.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    WB: gl.constexpr = KB if KB > 0 else KA
    STEPS: gl.constexpr = 2 if KB > 0 else 1
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TILE, 16])
    h_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, CA, 16])
    a_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KA, 16])
    b_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WB, 16])
    v_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (CA // 8), CA // 8], [WARPS, 1], [1, 0])
    of_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    of_h: gl.constexpr = gl.SliceLayout(1, h_layout)
    shared_a: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, KA], DTYPE)
    shared_b: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, WB], DTYPE)
    shared_v: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, CA], DTYPE)
    numbers: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])

    block = gl.program_id(0) % SPLIT
    head = gl.program_id(0) // SPLIT // segments
    part = gl.program_id(0) // SPLIT % segments
    q, q_step = head_start(q, head, heads, q_batch, q_head, q_row, length, REVERSE, UNIT)
    k, k_step = head_start(k, head, heads, k_batch, k_head, k_row, length, REVERSE, UNIT)
    v, v_step = head_start(v, head, heads, v_batch, v_head, v_row, length, REVERSE, UNIT)
    h, h_step = head_start(h, head, heads, h_batch, h_head, h_row, length, REVERSE, UNIT)
    v += block * CB
    h += block * CB
    offset = head.to(gl.int64) * length
    gate += offset
    maximum += offset
    stabiliser += offset
    normaliser += offset
    border += head * (gl.cdiv(length, TILE) + 1)

    queries_a = gl.allocate_shared_memory(DTYPE, [2, TILE, KA], shared_a)
    keys_a = gl.allocate_shared_memory(DTYPE, [2, TILE, KA], shared_a)
    values = gl.allocate_shared_memory(DTYPE, [2, TILE, CA], shared_v)
    weighted = gl.allocate_shared_memory(DTYPE, [TILE, CA], shared_v)
    before_a = gl.allocate_shared_memory(DTYPE, [CA, KA], gl.NVMMASharedLayout.get_default_for([CA, KA], DTYPE))
    queries_b = queries_a
    keys_b = keys_a
    before_b = before_a
    if KB > 0:
        queries_b = gl.allocate_shared_memory(DTYPE, [2, TILE, WB], shared_b)
        keys_b = gl.allocate_shared_memory(DTYPE, [2, TILE, WB], shared_b)
        before_b = gl.allocate_shared_memory(DTYPE, [CA, WB], gl.NVMMASharedLayout.get_default_for([CA, WB], DTYPE))
    gates = gl.allocate_shared_memory(gl.float32, [2, TILE], numbers)
    maxima = gl.allocate_shared_memory(gl.float32, [2, TILE], numbers)
    levels = gl.allocate_shared_memory(gl.float32, [2, TILE], numbers)

    row = gl.arange(0, TILE, layout=of_rows)
    key = gl.arange(0, TILE, layout=gl.SliceLayout(0, s_layout))
    column = gl.arange(0, CA, layout=gl.SliceLayout(0, h_layout))
    out_row = gl.arange(0, TILE, layout=gl.SliceLayout(1, v_layout))
    out_column = gl.arange(0, CA, layout=gl.SliceLayout(0, v_layout))
    no_scores = gl.zeros((TILE, TILE), gl.float32, layout=s_layout)
    no_result = gl.zeros((TILE, CA), gl.float32, layout=h_layout)
    first = part * segment
    state_a = gl.zeros((CA, KA), gl.float32, layout=a_layout)
    state_b = state_a
    if KB > 0:
        state_b = gl.zeros((CA, WB), gl.float32, layout=b_layout)
    if part > 0:
        index = (head * (segments - 1) + part - 1) * SPLIT + block
        state_a = gl.load(state_pointers(segment_states, index, CA, DH, 0, a_layout, KA)).to(gl.float32)
        if KB > 0:
            state_b = gl.load(state_pointers(segment_states, index, CA, DH, KA, b_layout, WB)).to(gl.float32)

    copy_rows(queries_a.index(0), q, q_step, first, length, KA)
    if KB > 0:
        copy_rows(queries_b.index(0), q + KA, q_step, first, length, KB)
    copy_keys_and_values(
        keys_a.index(0), keys_b.index(0), values.index(0), gates.index(0), k, k_step, v, v_step, gate, first, length,
        KA, KB, CB,
    )  # fmt: skip
    copy_numbers(maxima.index(0), maximum, first, length)
    copy_numbers(levels.index(0), stabiliser, first, length)
    async_copy.commit_group()
    after = gl.load(border + first // TILE)
    now = 0
    for start in range(first, gl.minimum(first + segment, length), TILE):
        ahead = 1 - now
        before = after
        after = gl.load(border + start // TILE + 1)
        change = (before - after).to(gl.float32)
        before_a.store(state_a.to(DTYPE))
        if KB > 0:
            before_b.store(state_b.to(DTYPE))
        if KEEP:  # noqa: SIM102, as one of the two is a constant
            if start // TILE % PER_CHUNK == 0:
                index = head * chunks + start // TILE // PER_CHUNK
                store_chunk_state(states, state_normalisers, index, state_a, block, 0, DH, CB, a_layout)
                if KB > 0:
                    store_chunk_state(states, state_normalisers, index, state_b, block, KA, DH, CB, b_layout)
        keep = clamped_exp(change)
        state_a = state_a * keep
        if KB > 0:
            state_b = state_b * keep
        async_copy.wait_group(0)
        write_weighted(weighted, values.index(now), gates.index(now), CB, v_layout)
        fence_async_shared()
        scores = warpgroup_mma(
            queries_a.index(now), keys_a.index(now).permute((1, 0)), no_scores, use_acc=False, is_async=True
        )
        if KB > 0:
            scores = warpgroup_mma(queries_b.index(now), keys_b.index(now).permute((1, 0)), scores, is_async=True)
        result = warpgroup_mma(queries_a.index(now), before_a.permute((1, 0)), no_result, use_acc=False, is_async=True)
        if KB > 0:
            result = warpgroup_mma(queries_b.index(now), before_b.permute((1, 0)), result, is_async=True)
        state_a, state_b = add_tile(state_a, state_b, weighted, keys_a.index(now), keys_b.index(now), KB)

        copy_rows(queries_a.index(ahead), q, q_step, start + TILE, length, KA)
        if KB > 0:
            copy_rows(queries_b.index(ahead), q + KA, q_step, start + TILE, length, KB)
        copy_keys_and_values(
            keys_a.index(ahead), keys_b.index(ahead), values.index(ahead), gates.index(ahead), k, k_step, v, v_step,
            gate, start + TILE, length, KA, KB, CB,
        )  # fmt: skip
        copy_numbers(maxima.index(ahead), maximum, start + TILE, length)
        copy_numbers(levels.index(ahead), stabiliser, start + TILE, length)
        async_copy.commit_group()

        highest = maxima.index(now).load(of_rows)
        own = gates.index(now).load(gl.SliceLayout(0, s_layout)) * LOG2_E
        level = levels.index(now).load(of_rows)
        scores = warpgroup_mma_wait(2 * STEPS, deps=[scores])
        weight = gl.exp2(own[None, :] - (highest * LOG2_E)[:, None])
        scores = gl.where(key[None, :] <= row[:, None], scores * weight, 0.0)
        sums = gl.sum(scores, 1)
        factor = gl.convert_layout(clamped_exp(change - highest), of_h)
        operand = gl.convert_layout(scores.to(DTYPE), gl.DotOperandLayout(0, h_layout, 2))
        result = warpgroup_mma_wait(STEPS, deps=[result])
        result = result * factor[:, None]
        sums += gl.convert_layout(gl.sum(gl.where((column == CB)[None, :], result, 0.0), 1), of_rows)
        result = warpgroup_mma(operand, values.index(now), result, is_async=True)
        sums = sums * scale
        over = 1.0 / (gl.maximum(gl.abs(sums), gl.exp2(gl.minimum(-level, LARGEST_EXPONENT) * LOG2_E)) + eps)
        over = gl.where(-level > LARGEST_EXPONENT, 0.0, over)
        known = start + row < length
        gl.store(normaliser + start + row, sums if KEEP else sums * over, mask=known & (block == 0))
        over = gl.convert_layout(over * scale, of_h)
        result = warpgroup_mma_wait(0, deps=[result])
        state_a = warpgroup_mma_wait(0, deps=[state_a])
        if KB > 0:
            state_b = warpgroup_mma_wait(0, deps=[state_b])
        operand = warpgroup_mma_wait(0, deps=[operand])
        made = gl.convert_layout((result * over[:, None]).to(DTYPE), v_layout)
        mask = (start + out_row < length)[:, None] & (out_column < CB)[None, :]
        gl.store(h + (start + out_row)[:, None] * h_step + out_column[None, :], made, mask=mask)
        now = ahead
    async_copy.wait_group(0)
