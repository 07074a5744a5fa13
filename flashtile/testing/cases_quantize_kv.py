"""Cases of keys and values that are quantised, alone and on their way into the paged cache, and what must hold for
each: on the CPU, in Triton's interpreter and on a GPU."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashtile import page, quantization
from flashtile.reference import quantization as reference
from flashtile.testing.cases_attention import CACHE_DTYPES
from flashtile.testing.cases_page import PageCase, PageTable, bits, by_token, page_table
from flashtile.testing.tensors import name, poisoned, randn

Factor = float | Tensor | None


@dataclass(frozen=True)
class QuantiseCase(PageCase):
    """cache: format of k and v, "int8", or of each, "int4/int8"; dtype: of the rows.

    scale: given as "none", a "float", "one" element on the device or on the "host", or per "head"; or written per
    "token" or "group32" .. "group128". zero: zero points are written. short: page_size 1 without the page dimension.
    """

    cache: str = "int8"
    scale: str = "token"
    zero: bool = False
    short: bool = False

    def __str__(self) -> str:
        words = [f"{self.cache} scale={self.scale}", *(["zero"] if self.zero else []), super().__str__()]
        return " ".join(words + (["short"] if self.short else []))

    @property
    def formats(self) -> tuple[str, str]:
        """Of k and v."""
        k, _, v = self.cache.partition("/")
        return k, v or k

    @property
    def written(self) -> bool:
        """Whether scales are written, not given."""
        return self.scale == "token" or self.scale.startswith("group")


def _cases(base: QuantiseCase) -> tuple[QuantiseCase, ...]:
    return (
        replace(base, cache="e4m3", scale="none"),
        replace(base, cache="e4m3", scale="float", kv_layout="HND"),
        replace(base, cache="e5m2", scale="one"),
        replace(base, cache="e5m2", scale="host", sparse=True),
        replace(base, cache="e4m3", scale="head", one_tensor=True),
        replace(base, cache="e4m3", scale="token", page_size=5, head_dim=40),
        replace(base, cache="e5m2", scale="token", kv_layout="HND"),
        replace(base, scale="token"),
        replace(base, scale="token", zero=True, kv_layout="HND", one_tensor=True),
        replace(base, scale="head", num_kv_heads=3),
        replace(base, scale="float"),
        replace(base, scale="group32", zero=True, page_size=1, short=True),
        replace(base, scale="token", page_size=1, short=True, kv_layout="HND", one_tensor=True),
        replace(base, cache="int4"),
        replace(base, cache="int4", zero=True, head_dim=40, page_size=17),
        replace(base, cache="int4", zero=True, head_dim=16, num_kv_heads=1),
        replace(base, cache="int4", scale="group32", zero=True, one_tensor=True, kv_layout="HND"),
        replace(base, cache="int4", scale="group32", head_dim=96, sparse=True),
        replace(base, cache="int4", scale="group64", zero=True, head_dim=128),
        replace(base, cache="int4", scale="group128", zero=True, head_dim=128),
        replace(base, cache="int4/int8", zero=True),
        replace(base, cache="e4m3/int4"),
        replace(base, cache="plain/int4", scale="group32", zero=True),
        replace(base, cache="int8/plain"),
        replace(base, kv_lens=(9,), new_lens=(0,), zero=True),
    )


SMALL_CASES = _cases(QuantiseCase((5, 0, 7), (5, 0, 2), page_size=4))
CASES = (
    *SMALL_CASES,
    *_cases(QuantiseCase((1, 64, 0, 200, 17), (1, 3, 0, 111, 17), dtype=torch.bfloat16)),
    *_cases(QuantiseCase((1, 64, 0, 200, 17), (1, 3, 0, 111, 17), num_kv_heads=5, dtype=torch.float32)),
)


def make_rows(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows of very different size, on the CPU; one of zeros, one of a single value, and one of its every other dims."""
    x = randn(*shape, seed=seed) * 10 ** randn(*shape[:-1], 1, seed=seed + 1)
    if shape[0] >= 3:
        x[0, 0], x[1, 0], x[2, 0, ::2] = 0.0, -3.3, 1e-3
    return x.to(dtype)


