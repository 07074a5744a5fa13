"""A Llama-family model for paged batches: transformers brings the weights, flashtile does all but the matrix products.

The q, k and v projections are fused into one matrix, as are gate and up: fewer, larger products.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import flashtile
from examples.engine.kv_cache import KVCache, Slots
from examples.engine.linear import Linear

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # those whose frequencies do not depend on the sequence length


@dataclass(frozen=True)
class Batch:
    """One step's tokens of all its requests, in a row, and where their K and V live. Index tensors on the device."""

    tokens: Tensor  # [nnz_qo]
    slots: Slots
    logit_rows: Tensor  # rows of `tokens` whose logits are wanted
    attention: Any  # a flashtile wrapper, planned for this batch


class Layer(NamedTuple):
    """Weights of one transformer layer."""

    attention_norm: Tensor  # [hidden]
    qkv: Linear  # [(num_qo_heads + 2 num_kv_heads) * head_dim, hidden]
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear  # [2 * intermediate, hidden]
    down: Linear


class Llama:
    """Weights and shapes of a model, and its forward pass."""

    def __init__(self, source: Any, *, dtype: torch.dtype, device: str | torch.device) -> None:
        """Take the weights of a transformers model `source` of the Llama architecture.

        Raises:
            ValueError: another architecture, or an option of this one that the forward pass below does not have.
        """
        config = source.config
        check_config(config)
        self.dtype, self.device = dtype, torch.device(device)
        self.num_qo_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = config.head_dim
        self.eps: float = config.rms_norm_eps
        self.context: int = config.max_position_embeddings
        eos = source.generation_config.eos_token_id
        self.eos_tokens = set(eos if isinstance(eos, list) else [] if eos is None else [eos])

        def weight(module: Any) -> Tensor:
            return module.weight.detach().to(self.device, dtype)  # type: ignore[no-any-return]

        def fuse(*modules: Any) -> Linear:
            biases = [m.bias.detach() for m in modules if m.bias is not None]
            bias = torch.cat(biases).to(self.device, dtype) if biases else None
            return Linear(torch.cat([weight(m) for m in modules]), bias)

        body = source.model
        self.embedding = weight(body.embed_tokens)  # [vocab, hidden]
        tied = source.lm_head.weight is body.embed_tokens.weight
        self.lm_head = Linear(self.embedding if tied else weight(source.lm_head))
        self.final_norm = weight(body.norm)
        self.layers = [
            Layer(
                attention_norm=weight(layer.input_layernorm),
                qkv=fuse(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                out=fuse(layer.self_attn.o_proj),
                mlp_norm=weight(layer.post_attention_layernorm),
                gate_up=fuse(layer.mlp.gate_proj, layer.mlp.up_proj),
                down=fuse(layer.mlp.down_proj),
            )
            for layer in body.layers
        ]
        rope = body.rotary_emb  # its frequencies already contain the scaling that the config asks for
        angles = torch.outer(torch.arange(self.context).float(), rope.inv_freq.float().cpu())
        table = torch.cat([angles.cos(), angles.sin()], -1) * rope.attention_scaling
        self.cos_sin = table.to(self.device)  # [context, head_dim], fp32

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Append the batch's K and V to the cache and return logits of batch.logit_rows, [n, vocab], fp32."""
        residual = F.embedding(batch.tokens, self.embedding)  # [nnz_qo, hidden]
        x = flashtile.rmsnorm(residual, self.layers[0].attention_norm, self.eps)
        next_norms = [layer.attention_norm for layer in self.layers[1:]] + [self.final_norm]
        for i, (layer, next_norm) in enumerate(zip(self.layers, next_norms, strict=True)):
            x = layer.out(self._attend(layer.qkv(x), batch, cache, i))
            if i == len(self.layers) - 1:  # from here on only the rows that speak
                x, residual = x[batch.logit_rows], residual[batch.logit_rows]
            flashtile.fused_add_rmsnorm(x, residual, layer.mlp_norm, self.eps)  # residual += x; x = norm(residual)
            x = layer.down(flashtile.silu_and_mul(layer.gate_up(x)))
            flashtile.fused_add_rmsnorm(x, residual, next_norm, self.eps)
        return self.lm_head(x).float()

    def _attend(self, qkv: Tensor, batch: Batch, cache: KVCache, layer: int) -> Tensor:
        """Rotate, append and attend: [nnz_qo, (Hq + 2 Hkv) * head_dim] -> [nnz_qo, Hq * head_dim].

        The new tokens, too, attend to each other through the cache: as it holds them, rounded to its format.
        """
        kv_width = self.num_kv_heads * self.head_dim
        q, k, v = qkv.split([self.num_qo_heads * self.head_dim, kv_width, kv_width], dim=-1)
        flashtile.apply_rope_with_cos_sin_cache_inplace(batch.slots.positions, q, k, self.head_dim, self.cos_sin)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))  # [nnz_qo, heads, head_dim]
        q = cache.append(layer, q, k, v, batch.slots)
        kv_cache, scales = cache.layer(layer)
        return batch.attention.run(q, kv_cache, **scales).flatten(1)  # type: ignore[no-any-return]


def check_config(config: Any) -> None:
    """ValueError, naming the option, unless the forward pass above computes what this config describes."""
    rope_type = (config.rope_parameters or {}).get("rope_type", "default") if config.model_type == "llama" else None
    for name, got, allowed in (
        ("model_type", config.model_type, ("llama",)),
        ("hidden_act", config.hidden_act, ("silu",)),
        ("rope_type", rope_type, ROPE_TYPES),
    ):
        if got not in allowed:
            raise ValueError(
                f"{name}: expected {' or '.join(allowed)}, got {got!r}; this engine runs Llama models only"
            )
