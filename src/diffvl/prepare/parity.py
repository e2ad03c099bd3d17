"""What a prepared model must reproduce: its source's logits, under the attention that the source was trained with.

Place in the flow: `assemble.prepare` takes the source's logits before anything changes, and the written model's afterwards.

Shapes: B conversations, L tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from diffvl.config.families import DiffusionSource
from diffvl.hub.layout_diffvl import clean_layout
from diffvl.prepare.attention_proof import conversations, forward, native_logits


@dataclass(frozen=True)
class Parity:
    """The attention under which a prepared model must give its source's logits: an AR model's own causal one; where the trunk was
    a diffusion language model, what that saw (all tokens, or block by block). Its source here is the stock model with renamed
    tensors, since no code of the checkpoint runs."""

    source: DiffusionSource | None

    @property
    def name(self) -> str:
        """The name of the proof: "AR", "bidirectional" or "block"."""
        if self.source is None:
            return "AR"
        return "bidirectional" if self.source.block_size is None else "block"

    @property
    def key(self) -> str:
        """Its name in `diffvl.json`."""
        return f"{self.name.lower()}_parity"

    def facts(self, config: PretrainedConfig) -> dict[str, str]:
        """Tells `diffvl.json` with what a translated source was compared, and with what not."""
        if self.source is None:
            return {}
        stock = (config.architectures or [config.model_type])[0]
        return {"parity_with": f"the {self.source.model_type} checkpoint's tensors in a stock {stock}; its own code was not run"}

    def probe(self, known: int) -> torch.Tensor:
        """Draws tokens out of the first `known`; every third is the mask token where the source has one. [B, L]"""
        ids = conversations(range(known))[0]
        if self.source is not None:
            ids[:, ::3] = self.source.mask_token_id
        return ids

    def block(self, ids: torch.Tensor) -> torch.Tensor:
        """Gives the block of each token, [B, L]: a token sees its own and all before it."""
        size = ids.shape[1] if self.source is None else self.source.block_size or ids.shape[1]
        return (torch.arange(ids.shape[1]) // size).expand_as(ids)

    def source_logits(self, trunk: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """Runs the source's trunk: [B, L, V] in fp32."""
        if self.source is None:
            return native_logits(trunk, ids)
        layout = clean_layout(self.block(ids), torch.ones_like(ids, dtype=torch.bool), "block")
        with torch.no_grad():
            return forward(trunk, ids, layout).logits.float()

    @torch.no_grad()
    def prepared_logits(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        """Runs the prepared model, under the mask that a caller of its `forward` would give: [B, L, V]."""
        if self.source is None:
            return model(ids).logits
        block = self.block(ids)
        return model(ids, attention_mask=block[:, :, None] >= block[:, None, :]).logits