def make_cache(case: QuantiseCase, table: PageTable, device: str) -> tuple[Tensor, ...]:
    """Poisoned k and v caches in the case's layout, with gaps between pages."""
    slot = (case.page_size, case.num_kv_heads) if case.kv_layout == "NHD" else (case.num_kv_heads, case.page_size)
    caches = []
    for cache in case.formats:
        width = case.head_dim // 2 if cache == "int4" else case.head_dim
        dtype = CACHE_DTYPES.get(cache, case.dtype)
        caches.append(poisoned((table.num_pages, 3, *slot, width), dtype, device)[:, 1])
    return tuple(caches)


def make_factors(case: QuantiseCase, cache: str, table: PageTable, device: str) -> tuple[Factor, Factor]:
    """Scale and zero point of one side: given, or poisoned memory to write to, parts of one tensor with gaps."""
    if cache == "plain" or case.scale == "none":
        return None, None
    if not case.written:
        per_head = torch.linspace(0.05, 2.0, 2 * case.num_kv_heads, device=device)[::2]
        given: dict[str, Factor] = {"float": 0.37, "host": torch.tensor(0.37), "one": per_head[:1], "head": per_head}
        return given[case.scale], None
    groups = 1 if case.scale == "token" else case.head_dim // int(case.scale.removeprefix("group"))
    slot = (case.page_size, case.num_kv_heads) if case.kv_layout == "NHD" else (case.num_kv_heads, case.page_size)
    both = poisoned((table.num_pages, 3, *slot, 2 * groups), torch.float32, device)[:, 1]
    scale, zero = (x[..., 0] if case.scale == "token" else x for x in both.chunk(2, -1))
    return scale, zero if case.zero else None


def quantised(case: QuantiseCase, cache: str, x: Tensor, given: Factor) -> tuple[Tensor, ...]:
    """By the public quantisers: numbers, and unless it is given the scale, and a zero point if there is one."""
    if cache == "plain":
        return (x,)
    group_size = int(case.scale.removeprefix("group")) if case.scale.startswith("group") else None
    got: tuple[Tensor | None, ...]
    if cache in ("e4m3", "e5m2"):
        got = quantization.quantize_kv_fp8(x, 1.0 if case.scale == "none" else given, CACHE_DTYPES[cache])
    elif cache == "int8":
        got = quantization.quantize_kv_int8(x, given, not case.zero, group_size)
    else:
        got = quantization.quantize_kv_int4(x, group_size, symmetric=not case.zero)
    return tuple(t for t in got if t is not None)[: None if case.written else 1]


def check_quantize_append(case: QuantiseCase, device: str) -> None:
    """Addressed slots hold what the quantisers return, bit by bit; every other bit of the caches, the scales and the
    zero points is as before."""
    table = page_table(case, device)
    shape = (len(table.positions), case.num_kv_heads, 3 * case.head_dim)
    new = make_rows(*shape, dtype=case.dtype, seed=5).to(device)
    rows = new[..., : case.head_dim], new[..., -case.head_dim :]
    caches = make_cache(case, table, device)
    factors = [make_factors(case, cache, table, device) for cache in case.formats]
    paged: Any = torch.stack(caches, 1) if case.one_tensor else caches
    memory, expected = [], []  # what may be written to, k's and v's, and copies that hold what should be
    for i, (cache, x, (scale, zero)) in enumerate(zip(case.formats, rows, factors, strict=True)):
        places = [paged[:, i] if case.one_tensor else paged[i], scale if case.written else None, zero]
        places = [place for place in places if place is not None]
        values = quantised(case, cache, x, None if case.written else scale)
        for place, value in zip(places, values, strict=True):
            memory.append(place)
            expected.append(by_token(place, case.kv_layout).clone())
            expected[-1][table.slots(case.page_size)] = value.cpu()
    (k_scale, k_zero), (v_scale, v_zero) = factors
    page_dim = 1 if case.kv_layout == "NHD" else 2

    def argument(x: Any, at: int) -> Any:
        return x.squeeze(at) if case.short and isinstance(x, Tensor) and x.dim() > 1 else x

    page.append_paged_kv_cache(
        *rows, table.batch_indices, table.positions,
        argument(paged, page_dim + 1) if case.one_tensor else tuple(argument(x, page_dim) for x in paged),
        table.kv_indices, table.kv_indptr, table.kv_last_page_len, kv_layout=case.kv_layout,
        k_scale=argument(k_scale, page_dim), v_scale=argument(v_scale, page_dim),
        k_zero=argument(k_zero, page_dim), v_zero=argument(v_zero, page_dim),
    )  # fmt: skip
    for place, want in zip(memory, expected, strict=True):
        assert torch.equal(bits(by_token(place, case.kv_layout)), bits(want))


