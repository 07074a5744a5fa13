"""Where the random numbers of a call come from: a seed and an offset, given or taken from a torch.Generator.

The numbers themselves are made by counters (Philox), so nothing is stored per row: a row's numbers are a function of
the seed, the offset, its stream and the draw (reference/sampling.py, `uniform`). Under one seed for the whole batch
the stream is the output row. Under a seed for each row the stream is 0, so that such a row draws the same token
alone, in any batch, and at any place in it."""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from flashtile import checks

_PHILOX_STEP = 4  # torch asks that a CUDA generator's offset moves by multiples of 4


class RandomState(NamedTuple):
    """Seed and offset of a call, each as a tensor of one or batch_size int64, or (None, value). Values fit in int64."""

    seed: Tensor | None
    seed_value: int
    offset: Tensor | None
    offset_value: int


def random_state(
    generator: Generator | None,
    seed: int | Tensor | None,
    offset: int | Tensor | None,
    batch_size: int,
    device: torch.device,
) -> RandomState:
    """The state of one call; no host sync.

    seed (with offset, default 0) is used as it is given. Otherwise both come from the generator, or the default one of
    the device, and its state moves on: a CUDA generator gives its own seed and offset, any other one a random seed.
    While a CUDA graph is captured, and under torch.compile, a seed is drawn on the device, so that each replay has new
    numbers.

    Raises:
        TypeError: seed or offset is neither an integer nor a tensor.
        NotImplementedError: a generator under torch.compile.
        ValueError: seed beside generator, offset without seed, a generator of another CUDA device, or a tensor that
            does not fit.
    """
    if seed is not None:
        if generator is not None:
            raise ValueError("generator: got one beside seed; give either a generator, or seed and offset")
        values = [
            _number(n, x, batch_size, device) for n, x in (("seed", seed), ("offset", 0 if offset is None else offset))
        ]
        return RandomState(*values[0], *values[1])
    if offset is not None:
        raise ValueError("offset: got one without seed; give both, or neither")
    if generator is not None and generator.device.type != "cpu" and _with_index(generator.device) != device:
        raise ValueError(f"generator: expected one of the CPU or of {device}, got one of {generator.device}")
    if generator is not None and torch.compiler.is_compiling():
        raise checks.not_implemented("generator", "under torch.compile give seed and offset, as tensors")
    on_device = generator is None or generator.device.type == "cuda"
    if torch.compiler.is_compiling() or (
        device.type == "cuda" and on_device and torch.cuda.is_current_stream_capturing()
    ):
        return RandomState(torch.randint(2**63 - 1, (1,), device=device, generator=generator), 0, None, 0)
    if device.type == "cuda" and on_device:
        source = torch.cuda.default_generators[device.index] if generator is None else generator
        state = RandomState(None, _signed(source.initial_seed()), None, source.get_offset())
        source.set_offset(state.offset_value + _PHILOX_STEP)
        return state
    return RandomState(None, int(torch.randint(2**63 - 1, (1,), generator=generator)), None, 0)


def _with_index(device: torch.device) -> torch.device:
    """A device with its index: that of torch.Generator("cuda") has none, and means the current one."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _number(name: str, x: int | Tensor, batch_size: int, device: torch.device) -> tuple[Tensor | None, int]:
    if not isinstance(x, Tensor):
        if not isinstance(x, int):
            raise TypeError(f"{name}: expected an int or a torch.Tensor, got {type(x).__name__}")
        return None, _signed(x)
    if x.dtype == torch.uint64:
        x = x.view(torch.int64)
    checks.check_dtype(name, x, checks.INDEX_DTYPES)
    if x.numel() not in (1, batch_size) or x.dim() > 1:
        raise ValueError(f"{name}: expected shape [1] or [batch_size] = [{batch_size}], got {list(x.shape)}")
    return x.reshape(-1).to(device, torch.int64).contiguous(), 0


def _signed(x: int) -> int:
    """The int64 with the low 64 bits of x."""
    return (x + 2**63) % 2**64 - 2**63
