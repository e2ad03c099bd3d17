"""A language model with experts in SDAR's layout: a stock Qwen3-MoE under SDAR's names."""

from typing import Any

from diffvl.export.remote.configuration_sdar_moe import SDARMoeConfig
from diffvl.export.remote.modeling_sdar import SDARForCausalLM


class SDARMoeForCausalLM(SDARForCausalLM):
    """The text model alone; see `SDARForCausalLM`."""

    config_class: Any = SDARMoeConfig


class SDARMoeModel(SDARMoeForCausalLM):
    """What `AutoModel` gives: the same, for the layout names this class too."""
