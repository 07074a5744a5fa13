"""The smallest warp-specialised kernel, run under compute-sanitizer: what racecheck says of it is said of Triton's
dispatch of warps, not of our kernels (benchmarks/gpu.sh).

    compute-sanitizer --tool racecheck python tests/gpu/dispatch.py
"""

import torch

from flashtile.kernels.hopper.compat import gl, gluon


@gluon.jit
def store(ptr, role):  # type: ignore[no-untyped-def]
    """Say that a role ran."""
    gl.store(ptr + role, role + 1)


@gluon.jit
def dispatch_kernel(ptr):  # type: ignore[no-untyped-def]
    """Two roles that share nothing."""
    gl.warp_specialize([(store, (ptr, 0)), (store, (ptr, 1))], [1], [24])


if __name__ == "__main__":
    ran = torch.zeros(2, dtype=torch.int32, device="cuda")
    dispatch_kernel[(1,)](ran, num_warps=4, maxnreg=128)
    assert ran.tolist() == [1, 2], ran
