"""Grouped matrix products for Hopper: a persistent kernel with TMA, wgmma and specialised warps, behind the launcher of
the portable kernel (kernels/gemm.py), which takes over where TMA cannot express the strides.

A tile is 64 rows for each consumer times block_n columns. One persistent CTA per SM:
  consumer w (4 warps)   rows 64 w .. 64 w + 63 of the tile; consumer 0 is Gluon's default partition
  loader (1 warp)        walks the segments to the tiles of its CTA, and fetches x and the weight by TMA, stages ahead

Matrices are seen as two-dimensional: batch i, or weight i, begins at row i * step. Boxes may reach into the next
segment's rows of x or the next weight's columns: those products are not stored.

Barriers (mbarriers):
  full[stage]        loader (bytes landed)                         -> consumers
  empty[stage]       one arrival per consumer, its products done   -> loader
  tile_full[slot]    loader published the next tile                -> consumers
  tile_empty[slot]   one arrival per consumer, has read the tile   -> loader
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from flashtile.config import GemmConfig, num_sms
from flashtile.kernels.hopper.barriers import barriers, wait_full
from flashtile.kernels.hopper.compat import (
    TensorDescriptor,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from flashtile.testing.compile import CompileCase

ROWS = gl.constexpr(64)  # of a consumer: one wgmma
PART = gl.constexpr(64)  # columns of 16-bit values in 128 bytes, one swizzled row of shared memory
RING = gl.constexpr(4)  # tiles that the loader may hand over ahead
WARP = gl.constexpr(32)
LANES = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))  # of the loader: one value per lane
# Fields of a tile: first row and column in the output; rows of the segment from there on; steps of the product, -1
# after the last tile
ROW, COL, LEFT, STEPS = (gl.constexpr(i) for i in range(4))


@dataclass(frozen=True)
class Spec:
    """A kernel variant. ragged: segments are given by offsets; indices: and their weights by index."""

    consumers: int
    block_n: int
    stages: int
    group_m: int
    ragged: bool
    indices: bool
    column_major: bool
    beta: bool
    x_scale: bool
    weight_scale: bool
    slots: int  # buffers of a consumer on the way to global memory: one or two for the pieces of a tile in turn


@gluon.constexpr_function
def block_k(dtype):
    """Columns of x in a step: 128 bytes."""
    return 1024 // dtype.primitive_bitwidth


@gluon.constexpr_function
def shared_layout(dtype):
    """Rows of 128 bytes: what TMA writes and wgmma reads."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=dtype.primitive_bitwidth, rank=2)


@gluon.constexpr_function
def mma_layout(columns, dtype):
    """Registers of a [64, columns] fp32 accumulator of one consumer."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 256 // dtype.primitive_bitwidth]
    )


@gluon.jit
def segment_begin(indptr_ptr, i, num_segments, num_rows):
    """First row of segment i, where segments 0 and num_segments + 1 are the rows before and after all others."""
    inner = (i >= 1) & (i <= num_segments + 1)
    row = gl.load(indptr_ptr + i - 1, mask=inner, other=0).to(gl.int32)
    return gl.where(i > num_segments + 1, num_rows, row)


@gluon.jit
def field(ring, count, F: gl.constexpr):
    """A field of tile number `count`, in a consumer."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(ring.index(count % RING).slice(F, 1).load(ONE), 0)


