"""`HookedTransformer` (TransformerLens 3.x) as a residual network."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

from tl_jets.adapters.base import TransformerLensView
from tl_jets.adapters.blocks import Sublayer
from tl_jets.core.decoder import Decoder


class HookedTransformerView(TransformerLensView):
    """Replays the submodules of `TransformerBlock` in the order of its forward pass."""

    def is_parallel(self, layer: int) -> bool:
        """Whether attention and MLP read the same stream."""
        return bool(self.cfg.parallel_attn_mlp) and self.has_mlp(layer)

    def has_mlp(self, layer: int) -> bool:
        """Whether the block has an MLP."""
        return not self.cfg.attn_only

    def edits_mid(self) -> bool:
        """Whether a hook on `hook_resid_mid` changes the stream itself, skip included."""
        return True

    def _call_modules(self) -> list[tuple[Hashable, torch.nn.Module]]:
        return list(enumerate(self.blocks))

    @property
    def _is_post_norm(self) -> bool:
        return self.cfg.original_architecture in POST_NORM_ARCHITECTURES

    def _post_norm_module(self, layer: int, which: Sublayer) -> torch.nn.Module | None:
        block, name = self.blocks[layer], {"attn": "ln1", "mlp": "ln2"}[which]
        if self.cfg.use_normalization_before_and_after:
            name += "_post"
        elif not self._is_post_norm:
            return None
        return getattr(block, name, None)  # attention-only blocks have none for an MLP

    def _pre_norm_module(self, layer: int, which: Sublayer) -> torch.nn.Module | None:
        name = {"attn": "ln1", "mlp": "ln2"}[which]
        return None if self._is_post_norm else getattr(self.blocks[layer], name, None)

    def call_attn(self, calls: Any, layer: int, stream: Tensor) -> Tensor:
        """Pre-norm and attention, before any post-norm."""
        block, cfg = self.blocks[layer], self.cfg
        kwargs = calls[layer][1]

        def forked(point: Any, n_heads: int) -> Tensor:
            return point(stream.unsqueeze(2).expand(-1, -1, n_heads, -1).clone())

        kv_heads = cfg.n_heads
        if cfg.n_key_value_heads is not None and not cfg.ungroup_grouped_query_attention:
            kv_heads = cfg.n_key_value_heads
        if cfg.use_split_qkv_input:
            query = forked(block.hook_q_input, cfg.n_heads)
            key, value = forked(block.hook_k_input, kv_heads), forked(block.hook_v_input, kv_heads)
        else:
            query = key = value = forked(block.hook_attn_in, cfg.n_heads) if cfg.use_attn_in else stream
        if not self._is_post_norm:
            query, key, value = block.ln1(query), block.ln1(key), block.ln1(value)
        positions = kwargs.get("shortformer_pos_embed")
        if positions is not None:
            if cfg.use_attn_in or cfg.use_split_qkv_input:
                positions = positions.unsqueeze(2)
            query, key = query + positions, key + positions
        return block.attn(
            query_input=query, key_input=key, value_input=value, attention_mask=kwargs.get("attention_mask")
        )

    def finish_attn(self, layer: int, out: Tensor) -> Tensor:
        """Map the attention module's output to its write."""
        block = self.blocks[layer]
        if self.cfg.use_normalization_before_and_after:
            out = block.ln1_post(out)
        if self._is_post_norm:
            out = block.ln1(out)
        return block.hook_attn_out(out)

    def call_mlp(self, calls: Any, layer: int, stream: Tensor) -> Tensor:
        """The MLP's write."""
        block = self.blocks[layer]
        if self.cfg.use_hook_mlp_in:
            stream = block.hook_mlp_in(stream.clone())
        return block.apply_mlp(stream if self._is_post_norm else block.ln2(stream))

    def _decoder(self) -> Decoder:
        model, cfg = self.model, self.cfg
        norm = self._read_last_norm(getattr(model, "ln_final", None) if cfg.normalization_type is not None else None)
        cap = float(getattr(cfg, "output_logits_soft_cap", 0) or 0)

        def softcap(logits: Tensor) -> Tensor:
            return cap * torch.tanh(logits / cap)

        return Decoder(
            norm=norm,
            W_U=model.unembed.W_U.detach(),
            b_U=model.unembed.b_U.detach(),
            transform=softcap if cap > 0 else None,
        )
