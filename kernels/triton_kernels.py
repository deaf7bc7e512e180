"""The four Triton kernels of the gated-LoRA op; `triton_ops` launches them, `aot` compiles them without a GPU.

None of this has been run on a GPU yet: it is checked in Triton's interpreter against `reference` and compiled ahead of
time for sm_80, sm_90 and gfx942.

Letters: T tokens, R the rank columns of all sibling layers side by side, W a width (features of one layer). `traits`
[R] says which trait owns a rank column; gates [T, traits] are read from memory, so a captured CUDA graph replays with
whatever the buffer holds then. Sums are float32, float32 products exact (`ieee`, never tf32), and nothing is added
atomically: the same input gives the same bits.

A trait is closed in a tile of tokens where none of them has its gate open. `shrink` masks the loads of closed columns
and `expand` passes over closed traits; a tile where everything is closed loads nothing and runs no iteration.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gate_tile(gates, traits, rows, row_ok, columns, column_ok, gates_stride_t, gates_stride_e):
    """[BLOCK_T, BLOCK_R] float32: every token's gate for the trait of every column, 0 outside the matrix."""
    trait = tl.load(traits + columns, mask=column_ok, other=0)
    pointers = gates + rows.to(tl.int64)[:, None] * gates_stride_t + trait[None, :] * gates_stride_e
    return tl.load(pointers, mask=row_ok[:, None] & column_ok[None, :], other=0.0).to(tl.float32)


@triton.jit
def open_along(gate, axis: tl.constexpr):
    """1 where some gate along `axis` is not zero (NaN counts as open, so that it shows in the output)."""
    return tl.max((gate != 0.0).to(tl.int32), axis=axis)


@triton.jit
def gated(values, gate):
    """gate ∘ values, with 0 for a closed gate whatever the value."""
    return tl.where(gate != 0.0, values * gate, 0.0)


