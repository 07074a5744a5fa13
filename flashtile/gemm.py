"""Matrix products around attention: grouped by segment (LoRA, mixtures of experts), and batched fp8. Defined by
reference/gemm.py.

Sums are fp32 (fp64 for fp32 inputs on a GPU); results are rounded once. Inference only: no gradients."""

import torch
from torch import Tensor

from flashtile import checks, library
from flashtile.config import capability

BACKENDS = ("auto", "sm80", "sm90")
# The vendor libraries between which FlashInfer's bmm_fp8 chooses: here all of them name the same kernel.
FP8_BACKENDS = ("auto", "cublas", "cudnn", "cutlass")

# out [batches, rows, d_out] = alpha x [batches, rows, d_in] weights [num_weights, d_in, d_out] + beta out. With
# seg_indptr [segments + 1], rows of the only batch entry are segments with the weights weight_indices [segments], by
# default one each; without it, every batch entry has its weight. num_sms: how many SMs may be used, 0: all.
_grouped_gemm = library.launcher(
    "gemm",
    "grouped_gemm(Tensor(a!) out, Tensor x, Tensor weights, Tensor? seg_indptr, Tensor? weight_indices,"
    " Tensor? x_scale, Tensor? weight_scale, float alpha, float beta, int num_sms, str backend) -> ()",
)


