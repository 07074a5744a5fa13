"""FlashInfer's deprecated forward(): the arguments that plan() has taken since come again, and count.

forward() overwrites what was planned with its own arguments, defaults included, and runs; so do run() calls after it.
"""

from dataclasses import replace
from functools import partialmethod
from typing import Any

from torch import Tensor

from flashtile.attention import PagedKV, PlannedOp
from flashtile.pos_encoding import PosEncoding, read_pos_encoding
from flashtile.scales import Scale


class LegacyOp(PlannedOp):
    """What the forms of forward() share."""

    run: Any

    def end_forward(self) -> None:
        """Does nothing: nothing is held between plan() and the next one."""

    def _overwrite(
        self,
        encoding: PosEncoding,
        window_left: int,
        logits_soft_cap: float | None,
        sm_scale: float | None,
        causal: bool | None = None,
    ) -> None:
        """Let these count from now on; where the work list depends on one that changed, the batch is planned again."""
        plan = self._planned()
        old = plan.problem
        problem = replace(
            old,
            rope=encoding.rope,
            alibi=encoding.alibi,
            window_left=window_left,
            window_right=old.window_right if causal is None else (0 if causal else -1),
            logits_soft_cap=logits_soft_cap or 0.0,
        )
        if problem != old:
            self._schedule(problem, plan.lengths, plan.kv_indices, sm_scale, plan.kv_rows, plan.kv_rows_request)
        else:
            self._sm_scale = old.head_dim_qk**-0.5 if sm_scale is None else sm_scale


class LegacyDecode(LegacyOp):
    """forward() of decode."""

    def forward(
        self,
        q: Tensor,
        paged_kv_cache: PagedKV,
        pos_encoding_mode: str = "NONE",
        q_scale: Scale = None,
        k_scale: Scale = None,
        v_scale: Scale = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """run(), after these arguments took the place of plan()'s. Deprecated: give them to plan()."""
        encoding = read_pos_encoding(pos_encoding_mode, rope_scale, rope_theta)
        self._overwrite(encoding, window_left, logits_soft_cap, sm_scale)
        result: Tensor | tuple[Tensor, Tensor] = self.run(
            q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse
        )
        return result

    forward_return_lse = partialmethod(forward, return_lse=True)


class LegacyPrefill(LegacyOp):
    """forward() of prefill over pages."""

    def forward(
        self,
        q: Tensor,
        paged_kv_cache: PagedKV,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: Scale = None,
        v_scale: Scale = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """run(), after these arguments took the place of plan()'s. Deprecated: give them to plan()."""
        encoding = read_pos_encoding(pos_encoding_mode, rope_scale, rope_theta)
        self._overwrite(encoding, window_left, logits_soft_cap, sm_scale, causal)
        result: Tensor | tuple[Tensor, Tensor] = self.run(
            q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse
        )
        return result

    forward_return_lse = partialmethod(forward, return_lse=True)


class LegacyRaggedPrefill(LegacyOp):
    """forward() of prefill over ragged KV."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """run(), after these arguments took the place of plan()'s. Deprecated: give them to plan()."""
        encoding = read_pos_encoding(pos_encoding_mode, rope_scale, rope_theta)
        self._overwrite(encoding, window_left, logits_soft_cap, sm_scale, causal)
        result: Tensor | tuple[Tensor, Tensor] = self.run(q, k, v, return_lse=return_lse)
        return result

    forward_return_lse = partialmethod(forward, return_lse=True)
