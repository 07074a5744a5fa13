"""The 2x rule: a kernel may err at most twice as much as plain PyTorch in the same dtype, plus one ulp."""

import torch
from torch import Tensor


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of `dtype` at the largest magnitude in `x` (fp64, 0-d)."""
    top = x.abs().max() if x.numel() else x.new_zeros(())
    return top.double().clamp_min(torch.finfo(dtype).tiny) * torch.finfo(dtype).eps


def assert_close(got: Tensor, oracle: Tensor, peer: Tensor, name: str = "result") -> None:
    """Compare `got` with `oracle` (fp32 or fp64), allowing twice the error of `peer` plus one ulp of `got`'s dtype.

    `peer` is plain PyTorch computing the same thing in the dtypes of `got`. NaN and infinities must match in place.
    """
    assert got.shape == oracle.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(oracle.shape)}"
    got64, oracle64, peer64 = (t.detach().cpu().double() for t in (got, oracle, peer))
    finite = torch.isfinite(oracle64)
    same_specials = torch.equal(got64[~finite].nan_to_num(7e300), oracle64[~finite].nan_to_num(7e300))
    assert same_specials, f"{name}: infinities or NaN differ from the oracle's"
    assert torch.isfinite(got64[finite]).all(), (
        f"{name}: {int((~torch.isfinite(got64[finite])).sum())} values not finite"
    )
    if not finite.any():
        return
    error = (got64 - oracle64)[finite].abs().max()
    peer_error = (peer64 - oracle64)[finite].abs().nan_to_num(posinf=0.0).max()
    allowed = 2 * peer_error + ulp(oracle64[finite], got.dtype)
    assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e} (plain PyTorch errs by {peer_error:.3e})"