def determine_gemm_backend(device: torch.device) -> str:
    """The family of `SegmentGEMMWrapper` that backend="auto" means on a CUDA device: "sm90" on Hopper, else "sm80".

    Raises:
        ValueError: no CUDA device.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"device: expected a CUDA device, got {device}; on the CPU there is nothing to choose")
    return "sm90" if capability(device)[0] == 9 else "sm80"


class SegmentGEMMWrapper:
    """Products of row segments of one matrix with a weight each: LoRA adapters of the requests of a batch, or experts.

    Args:
        float_workspace_buffer: any tensor; it tells the device. The products need no scratch memory.
        backend: "auto"; "sm80": the portable family; "sm90": the Hopper family where it pays and strides allow, on a
            GPU of compute capability 9.x. On the CPU all three mean the CPU family.

    Raises:
        ValueError: an unknown backend, or "sm90" on another GPU.
    """

    def __init__(self, float_workspace_buffer: Tensor, backend: str = "auto") -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
        self.reset_workspace_buffer(float_workspace_buffer)
        if self.device.type == "cuda":
            found = determine_gemm_backend(self.device)
            if backend == "sm90" and found != "sm90":
                raise ValueError(
                    f"backend: sm90 needs compute capability 9.x, {self.device} has {capability(self.device)}; "
                    "use 'auto'"
                )
            backend = found if backend == "auto" else backend
        self._backend = backend

    def reset_workspace_buffer(
        self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor | None = None
    ) -> None:
        """Take another device from another buffer; int_workspace_buffer, if given, must be on the same device."""
        self.device = checks.check_tensor("float_workspace_buffer", float_workspace_buffer).device
        if int_workspace_buffer is not None:
            checks.check_device("int_workspace_buffer", int_workspace_buffer, self.device)

    def run(
        self,
        x: Tensor,
        weights: Tensor,
        batch_size: int,
        weight_column_major: bool,
        out: Tensor | None = None,
        seg_lens: Tensor | None = None,
        seg_indptr: Tensor | None = None,
        weight_indices: Tensor | None = None,
    ) -> Tensor:
        """Multiply each segment of x with its weight. Launches only: no host sync, safe to capture.

        Args:
            x: [num_tokens, d_in], fp16, bf16 or fp32; rows may be strided.
            weights: [num_weights, d_out, d_in] if weight_column_major, else [num_weights, d_in, d_out]; dtype of x; all
                but the last dimension may be strided.
            batch_size: number of segments.
            out: where to write, [num_tokens, d_out], dtype of x. Default: a new tensor.
            seg_lens: [batch_size] int32 or int64, rows of each segment, the first of which starts at row 0. A segment
                may be empty.
            seg_indptr: [batch_size + 1] int32 or int64, offsets of the segments in rows of x; counts if both are given.
            weight_indices: [batch_size] int32 or int64, the weight of each segment. Default: segment i has weights[i].

        Returns:
            out. Rows before the first segment and after the last one are 0.

        Raises:
            ValueError: a shape, dtype, device or stride that does not fit; neither seg_lens nor seg_indptr; on the host
                also offsets that decrease or leave x, and indices of no weight.
        """
        checks.check_device("x", checks.check_tensor("x", x), self.device)
        checks.check_shape("x", x, ("num_tokens", "d_in"))
        checks.check_dtype("x", x, checks.FLOAT_DTYPES)
        checks.check_inner_contiguous("x", x)
        wanted = ("num_weights", "d_out", x.shape[1]) if weight_column_major else ("num_weights", x.shape[1], "d_out")
        checks.check_shape("weights", weights, wanted)
        checks.check_same_dtype("weights", weights, "x", x)
        checks.check_device("weights", weights, x.device)
        checks.check_inner_contiguous("weights", weights)
        indptr = _segment_offsets(seg_lens, seg_indptr, batch_size, x)
        if weight_indices is not None:
            checks.check_shape("weight_indices", weight_indices, (batch_size,))
            checks.check_between("weight_indices", weight_indices, 0, weights.shape[0], "segment")
            weight_indices = checks.index_tensor("weight_indices", weight_indices, x.device)
        elif weights.shape[0] < batch_size:
            raise ValueError(
                f"weights: expected one for each of the {batch_size} segments, got {weights.shape[0]}; "
                "give weight_indices if segments share weights"
            )
        matrices = weights.transpose(1, 2) if weight_column_major else weights
        out = _output(out, (x.shape[0], matrices.shape[2]), x.dtype, x.device)
        _grouped_gemm(out[None], x[None], matrices, indptr, weight_indices, None, None, 1.0, 0.0, 0, self._backend)
        return out

    forward = run


def bmm_fp8(
    A: Tensor,
    B: Tensor,
    A_scale: float | Tensor,
    B_scale: float | Tensor,
    dtype: torch.dtype,
    out: Tensor | None = None,
    backend: str = "cublas",
) -> Tensor:
    """A B A_scale B_scale for each batch entry. Sums run in the fp8 mode of the tensor cores, which keeps fewer digits
    than fp32 (as a library's "fast accumulation" does).

    Args:
        A: [batch_size, m, k], float8_e4m3fn or float8_e5m2; batches and rows may be strided.
        B: [batch_size, k, n], float8_e4m3fn or float8_e5m2; columns contiguous (column major: the fast form) or rows.
        A_scale, B_scale: what A and B are to be multiplied with: a number, or a tensor of one element, fp32, on the
            device of A or on the CPU.
        dtype: of the result, torch.bfloat16 or torch.float16.
        out: where to write, [batch_size, m, n] of this dtype. Default: a new tensor.
        backend: "auto", "cublas", "cudnn" or "cutlass", FlashInfer's names; all mean the same kernel here.

    Returns:
        out.

    Raises:
        ValueError: a shape, dtype, device, stride or backend that does not fit.
        NotImplementedError: a GPU older than compute capability 8.9, which has no fp8.
    """
    if backend not in FP8_BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(FP8_BACKENDS)}, got {backend!r}")
    checks.check_shape("A", A, ("batch_size", "m", "k"))
    checks.check_shape("B", B, (*A.shape[::2], "n"))
    for name, x in (("A", A), ("B", B)):
        checks.check_dtype(name, x, checks.FP8_DTYPES)
        checks.check_device(name, x, A.device)
    checks.check_inner_contiguous("A", A)
    check_one_contiguous("B", B)
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected torch.bfloat16 or torch.float16, got {dtype}")
    a_scale, a_factor = _scale("A_scale", A_scale, A.device)
    b_scale, b_factor = _scale("B_scale", B_scale, A.device)
    out = _output(out, (*A.shape[:2], B.shape[2]), dtype, A.device)
    _grouped_gemm(out, A, B, None, None, a_scale, b_scale, a_factor * b_factor, 0.0, 0, "auto")
    return out


def product(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    alpha: float,
    beta: float,
    out_dtype: torch.dtype | None,
    num_sms: int | None,
) -> Tensor:
    """alpha a b + beta c into c, on at most num_sms SMs: what triton/sm_constraint_gemm.py's functions have in common.

    a [m, k]; b [k, n], rows or columns contiguous.

    Raises:
        ValueError: a shape, dtype, device or stride that does not fit.
        NotImplementedError: fp8 on a GPU older than compute capability 8.9.
    """
    checks.check_shape("a", a, ("m", "k"))
    checks.check_shape("b", b, (a.shape[1], "n"))
    checks.check_dtype("a", a, (*checks.FLOAT_DTYPES, *checks.FP8_DTYPES))
    checks.check_same_dtype("b", b, "a", a)
    checks.check_device("b", b, a.device)
    checks.check_inner_contiguous("a", a)
    check_one_contiguous("b", b)
    if num_sms is not None and num_sms < 1:
        raise ValueError(f"num_sms: expected at least 1, got {num_sms}; leave it out to use all SMs")
    dtype = out_dtype or (torch.bfloat16 if a.dtype in checks.FP8_DTYPES else a.dtype)
    if dtype not in checks.FLOAT_DTYPES:
        raise ValueError(f"out_dtype: expected float16, bfloat16 or float32, got {dtype}")
    if c is None and beta != 0:
        raise ValueError(f"c: expected a tensor of shape {[a.shape[0], b.shape[1]]} since beta is {beta}, got None")
    c = _output(c, (a.shape[0], b.shape[1]), dtype, a.device, "c")
    _grouped_gemm(c[None], a[None], b[None], None, None, None, None, alpha, beta, num_sms or 0, "auto")
    return c


def check_one_contiguous(name: str, x: Tensor) -> None:
    """ValueError unless the rows or the columns of the matrices `x` [..., m, n] are contiguous."""
    if x.shape[-1] > 1 and x.shape[-2] > 1 and 1 not in x.stride()[-2:]:
        raise ValueError(
            f"{name}: rows or columns must be contiguous, got strides {tuple(x.stride())}; call .contiguous()"
        )


def _segment_offsets(seg_lens: Tensor | None, seg_indptr: Tensor | None, batch_size: int, x: Tensor) -> Tensor:
    """Offsets of the segments on the device of x, [batch_size + 1]."""
    if seg_indptr is not None:
        checks.check_shape("seg_indptr", seg_indptr, (batch_size + 1,))
        checks.check_dtype("seg_indptr", seg_indptr, checks.INDEX_DTYPES)
        checks.check_offsets("seg_indptr", seg_indptr, x.shape[0])
        return checks.index_tensor("seg_indptr", seg_indptr, x.device)
    if seg_lens is None:
        raise ValueError("seg_lens: expected seg_lens or seg_indptr, got neither; one of them must tell the segments")
    checks.check_shape("seg_lens", seg_lens, (batch_size,))
    checks.check_dtype("seg_lens", seg_lens, checks.INDEX_DTYPES)
    checks.check_between("seg_lens", seg_lens, 0, x.shape[0] + 1, "segment")
    lengths = checks.index_tensor("seg_lens", seg_lens, x.device)
    indptr = torch.zeros(batch_size + 1, dtype=torch.int64, device=x.device)
    torch.cumsum(lengths, 0, out=indptr[1:])
    if checks.reads_values(seg_lens) and int(seg_lens.sum()) > x.shape[0]:
        raise checks.value_error(
            seg_lens, f"seg_lens: expected at most {x.shape[0]} rows in all, as x has, got {int(seg_lens.sum())}"
        )
    return indptr


def _scale(name: str, scale: float | Tensor, device: torch.device) -> tuple[Tensor | None, float]:
    """A factor as (tensor on the device or None, number); reading a CUDA tensor here would stall the GPU."""
    if not isinstance(scale, Tensor):
        return None, float(scale)
    if scale.numel() != 1:
        raise ValueError(f"{name}: expected a number or a tensor of one element, got shape {list(scale.shape)}")
    checks.check_dtype(name, scale, (torch.float32,))
    if scale.device.type == "cpu" and device.type != "cpu":
        return None, float(scale)
    checks.check_device(name, scale, device)
    return scale, 1.0


def _output(
    out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, name: str = "out"
) -> Tensor:
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    checks.check_shape(name, out, shape)
    checks.check_dtype(name, out, (dtype,))
    checks.check_device(name, out, device)
    checks.check_inner_contiguous(name, out)
    return out
