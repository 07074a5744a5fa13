"""Hand-overs between warps: named barriers, and the turns of the consumers at the tensor cores."""

from flashtile.kernels.hopper.compat import gl, gluon, mbarrier
from flashtile.kernels.hopper.spec import turn

BARRIER = gl.constexpr(mbarrier.MBarrierLayout())


@gluon.jit
def barriers(SLOTS: gl.constexpr, ARRIVALS: gl.constexpr):
    """SLOTS mbarriers of ARRIVALS arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    for i in gl.static_range(SLOTS):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def named_wait(i, THREADS: gl.constexpr):
    """Wait at named barrier i until THREADS threads have arrived or wait there."""
    gl.inline_asm_elementwise(
        f"bar.sync $1, {THREADS}; mov.u32 $0, 0;", "=r,r", [i], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def named_arrive(i, THREADS: gl.constexpr):
    """Count this thread at named barrier i without waiting."""
    gl.inline_asm_elementwise(
        f"bar.arrive $1, {THREADS}; mov.u32 $0, 0;", "=r,r", [i], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def take_turn(W: gl.constexpr, C: gl.constexpr):
    """Wait until consumer W may issue its products."""
    if C.consumers > 1:
        named_wait(turn(C) + W, 256)


@gluon.jit
def pass_turn(W: gl.constexpr, C: gl.constexpr):
    """Let the next consumer issue its products."""
    if C.consumers > 1:
        named_arrive(turn(C) + (W + 1) % C.consumers, 256)


@gluon.jit
def wait_full(bars, count, SLOTS: gl.constexpr, pred=True):
    """Wait until use number `count` of a ring of SLOTS barriers has been filled."""
    mbarrier.wait(bars.index(count % SLOTS), (count // SLOTS) & 1, pred=pred)
