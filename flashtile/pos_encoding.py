"""pos_encoding_mode and its parameters, as every attention entry point takes them."""

from dataclasses import dataclass

from flashtile.plan.encoding import Rope
from flashtile.utils import PosEncodingMode


@dataclass(frozen=True)
class PosEncoding:
    """What attention does about positions: rotate q and k, or add ALiBi's term, or neither."""

    rope: Rope | None = None
    alibi: bool = False


NO_ENCODING = PosEncoding()


def read_pos_encoding(
    mode: str | PosEncodingMode,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    low_freq_factor: float | None = None,
    high_freq_factor: float | None = None,
    old_context_len: int | None = None,
) -> PosEncoding:
    """The arguments of an entry point, checked.

    Args:
        mode: "NONE", "ROPE_LLAMA" or "ALIBI", or a PosEncodingMode.
        rope_scale: divides all frequencies, default 1; rope_theta: their base, default 1e4.
        low_freq_factor, high_freq_factor, old_context_len: Llama 3.1's frequencies (flashtile's own arguments); both
            factors together, the context length 8192 by default.

    Raises:
        KeyError: an unknown mode. ValueError: a parameter without its mode, or out of range.
    """
    name = mode.name if isinstance(mode, PosEncodingMode) else mode
    if name not in PosEncodingMode.__members__:
        raise KeyError(f"Invalid pos_encoding_mode {mode!r}: expected one of {', '.join(PosEncodingMode.__members__)}")
    given = {
        "rope_scale": rope_scale,
        "rope_theta": rope_theta,
        "low_freq_factor": low_freq_factor,
        "high_freq_factor": high_freq_factor,
        "old_context_len": old_context_len,
    }
    if name != "ROPE_LLAMA":
        for argument, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{argument}: only pos_encoding_mode='ROPE_LLAMA' reads it, got {value} with {name!r}; leave it out"
                )
        return PosEncoding(alibi=name == "ALIBI")
    llama31 = None
    if low_freq_factor is not None and high_freq_factor is not None:
        llama31 = (float(low_freq_factor), float(high_freq_factor), float(old_context_len or 8192))
    elif not (low_freq_factor is high_freq_factor is old_context_len is None):
        raise ValueError(
            "low_freq_factor, high_freq_factor: Llama 3.1's frequencies need both, got "
            f"{low_freq_factor} and {high_freq_factor}; that model has 1 and 4"
        )
    rope = Rope(
        1.0 if rope_scale is None else float(rope_scale), 1e4 if rope_theta is None else float(rope_theta), llama31
    )
    rope.check()
    return PosEncoding(rope)
