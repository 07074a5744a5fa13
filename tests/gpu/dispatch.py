"""Small warp-specialised kernels to run under compute-sanitizer: what racecheck says of them is said of the dispatch of
warps by Triton, not of our kernels (benchmarks/gpu.sh).

    compute-sanitizer --tool racecheck python tests/gpu/dispatch.py
"""

import sys

import torch

from flashtile.kernels.hopper.compat import gl, gluon, mbarrier


@gluon.jit
def store(ptr, role):  # type: ignore[no-untyped-def]
    """Say that a role ran."""
    gl.store(ptr + role, role + 1)


@gluon.jit
def two_roles(ptr):  # type: ignore[no-untyped-def]
    """Two roles that share nothing."""
    gl.warp_specialize([(store, (ptr, 0)), (store, (ptr, 1))], [1], [24])


@gluon.jit
def four_roles(ptr):  # type: ignore[no-untyped-def]
    """As many roles as attention has."""
    gl.warp_specialize(
        [(store, (ptr, 0)), (store, (ptr, 1)), (store, (ptr, 2)), (store, (ptr, 3))], [4, 1, 1], [232, 40, 40]
    )


@gluon.jit
def produce(ptr, bars):  # type: ignore[no-untyped-def]
    """Arrive, late."""
    for i in range(0, 100):
        gl.store(ptr + 1, i + 1)
    mbarrier.arrive(bars.index(0), count=1)


@gluon.jit
def consume(ptr, bars):  # type: ignore[no-untyped-def]
    """Wait for the other role."""
    mbarrier.wait(bars.index(0), 0)
    gl.store(ptr, 1)


@gluon.jit
def handover(ptr):  # type: ignore[no-untyped-def]
    """Two roles that meet at an mbarrier."""
    bars = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=1)
    gl.warp_specialize([(consume, (ptr, bars)), (produce, (ptr, bars))], [1], [24])


if __name__ == "__main__":
    ran = torch.zeros(8, dtype=torch.int32, device="cuda")
    kernels = {"two": two_roles, "four": four_roles, "handover": handover}
    for name in sys.argv[1:] or kernels:
        kernels[name][(4,)](ran, num_warps=4, maxnreg=168 if name == "four" else 128)
        torch.cuda.synchronize()
        print(name, ran.tolist())
