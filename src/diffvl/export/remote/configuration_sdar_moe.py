"""Configuration of a language model with experts in SDAR's layout: Qwen3-MoE's settings, and what block diffusion adds."""

from typing import Any

from diffvl.export.remote.configuration_sdar import SDARConfig

EXPERT_SETTINGS = ("decoder_sparse_step", "moe_intermediate_size", "num_experts_per_tok", "num_experts", "norm_topk_prob")


class SDARMoeConfig(SDARConfig):
    """One checkpoint's description; see `SDARConfig`. Settings of the experts have Qwen3-MoE's names."""

    model_type = "sdar_moe"
    stock_type = "qwen3_moe"

    def __init__(
        self,
        decoder_sparse_step: int = 1,
        moe_intermediate_size: int = 768,
        num_experts_per_tok: int = 8,
        num_experts: int = 128,
        norm_topk_prob: bool = True,
        mlp_only_layers: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.decoder_sparse_step = decoder_sparse_step
        self.moe_intermediate_size = moe_intermediate_size
        self.num_experts_per_tok = num_experts_per_tok
        self.num_experts = num_experts
        self.norm_topk_prob = norm_topk_prob
        self.mlp_only_layers = list(mlp_only_layers or [])
        super().__init__(**kwargs)

    def stock_settings(self) -> dict[str, Any]:
        """The settings of the stock language model that this is."""
        experts = {name: getattr(self, name) for name in (*EXPERT_SETTINGS, "mlp_only_layers")}
        return {**super().stock_settings(), **experts}