@gluon.jit
def publish(ring, bars, count, row, col, left, steps):
    """Hand over tile number `count` of this CTA."""
    full, empty, tile_full, tile_empty = bars
    lane = gl.arange(0, WARP, layout=LANES)
    item = gl.where(lane == ROW, row, gl.where(lane == COL, col, gl.where(lane == LEFT, left, steps)))
    mbarrier.wait(tile_empty.index(count % RING), ((count // RING) & 1) ^ 1)
    ring.index(count % RING).store(item)
    mbarrier.arrive(tile_full.index(count % RING), count=1)


@gluon.jit
def loader(smem, bars, x_desc, weight_desc, indptr_ptr, indices_ptr, sizes, C: gl.constexpr):
    """The loader's role; see the module's docstring."""
    x_bufs, weight_bufs, out_bufs, ring = smem
    full, empty, tile_full, tile_empty = bars
    num_rows, num_segments, d_in, d_out, x_step, weight_step, out_step = sizes
    BLOCK_M: gl.constexpr = C.consumers * ROWS
    BLOCK_K: gl.constexpr = block_k(x_bufs.dtype)
    BYTES: gl.constexpr = (BLOCK_M + C.block_n) * 128
    CONSUMERS: gl.constexpr = C.consumers
    PARTS: gl.constexpr = C.block_n // PART

    tiles_n = (d_out + C.block_n - 1) // C.block_n
    last = num_segments - 1
    begin = gl.to_tensor(0)
    end = num_rows
    if C.ragged:
        last = num_segments + 1
        end = segment_begin(indptr_ptr, 1, num_segments, num_rows)
    segment = gl.to_tensor(0)
    first = gl.to_tensor(0)  # tile of the segment
    tiles_m = (end - begin + BLOCK_M - 1) // BLOCK_M
    tile = gl.program_id(0)
    count = gl.to_tensor(0)  # tiles handed over
    it = gl.to_tensor(0)  # steps fetched
    while segment <= last:
        while (segment <= last) & (tile >= first + tiles_m * tiles_n):
            first += tiles_m * tiles_n
            segment += 1
            if C.ragged:
                begin = end
                end = segment_begin(indptr_ptr, segment + 1, num_segments, num_rows)
                tiles_m = (gl.maximum(end - begin, 0) + BLOCK_M - 1) // BLOCK_M
        if segment <= last:
            own = tile - first
            group = own // (C.group_m * tiles_n)
            size = gl.minimum(tiles_m - group * C.group_m, C.group_m)
            rest = own - group * (C.group_m * tiles_n)
            row = begin + (group * C.group_m + rest % size) * BLOCK_M
            col = rest // size * C.block_n
            steps = (d_in + BLOCK_K - 1) // BLOCK_K
            weight = segment
            batch = segment
            if C.ragged:
                inside = (segment >= 1) & (segment < last)
                steps = gl.where(inside, steps, 0)
                weight = gl.where(inside, segment - 1, 0)
                batch = gl.to_tensor(0)
                if C.indices:
                    weight = gl.load(indices_ptr + weight, mask=inside, other=0).to(gl.int32)
            publish(ring, bars, count, batch * out_step + row, col, end - row, steps)
            count += 1
            x_row = batch * x_step + row
            weight_row = weight * weight_step
            for k in range(steps):
                stage = it % C.stages
                bar = full.index(stage)
                mbarrier.wait(empty.index(stage), ((it // C.stages) & 1) ^ 1)
                mbarrier.expect(bar, BYTES)
                for w in gl.static_range(CONSUMERS):
                    tma_load(x_desc, [x_row + w * ROWS, k * BLOCK_K], bar, x_bufs.index(stage * C.consumers + w))
                if C.column_major:
                    tma_load(weight_desc, [weight_row + col, k * BLOCK_K], bar, weight_bufs.index(stage))
                else:
                    for p in gl.static_range(PARTS):
                        tma_load(
                            weight_desc, [weight_row + k * BLOCK_K, col + p * PART], bar,
                            weight_bufs.index(stage).slice(p * PART, PART, dim=1),
                        )  # fmt: skip
                it += 1
            tile += gl.num_programs(0)
    publish(ring, bars, count, 0, 0, 0, -1)


@gluon.jit
def columns(x):
    """Left and right half of a tile's columns; registers are renamed, nothing moves."""
    HALF: gl.constexpr = x.shape[1] // 2
    L: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, x.type.layout.instr_shape[2]]
    )
    a, b = gl.split(gl.permute(gl.reshape(x, [ROWS, 2, HALF]), (0, 2, 1)))
    return gl.convert_layout(a, L, assert_trivial=True), gl.convert_layout(b, L, assert_trivial=True)


@gluon.jit
def parts(x):
    """A tile in pieces of PART columns, or itself if it has no more."""
    if x.shape[1] <= PART:
        out = (x,)
    else:
        a, b = columns(x)
        out = parts(a) + parts(b)
    return out


@gluon.jit
def store_tile(acc, row, col, left, out, factor, beta, d_out, bufs, W: gl.constexpr, C: gl.constexpr):
    """Write consumer W's rows: whole blocks by TMA, those that end within it one by one."""
    desc, out_ptr, stride_out = out
    dtype: gl.constexpr = bufs.dtype
    pieces = parts(acc)
    WIDTH: gl.constexpr = pieces[0].shape[1]
    whole = left >= ROWS
    if C.beta:
        whole = left < 0
    if whole:
        for p in gl.static_range(len(pieces)):
            buf = bufs.index(W * C.slots + p % C.slots)
            tma_store_wait(C.slots - 1)
            buf.store((pieces[p] * factor).to(dtype))
            fence_async_shared()
            tma_store(desc, [row, col + p * WIDTH], buf)
    else:
        L: gl.constexpr = pieces[0].type.layout
        rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
        ptrs = out_ptr + (row + rows).to(gl.int64)[:, None] * stride_out
        for p in gl.static_range(len(pieces)):
            cols = col + p * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, L))
            keep = (rows < left)[:, None] & (cols < d_out)[None, :]
            y = pieces[p] * factor
            if C.beta:
                y += beta * gl.load(ptrs + cols[None, :], mask=keep, other=0.0).to(gl.float32)
            gl.store(ptrs + cols[None, :], y.to(dtype), mask=keep)


@gluon.jit
def consumer(W: gl.constexpr, smem, bars, out, factors, d_out, C: gl.constexpr):
    """The role of consumer W: the products of its rows, one tile after the other."""
    x_bufs, weight_bufs, out_bufs, ring = smem
    full, empty, tile_full, tile_empty = bars
    x_scale_ptr, weight_scale_ptr, factor, beta = factors
    if C.x_scale:
        factor *= gl.load(x_scale_ptr)
    if C.weight_scale:
        factor *= gl.load(weight_scale_ptr)
    BLOCK_N: gl.constexpr = C.block_n
    L: gl.constexpr = mma_layout(BLOCK_N, x_bufs.dtype)
    it = gl.to_tensor(0)  # steps finished
    count = gl.to_tensor(0)  # tiles taken
    steps = gl.to_tensor(0)
    while steps >= 0:
        wait_full(tile_full, count, RING)
        row = field(ring, count, ROW) + W * ROWS
        col = field(ring, count, COL)
        left = field(ring, count, LEFT) - W * ROWS
        steps = field(ring, count, STEPS)
        mbarrier.arrive(tile_empty.index(count % RING), count=1)
        count += 1
        if steps >= 0:
            acc = gl.zeros([ROWS, BLOCK_N], gl.float32, L)
            for k in range(steps):
                stage = it % C.stages
                wait_full(full, it, C.stages)
                weight = weight_bufs.index(stage)
                if C.column_major:
                    weight = weight.permute((1, 0))
                token = warpgroup_mma(x_bufs.index(stage * C.consumers + W), weight, acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=[token])  # the previous step is complete, this one runs
                mbarrier.arrive(empty.index((it + C.stages - 1) % C.stages), count=1, pred=k > 0)
                it += 1
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index((it + C.stages - 1) % C.stages), count=1, pred=steps > 0)
            store_tile(acc, row, col, left, out, factor, beta, d_out, out_bufs, W, C)
    tma_store_wait(0)


@gluon.jit(do_not_specialize=["num_rows", "num_segments", "d_out", "x_step", "weight_step", "out_step"])
def grouped_gemm_kernel(
    x_desc, weight_desc, out_desc, out_ptr, indptr_ptr, indices_ptr, x_scale_ptr, weight_scale_ptr,
    num_rows, num_segments, d_in, d_out, x_step, weight_step, out_step, stride_out, alpha, beta, C: gl.constexpr,
):  # fmt: skip
    """One persistent CTA; see the module's docstring. Steps: rows from one batch entry, or weight, to the next."""
    dtype: gl.constexpr = x_desc.dtype
    out_dtype: gl.constexpr = out_desc.dtype
    K: gl.constexpr = block_k(dtype)
    WEIGHT: gl.constexpr = [C.stages, C.block_n, K] if C.column_major else [C.stages, K, C.block_n]
    x_bufs = gl.allocate_shared_memory(dtype, [C.stages * C.consumers, ROWS, K], shared_layout(dtype))
    weight_bufs = gl.allocate_shared_memory(weight_desc.dtype, WEIGHT, shared_layout(weight_desc.dtype))
    out_bufs = gl.allocate_shared_memory(
        out_dtype, [C.consumers * C.slots, ROWS, out_desc.block_type.shape[1]], shared_layout(out_dtype)
    )
    ring = gl.allocate_shared_memory(gl.int32, [RING, WARP], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    bars = (barriers(C.stages, 1), barriers(C.stages, C.consumers), barriers(RING, 1), barriers(RING, C.consumers))
    smem = (x_bufs, weight_bufs, out_bufs, ring)
    out = (out_desc, out_ptr, stride_out)
    factors = (x_scale_ptr, weight_scale_ptr, alpha, beta)
    sizes = (num_rows, num_segments, d_in, d_out, x_step, weight_step, out_step)
    if C.consumers == 1:
        gl.warp_specialize(
            [
                (consumer, (0, smem, bars, out, factors, d_out, C)),
                (loader, (smem, bars, x_desc, weight_desc, indptr_ptr, indices_ptr, sizes, C)),
            ],
            [1],
            [96],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (0, smem, bars, out, factors, d_out, C)),
                (consumer, (1, smem, bars, out, factors, d_out, C)),
                (loader, (smem, bars, x_desc, weight_desc, indptr_ptr, indices_ptr, sizes, C)),
            ],
            [4, 1],
            [240, 24],
        )


