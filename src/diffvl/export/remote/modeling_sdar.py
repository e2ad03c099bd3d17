"""A language model in SDAR's layout: a stock Qwen3 under SDAR's names, with block attention and block decoding.

It is called as SDAR's own code is: `model(ids, attention_mask=[1, queries, keys] with 1 = attend, position_ids, past_key_values,
use_cache, store_kv)`, and decodes by itself with `generate`.
"""

import inspect
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from diffvl.export.remote.configuration_sdar import SDARConfig
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration


class SDARForCausalLM(DiffVLForConditionalGeneration):
    """The text model alone: `model` and `lm_head` are those of the stock one, whose forward runs them."""

    config_class: Any = SDARConfig
    base_model_prefix = "model"
    input_modalities = ["text"]  # noqa: RUF012  (as transformers has it)

    def __init__(self, config: Any) -> None:
        # What the model code asks of a configuration beyond SDAR's own, as a model without images has it. On the class, so that
        # it is not saved.
        fresh = DiffVLConfig()
        for name in inspect.signature(DiffVLConfig.__init__).parameters:
            if hasattr(fresh, name) and not hasattr(config, name):
                setattr(type(config), name, getattr(fresh, name))
        super().__init__(config)

    def _make_parts(self, config: Any) -> None:
        stock: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config.stock_type, **config.stock_settings()), attn_implementation=config._attn_implementation
        )
        config.text_config = stock.config
        self.model, self.lm_head = stock.model, stock.lm_head
        # Not a module of this one by the name: tensors are called as in the layout, and the same module would stand twice.
        self.__dict__["language_model"] = stock


class SDARModel(SDARForCausalLM):
    """What `AutoModel` gives: the same, for the layout names this class too."""