@dataclass(frozen=True)
class FormatCase:
    """One call of a quantiser. given: a scale "none", "float", per "head" or per "row"; groups of head_dim."""

    cache: str
    head_dim: int = 64
    groups: int = 1
    affine: bool = False
    given: str = "none"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        words = [self.cache, f"dim={self.head_dim}", f"groups={self.groups}", *(["affine"] if self.affine else [])]
        return " ".join([*words, f"given={self.given}", name(self.dtype)])


FORMAT_CASES = tuple(
    FormatCase(cache, head_dim, groups, affine, given, dtype)
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for cache, head_dim, groups, affine, given in (
        *(("e4m3", 64, 1, False, given) for given in ("none", "float", "head", "row")),
        *(("e5m2", 40, 1, False, given) for given in ("none", "float", "head", "row")),
        *(("int8", 40, 1, False, given) for given in ("none", "float", "head", "row")),
        *(("int8", 96, groups, affine, "none") for groups in (1, 3) for affine in (False, True)),
        *(("int4", dim, 1, affine, "none") for dim in (16, 72, 128) for affine in (False, True)),
        *(("int4", 128, groups, affine, "none") for groups in (2, 4) for affine in (False, True)),
    )
)
SMALL_FORMAT_CASES = tuple(case for case in FORMAT_CASES if case.dtype != torch.bfloat16)


def check_quantize_kv(case: FormatCase, device: str) -> None:
    """Bit by bit the definition: numbers, scale and zero point; of rows that are strided, and in further dimensions."""
    x = make_rows(11, 3, case.head_dim + 8, dtype=case.dtype, seed=1)[..., : case.head_dim]
    given: Factor = {
        "none": None, "float": 0.37, "head": torch.tensor([0.01, 0.5, 3.0]), "row": randn(11, 3, seed=3).exp(),
    }[case.given]  # fmt: skip
    scale = None if given is None else torch.as_tensor(given)
    expected = reference.quantise_kv(x, CACHE_DTYPES[case.cache], scale, case.groups, case.affine)
    on_device = given.to(device) if isinstance(given, Tensor) else given
    group_size = None if case.groups == 1 else case.head_dim // case.groups
    if case.cache in ("e4m3", "e5m2"):
        numbers, used = quantization.quantize_kv_fp8(x.to(device), on_device, CACHE_DTYPES[case.cache])
        zero = None
    elif case.cache == "int8":
        numbers, used, zero = quantization.quantize_kv_int8(x.to(device), on_device, not case.affine, group_size)
    else:
        numbers, used, zero = quantization.quantize_kv_int4(x.to(device), group_size, symmetric=not case.affine)
    assert torch.equal(bits(numbers.cpu()), bits(expected[0]))
    assert (zero is not None) == case.affine
    for got, want in zip((used, zero), expected[1:], strict=True):
        if given is None and got is not None:
            assert got.shape == (want.shape if group_size else want.shape[:-1])
            assert torch.equal(got.cpu().view(want.shape), want)


def check_every_value_in_fp8(dtype: torch.dtype, device: str) -> None:
    """All bf16 values that are numbers, among them ties, subnormals and what saturates."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = x[~x.isnan()].view(-1, 1, 2)
    numbers, _ = quantization.quantize_kv_fp8(x.to(device), 1.0, dtype)
    assert torch.equal(bits(numbers.cpu()), bits(reference.quantise(x, 1.0, dtype)))