REGISTERS = 168  # per thread at launch, which warp groups share out anew: 240 for a consumer, the rest for the loader


def fits(out: Tensor, x: Tensor, weights: Tensor) -> bool:
    """Whether the kernel can take these tensors: TMA wants rows and starts that are multiples of 16 bytes apart."""
    column_major = weights.stride(2) != 1
    stored = weights.transpose(1, 2) if column_major else weights
    sizes = x.shape[2] > 0 and (column_major or (x.element_size() == 2 and x.shape[2] % 64 == 0))
    return out.element_size() == 2 and x.element_size() <= 2 and sizes and all(_is_matrix(t) for t in (out, x, stored))


def launch(
    config: GemmConfig,
    out: Tensor,
    x: Tensor,
    weights: Tensor,
    seg_indptr: Tensor | None,
    weight_indices: Tensor | None,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    alpha: float,
    beta: float,
    sm_limit: int,
) -> None:
    """`grouped_gemm` of kernels/gemm.py with a given configuration, for tensors that `fits` accepts."""
    batches, num_rows, d_in = x.shape
    d_out = out.shape[2]
    segments = batches if seg_indptr is None else seg_indptr.shape[0] - 1
    column_major = weights.stride(2) != 1
    stored = weights.transpose(1, 2) if column_major else weights
    spec = Spec(
        config.block_m // ROWS.value, config.block_n, config.num_stages, config.group_m, seg_indptr is not None,
        weight_indices is not None, column_major, beta != 0, x_scale is not None, weight_scale is not None,
        slots=min(2, config.block_n // PART.value),
    )  # fmt: skip
    columns = 128 // x.element_size()
    grid = min(config.max_tiles(segments, batches * num_rows, d_out), sm_limit or num_sms(out.device))
    grouped_gemm_kernel[(grid,)](
        _descriptor(x, ROWS.value, columns),
        _descriptor(stored, config.block_n, columns) if column_major else _descriptor(stored, columns, PART.value),
        _descriptor(out, ROWS.value, PART.value),
        out, *(x if t is None else t for t in (seg_indptr, weight_indices, x_scale, weight_scale)),
        num_rows, segments, d_in, d_out, *(_step(t) for t in (x, stored, out)), out.stride(1), alpha, beta, C=spec,
        num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip


def _step(x: Tensor) -> int:
    """Rows from one entry of x [n, rows, columns] to the next, if all of them are seen as one matrix."""
    return x.stride(0) // x.stride(1) if x.shape[0] > 1 else 0


def _is_matrix(x: Tensor) -> bool:
    """Whether x [n, rows, columns] can be seen as one matrix by TMA."""
    row_bytes = x.stride(1) * x.element_size()
    together = x.shape[0] == 1 or (x.stride(0) % x.stride(1) == 0 and x.stride(0) > 0) if x.stride(1) else False
    return together and row_bytes % 16 == 0 and x.data_ptr() % 16 == 0 and x.stride(1) >= x.shape[2]


def _descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x [n, rows, columns] as a matrix, fetched or stored in boxes of [rows, columns]."""
    shape = [(x.shape[0] - 1) * _step(x) + x.shape[1], x.shape[2]]
    return TensorDescriptor(x, shape, [x.stride(1), 1], [rows, columns], _layout(x.element_size()))


@cache
def _layout(itemsize: int) -> gl.NVMMASharedLayout:
    """`shared_layout` of elements of so many bytes."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * itemsize, rank=2)


def compile_cases() -> Iterator[CompileCase]:
    """Tiles of both widths and majors; the fp8 form with scales."""
    out_layout = shared_layout(gl.float16)
    for consumers, block_n, stages, dtype, column_major, ragged in (
        (2, 256, 4, gl.bfloat16, True, True),
        (2, 256, 4, gl.bfloat16, False, True),
        (2, 128, 6, gl.float16, True, False),
        (1, 256, 5, gl.bfloat16, True, True),
        (1, 128, 8, gl.bfloat16, True, True),
        (1, 64, 10, gl.bfloat16, False, True),
        (1, 64, 10, gl.bfloat16, True, True),
        (2, 256, 4, gl.float8e4nv, True, False),
        (2, 256, 4, gl.float8e5, True, False),
    ):
        narrow = dtype.primitive_bitwidth == 8
        spec = Spec(
            consumers,
            block_n,
            stages,
            16,
            ragged,
            ragged,
            column_major,
            not ragged and not narrow,
            narrow,
            narrow,
            min(2, block_n // 64),
        )
        k = block_k(dtype)
        box = [block_n, k] if column_major else [k, PART.value]
        out = "bf16" if narrow else str(dtype)
        signature = dict.fromkeys(grouped_gemm_kernel.arg_names, "i32")
        signature |= {
            "x_desc": f"tensordesc<{dtype}[64, {k}],{shared_layout(dtype)!r}>",
            "weight_desc": f"tensordesc<{dtype}{box},{shared_layout(dtype)!r}>",
            "out_desc": f"tensordesc<{out}[64, {min(64, block_n)}],{out_layout!r}>",
            "out_ptr": f"*{out}",
            "indptr_ptr": "*i64",
            "indices_ptr": "*i64",
            "x_scale_ptr": "*fp32",
            "weight_scale_ptr": "*fp32",
            "alpha": "fp32",
            "beta": "fp32",
        }
        del signature["C"]
        yield CompileCase(
            f"hopper gemm {spec} {dtype}", grouped_gemm_kernel, signature, {"C": spec},
            aligned=("d_in", "stride_out"), maxnreg=REGISTERS, min_capability=90,
        )  # fmt: skip
