"""The DiffVL model: a stock vision tower, a connector and a stock causal-LM trunk, unmodified.

Block attention enters as masks that `layout_diffvl` builds; nothing here knows of noise or loss. These files are copied
beside exported weights and are the remote code that transformers loads there.

Shapes: B batch, T tokens, N images, P image tokens per picture, H trunk width, V vocabulary, M rows asked of the head.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoModel, AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache_diffvl import ReadingCache
from .configuration_diffvl import DiffVLConfig
from .generation_diffvl import BlockGeneration
from .head_diffvl import mapped_rows
from .layout_diffvl import Layout, attention_masks, clean_layout, image_rows
from .request_diffvl import refuse_videos


class Connector(nn.Module):
    """Tower features [N, patches, width] -> image tokens [N, P, H]."""

    def __init__(self, kind: str, shuffle_factor: int, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.shuffle_factor = shuffle_factor
        width = vision_width * shuffle_factor**2
        if kind == "linear":
            self.layers = nn.Sequential(nn.Linear(width, text_width))
        else:
            self.layers = nn.Sequential(nn.Linear(width, text_width), nn.GELU(), nn.Linear(text_width, text_width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.shuffle_factor > 1:
            features = _join_patches(features, self.shuffle_factor)
        return self.layers(features.to(next(self.layers.parameters()).dtype))


def _join_patches(features: torch.Tensor, factor: int) -> torch.Tensor:
    """Concatenates each factor x factor square of patches: [N, S*S, C] -> [N, (S/factor)^2, C * factor^2]."""
    count, patches, width = features.shape
    side = int(patches**0.5)
    squares = features.view(count, side // factor, factor, side // factor, factor, width)
    return squares.permute(0, 1, 3, 2, 4, 5).reshape(count, (side // factor) ** 2, width * factor**2)


class DiffVLPreTrainedModel(PreTrainedModel):
    config_class = DiffVLConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = False
    _no_split_modules: list[str] = []

    def _init_weights(self, module: nn.Module) -> None:
        """Fresh connector weights; trunk and tower initialise themselves."""
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class DiffVLForConditionalGeneration(DiffVLPreTrainedModel, BlockGeneration, GenerationMixin):
    """`forward` is one pass of the trunk; `generate` (in generation_diffvl) decodes in blocks."""

    def __init__(self, config: DiffVLConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        # The sub-models resolve "auto" settings (attention implementation) into their own copies.
        config.text_config = self.language_model.config
        config.vision_config = self.vision_tower.config
        self.connector = Connector(
            config.connector, config.shuffle_factor, config.vision_config.hidden_size, config.text_config.hidden_size
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pictures [N, 3, S, S] -> image tokens [N, P, H]; a frozen tower runs without a graph."""
        tower_trains = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        arguments: dict[str, Any] = {"output_hidden_states": True}
        if "interpolate_pos_encoding" in inspect.signature(self.vision_tower.forward).parameters:
            arguments["interpolate_pos_encoding"] = True
        with nullcontext() if tower_trains else torch.no_grad():
            pixel_values = pixel_values.to(self.vision_tower.dtype)
            states = self.vision_tower(pixel_values=pixel_values, **arguments).hidden_states[self.config.vision_layer]
        side = self.config.image_size // self.config.vision_config.patch_size
        # Class and register tokens stand before the patches in every stock tower.
        return self.connector(states[:, states.shape[1] - side * side :])

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        image_index: torch.Tensor | None,
        image_features: torch.Tensor | None = None,
        text_only: bool = False,
    ) -> torch.Tensor:
        """Token embeddings with the pictures spliced in, [B, T, H].

        Args:
            text_only: the caller knows that no token shows a picture; else this is looked at, which waits for the device.
            image_index: for each token the row of the flattened image tokens that it shows, -1 for text, [B, T]. Default:
                the placeholders in reading order. A noisy copy of a placeholder names the row of its clean counterpart.
        Raises:
            ValueError: if pictures and placeholders do not match in number.
        """
        embeds = self.get_input_embeddings()(input_ids)
        if text_only:
            return embeds
        is_image = input_ids == self.config.image_token_id
        if image_features is None and pixel_values is not None and pixel_values.shape[0] > 0:
            image_features = self.image_features(pixel_values)
        if image_features is None:
            shown = is_image if image_index is None else image_index >= 0
            if bool(shown.any()):
                raise ValueError(f"{int(is_image.sum())} image tokens in the text, but no pixel_values")
            return embeds
        features = image_features.flatten(0, 1)
        if image_index is None:
            if int(is_image.sum()) != len(features):
                raise ValueError(
                    f"{len(image_features)} pictures give {len(features)} image tokens, the text has {int(is_image.sum())}"
                )
            image_index = image_rows(is_image)
        spliced = features[image_index.clamp_min(0)].to(embeds.dtype)
        return torch.where((image_index >= 0)[..., None], spliced, embeds)

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        store_kv: bool = True,
        pixel_values_videos: None = None,
        image_sizes_videos: None = None,
        image_index: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        logits_rows: torch.Tensor | None = None,
        row_map: Callable[[torch.Tensor, slice], torch.Tensor] | None = None,
        answer_index: torch.Tensor | None = None,
        text_only: bool = False,
    ) -> CausalLMOutputWithPast:
        """One pass of the trunk.

        Args:
            input_ids: [B, T]; placeholders of `image_token_id` stand for image tokens.
            pixel_values: [N, 3, S, S], in reading order of the placeholders.
            image_sizes: [N, 2] original height and width, accepted for callers of SDAR-VL style; only counted, because every
                picture is resized to one square.
            attention_mask: None (causal), [B, K] (1 = token, 0 = padding, causal), [B, T, K] with 1 = attend (key j stands at
                position j; windows are applied on top), or ready-made 4-D masks as `layout_diffvl.attention_masks` gives.
            position_ids: [B, T]; default: counted on from the cache.
            store_kv: False leaves the cache as it was, and still attends to it.
            pixel_values_videos, image_sizes_videos: None; accepted for callers of SDAR-VL style, which always name them.
            image_index, text_only: see `embed`.
            image_features: [N, P, H] as `image_features` gives them, in the place of pixel_values that were encoded before.
            answer_index: not used here; accepted, so that what `processor.apply_chat_template` gives can be passed whole.
            logits_rows: bool [B, T], or int64 [M] indices into the flattened [B * T]; the head runs on these rows only and
                `.logits` is [M, V], in row-major order or in the order of the indices.
            row_map: needs `logits_rows`. The head then runs on a bounded number of rows at a time, and `row_map(logits [m, V],
                which of the M rows)` -> [m, ...] takes their place: `.logits` is what it gave, [M, ...]. Logits are computed
                again in the backward pass where there is more than one such chunk, so they never stand in memory all at once.
        Returns:
            logits [B, T, V] (or [M, V]) and the cache.
        Raises:
            ValueError: on inputs that do not fit together, and on videos.
        """
        refuse_videos(pixel_values_videos=pixel_values_videos, image_sizes_videos=image_sizes_videos)
        if image_sizes is not None and pixel_values is not None and len(image_sizes) != len(pixel_values):
            raise ValueError(f"{len(image_sizes)} image_sizes for {len(pixel_values)} pictures")
        embeds = self.embed(input_ids, pixel_values, image_index, image_features, text_only)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        masks, position_ids = self._masks(attention_mask, position_ids, input_ids.shape, past, embeds)
        cache = past_key_values
        if use_cache and cache is None:
            cache = DynamicCache()
        elif cache is not None and not store_kv:
            cache = ReadingCache(cache)
        trunk_pass = partial(
            self.language_model,
            inputs_embeds=embeds,
            attention_mask=masks,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        if row_map is None:
            with self._head_on(logits_rows):
                output = trunk_pass()
            logits = output.logits if logits_rows is None else output.logits[0]
        else:
            logits = mapped_rows(self.language_model, trunk_pass, _flat_rows(logits_rows), row_map)
        kept = past_key_values if past_key_values is not None else (cache if use_cache else None)
        return CausalLMOutputWithPast(logits=logits, past_key_values=kept)

    def _masks(
        self, mask: Any, position_ids: torch.Tensor | None, shape: torch.Size, past: int, embeds: torch.Tensor
    ) -> tuple[Any, torch.Tensor]:
        """Whatever the caller gave -> masks per layer type and explicit position ids."""
        batch, tokens = shape
        total = past + tokens
        queries = slice(past, total)
        text_config = self.language_model.config
        if isinstance(mask, dict | BlockMask) or (isinstance(mask, torch.Tensor) and mask.dim() == 4):
            if position_ids is None:
                raise ValueError("ready-made masks need explicit position_ids")
            return mask, position_ids
        valid = torch.ones(batch, total, dtype=torch.bool, device=embeds.device)
        if mask is not None and mask.dim() == 2:
            valid = mask.bool()
            if valid.shape[1] != total:
                raise ValueError(f"attention_mask has {valid.shape[1]} columns for {past} cached and {tokens} new tokens")
        block = torch.zeros(batch, total, dtype=torch.long, device=embeds.device)
        layout = clean_layout(block, valid, context="causal")
        if mask is None and position_ids is None and past == 0:
            return None, layout.position  # the trunk's own causal attention, which needs no mask
        if mask is None or mask.dim() == 2:
            if position_ids is not None:
                layout.position = torch.cat([layout.position[:, :past], position_ids], dim=1)
            return attention_masks(text_config, layout, queries, embeds.dtype), layout.position[:, queries]
        if mask.dim() != 3 or mask.shape[-2:] != (tokens, total):
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, expected [{batch}, {tokens}, {total}]")
        if position_ids is None:
            position_ids = layout.position[:, queries]
        given = _GivenMask(**layout.rows, context="causal", mask=mask.bool())
        given.position = torch.cat([layout.position[:, :past], position_ids.expand(batch, tokens)], dim=1)
        return attention_masks(text_config, given, queries, embeds.dtype), position_ids.expand(batch, tokens)

    @contextmanager
    def _head_on(self, rows: torch.Tensor | None) -> Iterator[None]:
        """Lets the trunk's own head (with whatever its forward does after it) run on some rows only."""
        if rows is None:
            yield
            return
        flat = _flat_rows(rows)
        head = self.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, arguments: (arguments[0].flatten(0, 1)[flat][None],))
        try:
            yield
        finally:
            hook.remove()


def _flat_rows(rows: torch.Tensor | None) -> torch.Tensor:
    if rows is None:
        raise ValueError("row_map needs logits_rows")
    return rows.flatten().nonzero()[:, 0] if rows.dtype == torch.bool else rows


class _GivenMask(Layout):
    """A caller's own [B, T, K] mask in the place of the attention rule; windows still apply."""

    def __init__(self, mask: torch.Tensor, context: str, **rows: torch.Tensor) -> None:
        super().__init__(context=context, **rows)
        self.mask = mask

    def allowed(self, queries: slice = slice(None), window: int | None = None, chunk: int | None = None) -> torch.Tensor:
        rows = {**self.rows, "block": torch.zeros_like(self.block)}
        everything = Layout(**rows, context="block").allowed(queries, window, chunk)
        return everything & self.mask