@triton.jit
def shrink_kernel(
    x,
    a,
    gates,
    traits,
    raw,
    scaled,
    tokens,
    width,
    rank,
    x_stride_t,
    x_stride_w,
    gates_stride_t,
    gates_stride_e,
    SKIP: tl.constexpr,
    STORE_RAW: tl.constexpr,
    STORE_SCALED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """raw [SPLIT, T, R] float32 = x·Aᵀ in SPLIT partial sums over the width; scaled [T, R] = gate ∘ raw (SPLIT 1).

    Grid: (token tiles, column tiles, SPLIT). SKIP: closed columns become 0 instead of being computed.
    """
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    row_ok, column_ok = rows < tokens, columns < rank
    gate = gate_tile(gates, traits, rows, row_ok, columns, column_ok, gates_stride_t, gates_stride_e)

    steps = tl.cdiv(tl.cdiv(width, BLOCK_W), SPLIT)
    begin = split * steps * BLOCK_W
    end = tl.minimum(begin + steps * BLOCK_W, width)
    load_column = column_ok
    if SKIP:
        is_open = open_along(gate, 0)
        load_column = column_ok & (is_open > 0)
        # An empty range, not a branch around the loop: the loop stays one that Triton can pipeline.
        end = tl.where(tl.max(is_open, axis=0) > 0, end, begin)

    x_rows = x + rows.to(tl.int64)[:, None] * x_stride_t
    a_columns = a + columns.to(tl.int64)[None, :] * width
    total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for k in range(begin, end, BLOCK_W):
        features = k + tl.arange(0, BLOCK_W)
        inside = features < end
        x_tile = tl.load(x_rows + features[None, :] * x_stride_w, mask=row_ok[:, None] & inside[None, :], other=0.0)
        a_tile = tl.load(a_columns + features[:, None], mask=load_column[None, :] & inside[:, None], other=0.0)
        total = tl.dot(x_tile, a_tile, total, input_precision="ieee")

    ok = row_ok[:, None] & column_ok[None, :]
    offsets = rows.to(tl.int64)[:, None] * rank + columns[None, :]
    if STORE_RAW:
        tl.store(raw + split.to(tl.int64) * tokens * rank + offsets, total, mask=ok)
    if STORE_SCALED:
        tl.store(scaled + offsets, gated(total, gate).to(scaled.dtype.element_ty), mask=ok)


@triton.jit
def expand_layer(
    s,
    gates,
    starts,
    b,
    residual,
    y,
    tokens,
    rank,
    traits,
    segment,
    segments,
    width,
    tile,
    b_stride_w,
    b_stride_r,
    residual_stride_t,
    gates_stride_t,
    gates_stride_e,
    ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One tile of one layer's output: residual + (gate ∘ S)·Bᵀ over `segments` segments of columns from `segment` on.

    Going trait by trait keeps the masks aligned: with a mask of open columns, B came in 2-byte loads.
    """
    # 64-bit offsets are scalars, those inside the tile 32-bit: per-element 64-bit ones pushed registers to the stack.
    first_row = (tl.program_id(1) * BLOCK_T).to(tl.int64)
    first_feature = (tile * BLOCK_W).to(tl.int64)
    row, feature = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_W)
    row_ok, feature_ok = row < tokens - first_row, feature < width - first_feature
    ok = row_ok[:, None] & feature_ok[None, :]
    s += first_row * rank
    b += first_feature * b_stride_w
    gates += first_row * gates_stride_t
    y += first_row * width + first_feature
    if residual is None:
        total = tl.zeros((BLOCK_T, BLOCK_W), dtype=tl.float32)
    else:
        residual += first_row * residual_stride_t + first_feature
        at = residual + row[:, None] * residual_stride_t + feature[None, :]
        total = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    offset = tl.multiple_of(tl.load(starts + segment), ALIGN)
    for i in range(segment, segment + segments):
        gate_at = gates + row * gates_stride_t + (i % traits) * gates_stride_e
        gate = tl.load(gate_at, mask=row_ok, other=0.0).to(tl.float32)
        if open_along(gate, 0) > 0:
            begin = tl.multiple_of(tl.load(starts + i), ALIGN)
            end = tl.multiple_of(tl.load(starts + i + 1), ALIGN)
            for c in range(begin, end, BLOCK_R):
                columns = tl.multiple_of(c, ALIGN) + tl.arange(0, BLOCK_R)
                column_ok = columns < end
                s_at = s + row[:, None] * rank + columns[None, :]
                s_ok = row_ok[:, None] & column_ok[None, :]
                if SPLIT == 1:
                    s_tile = tl.load(s_at, mask=s_ok, other=0.0)
                else:  # S comes as partial sums: adding them here saves a launch, loading them at once saves waiting
                    parts = tl.arange(0, SPLIT).to(tl.int64) * tokens * rank
                    s_parts = tl.load(parts[:, None, None] + s_at[None, :, :], mask=s_ok[None, :, :], other=0.0)
                    s_tile = gated(tl.sum(s_parts, axis=0), gate[:, None])
                inside = columns - offset
                b_at = b + feature[None, :] * b_stride_w + inside[:, None] * b_stride_r
                b_tile = tl.load(b_at, mask=column_ok[:, None] & feature_ok[None, :], other=0.0)
                total = tl.dot(s_tile.to(b_tile.dtype), b_tile, total, input_precision="ieee")
    tl.store(y + row[:, None] * width + feature[None, :], total.to(y.dtype.element_ty), mask=ok)


@triton.jit
def expand_kernel(
    s,
    gates,
    starts,
    b,
    residuals,
    y,
    widths,
    tokens,
    rank,
    traits,
    segments,
    b_strides_w,
    b_strides_r,
    residual_strides_t,
    gates_stride_t,
    gates_stride_e,
    LAYERS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """y_i [T, W_i] = residual_i + (gate ∘ S_i)·B_iᵀ for every sibling i, in one launch.

    Grid: (output tiles of all layers, token tiles). s: the scaled shrink [T, R] where SPLIT is 1, else the partial
    sums [SPLIT, T, R] of the raw one. starts: where every trait's columns begin, layer by layer, then R; ALIGN divides
    them all. segments: how many of those a layer has (its traits; all of them where one b spans the siblings).
    """
    tile = tl.program_id(0)
    for layer in tl.static_range(LAYERS):
        tiles = tl.cdiv(widths[layer], BLOCK_W)
        if (tile >= 0) & (tile < tiles):
            expand_layer(
                s,
                gates,
                starts,
                b[layer],
                residuals[layer],
                y[layer],
                tokens,
                rank,
                traits,
                layer * segments,
                segments,
                widths[layer],
                tile,
                b_strides_w[layer],
                b_strides_r[layer],
                residual_strides_t[layer],
                gates_stride_t,
                gates_stride_e,
                ALIGN,
                BLOCK_T,
                BLOCK_R,
                BLOCK_W,
                SPLIT,
            )
        tile -= tiles


@triton.jit
def grad_shrunk_layer(
    dy,
    b,
    raw,
    gates,
    traits,
    grad_scaled,
    grad_gates,
    tokens,
    rank,
    layer_rank,
    offset,
    width,
    block,
    gates_stride_t,
    gates_stride_e,
    TRAITS: tl.constexpr,
    SKIP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One tile of dS for one layer."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = block * BLOCK_R + tl.arange(0, BLOCK_R)
    row_ok, column_ok = rows < tokens, columns < layer_rank
    wide_rows = rows.to(tl.int64)
    gate = gate_tile(gates, traits + offset, rows, row_ok, columns, column_ok, gates_stride_t, gates_stride_e)
    end = width
    if SKIP:
        end = tl.where(tl.max(open_along(gate, 0), axis=0) > 0, width, 0)
    total = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for n in range(0, end, BLOCK_W):
        features = n + tl.arange(0, BLOCK_W)
        inside = features < end
        dy_at = dy + wide_rows[:, None] * width + features[None, :]
        dy_tile = tl.load(dy_at, mask=row_ok[:, None] & inside[None, :], other=0.0)
        b_at = b + features.to(tl.int64)[:, None] * layer_rank + columns[None, :]
        b_tile = tl.load(b_at, mask=inside[:, None] & column_ok[None, :], other=0.0)
        total = tl.dot(dy_tile, b_tile, total, input_precision="ieee")
    ok = row_ok[:, None] & column_ok[None, :]
    at = wide_rows[:, None] * rank + offset + columns[None, :]
    tl.store(grad_scaled + at, gated(total, gate).to(grad_scaled.dtype.element_ty), mask=ok)
    if not SKIP:  # the gates want a gradient, closed ones too
        product = total * tl.load(raw + at, mask=ok, other=0.0)
        trait = tl.load(traits + offset + columns, mask=column_ok, other=-1)
        slab = tl.program_id(1).to(tl.int64) * tokens * TRAITS
        for e in tl.static_range(TRAITS):
            part = tl.sum(tl.where((trait == e)[None, :], product, 0.0), axis=1)
            tl.store(grad_gates + slab + wide_rows * TRAITS + e, part, mask=row_ok)


@triton.jit
def grad_shrunk_kernel(
    dy,
    b,
    raw,
    gates,
    traits,
    grad_scaled,
    grad_gates,
    offsets,
    widths,
    tokens,
    rank,
    gates_stride_t,
    gates_stride_e,
    LAYERS: tl.constexpr,
    TRAITS: tl.constexpr,
    SKIP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """dS = dY·B; grad_scaled [T, R] = gate ∘ dS; grad_gates [blocks, T, traits] = Σ over a block's columns of dS ∘ raw.

    Grid: (token tiles, column blocks of all layers). SKIP: the gates need no gradient, so closed columns give 0.
    """
    block = tl.program_id(1)
    for layer in tl.static_range(LAYERS):
        layer_rank = offsets[layer + 1] - offsets[layer]
        blocks = tl.cdiv(layer_rank, BLOCK_R)
        if (block >= 0) & (block < blocks):
            grad_shrunk_layer(
                dy[layer],
                b[layer],
                raw,
                gates,
                traits,
                grad_scaled,
                grad_gates,
                tokens,
                rank,
                layer_rank,
                offsets[layer],
                widths[layer],
                block,
                gates_stride_t,
                gates_stride_e,
                TRAITS,
                SKIP,
                BLOCK_T,
                BLOCK_R,
                BLOCK_W,
            )
        block -= blocks


@triton.jit
def grad_weight_layer(
    s,
    z,
    gates,
    traits,
    out,
    tokens,
    rank,
    layer_rank,
    offset,
    width,
    tile,
    z_stride_t,
    z_stride_w,
    out_stride_r,
    out_stride_w,
    gates_stride_t,
    gates_stride_e,
    SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One tile of one layer's Σ_t S[t, r]·Z[t, w]."""
    blocks = tl.cdiv(layer_rank, BLOCK_R)
    columns = (tile % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    features = (tile // blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
    column_ok, feature_ok = columns < layer_rank, features < width
    split = tl.program_id(1)
    steps = tl.cdiv(tl.cdiv(tokens, BLOCK_T), SPLIT)
    begin = split * steps * BLOCK_T
    end = tl.minimum(begin + steps * BLOCK_T, tokens)
    total = tl.zeros((BLOCK_R, BLOCK_W), dtype=tl.float32)
    for t in range(begin, end, BLOCK_T):
        rows = t + tl.arange(0, BLOCK_T)
        wide_rows = rows.to(tl.int64)
        gate = gate_tile(gates, traits + offset, rows, rows < end, columns, column_ok, gates_stride_t, gates_stride_e)
        # A token without an open gate in this block adds nothing: neither its S nor its Z is loaded.
        load_row = open_along(gate, 1) > 0
        s_at = s + wide_rows[:, None] * rank + offset + columns[None, :]
        s_tile = tl.load(s_at, mask=load_row[:, None] & column_ok[None, :], other=0.0)
        if SCALE:
            s_tile = gated(s_tile, gate)
        z_at = z + wide_rows[:, None] * z_stride_t + features[None, :] * z_stride_w
        z_tile = tl.load(z_at, mask=load_row[:, None] & feature_ok[None, :], other=0.0)
        total = tl.dot(tl.trans(s_tile.to(z_tile.dtype)), z_tile, total, input_precision="ieee")
    at = out + split.to(tl.int64) * layer_rank * width
    at += columns.to(tl.int64)[:, None] * out_stride_r + features.to(tl.int64)[None, :] * out_stride_w
    tl.store(at, total.to(out.dtype.element_ty), mask=column_ok[:, None] & feature_ok[None, :])


@triton.jit
def grad_weight_kernel(
    s,
    z,
    gates,
    traits,
    out,
    offsets,
    widths,
    tokens,
    rank,
    z_strides_t,
    z_strides_w,
    out_strides_r,
    out_strides_w,
    gates_stride_t,
    gates_stride_e,
    LAYERS: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """out_i [SPLIT, …] = Sᵀ·Z_i over SPLIT ranges of tokens: dA from (gate ∘ dS, x), dB from (gate ∘ raw, dY).

    Grid: (tiles of all layers, SPLIT). SCALE: s is the raw shrink and is gated here.
    """
    tile = tl.program_id(0)
    for layer in tl.static_range(LAYERS):
        layer_rank = offsets[layer + 1] - offsets[layer]
        tiles = tl.cdiv(layer_rank, BLOCK_R) * tl.cdiv(widths[layer], BLOCK_W)
        if (tile >= 0) & (tile < tiles):
            grad_weight_layer(
                s,
                z[layer],
                gates,
                traits,
                out[layer],
                tokens,
                rank,
                layer_rank,
                offsets[layer],
                widths[layer],
                tile,
                z_strides_t[layer],
                z_strides_w[layer],
                out_strides_r[layer],
                out_strides_w[layer],
                gates_stride_t,
                gates_stride_e,
                SCALE,
                BLOCK_T,
                BLOCK_R,
                BLOCK_W,
                SPLIT,
            )
        tile -= tiles
