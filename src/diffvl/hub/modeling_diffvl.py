"""The DiffVL model: a stock vision tower, a connector and a stock causal-LM trunk, unmodified; or a whole stock vision-language
model, unmodified.

Block attention enters as masks that `layout_diffvl` builds; nothing here knows of noise or loss. These files are copied
beside exported weights and are the remote code that transformers loads there.

Shapes: B batch, T tokens, N images, P tokens of a view, H trunk width, V vocabulary, M rows asked of the head, m rows of a
chunk.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from .adapter_diffvl import WithGatedAdapters
from .arguments_diffvl import refuse_videos
from .cache_diffvl import ReadingCache
from .configuration_diffvl import DiffVLConfig
from .connector_diffvl import Connector, fresh_newline
from .generation_diffvl import BlockGeneration
from .head_diffvl import flat_rows, head_on, last_states, mapped_rows
from .images_diffvl import ImageRows, NativeImages, OwnImages, Shown, is_visual, placed_images, settle_frozen, stock
from .layout_diffvl import Layout, Rope, clean_layout
from .masks_diffvl import GivenMask, attention_masks, check_mask, masks_for
from .spans_diffvl import span_ids
from .tiling_diffvl import NUM_TILES


class DiffVLPreTrainedModel(WithGatedAdapters, PreTrainedModel):
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
    """`forward` is one pass of the trunk; `generate` (in generation_diffvl) decodes in blocks.

    Its parts are `vision_tower`, `connector` and `language_model`; or, for a native vision-language model, `source` alone.
    """

    def __init__(self, config: DiffVLConfig) -> None:
        super().__init__(config)
        if config.source_config is not None:
            self.source = AutoModelForImageTextToText.from_config(config.source_config)
            self.set_source(self.source)
        else:
            self._make_parts(config)
        self.post_init()

    def _make_parts(self, config: DiffVLConfig) -> None:
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        # The sub-models resolve "auto" settings (attention implementation) into their own copies.
        config.text_config = self.language_model.config
        config.vision_config = self.vision_tower.config
        self.connector = Connector(
            config.connector, config.shuffle_factor, config.vision_config.hidden_size, config.text_config.hidden_size
        )
        if config.tiling is not None:
            self.image_newline = fresh_newline(config.text_config.hidden_size)

    def set_source(self, source: Any) -> None:
        """Puts a stock vision-language model in, and its configuration with it."""
        self.source = source
        self.config.source_config = source.config
        self.config.text_config = source.config.get_text_config(decoder=True)
        self.config.text_config.mask_token_id = self.config.mask_token_id
        self.config.text_config.block_size = self.config.block_size

    def set_tiling(self, tiling: dict[str, Any] | None) -> None:
        """Has images cut otherwise (see `DiffVLConfig.tiling`). A model that had no newline gets a fresh one."""
        self.config.set_tiling(tiling)
        if tiling is None:
            self.image_newline = None
        elif getattr(self, "image_newline", None) is None:
            weight = next(self.connector.parameters())
            self.image_newline = fresh_newline(self.config.text_config.hidden_size, weight.dtype).to(weight.device)

    @property
    def is_native(self) -> bool:
        """Whether this is a whole stock vision-language model."""
        return self.config.source_config is not None

    @property
    def trunk(self) -> Any:
        """The stock model that a forward runs: the causal LM, or the native vision-language model."""
        return self.source if self.is_native else self.language_model

    @property
    def images(self) -> OwnImages | NativeImages:
        """How this model looks at images."""
        return NativeImages(self) if self.is_native else OwnImages(self)

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.trunk.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.trunk.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.trunk.set_output_embeddings(new_embeddings)

    def put_trunk(self, trunk: Any) -> None:
        """Puts another object in the place of `trunk`: the same with adapters around it, or without them."""
        setattr(self, "source" if self.is_native else "language_model", trunk)

    def train(self, mode: bool = True) -> "DiffVLForConditionalGeneration":
        """As of any module; but the frozen parts of a native model's vision side stay in `eval`. Some of them change in training
        all the same: statistics of a batch norm, weights that are clamped in place, dropped paths."""
        super().train(mode)
        if mode and self.is_native:
            source = stock(self.source)
            text = {*source.get_decoder().modules(), source.get_input_embeddings(), source.get_output_embeddings()}
            settle_frozen(source, text)
        return self

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Views [N, 3, S, S] of images -> image tokens [N, P, H]; a frozen tower runs without a graph."""
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

    def _shown(self, input_ids: torch.Tensor, rows: ImageRows | None, image_index: torch.Tensor | None) -> torch.Tensor | None:
        """For each token the row of the image tokens that it shows, [B, T]; None where none shows any.

        Args:
            image_index: as the caller gave it; default: the placeholders in reading order.
        Raises:
            ValueError: if images and placeholders do not match in number.
        """
        is_image = is_visual(input_ids, self.config)
        if rows is None:
            shown = is_image if image_index is None else image_index >= 0
            if bool(shown.any()):
                raise ValueError(f"{int(is_image.sum())} image tokens in the text, but no {', '.join(self.config.image_inputs)}")
            return None
        if image_index is not None:
            return image_index
        rows.require(int(is_image.sum()))
        return placed_images(input_ids, self.config)

    def pixels_of(self, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors among a caller's that say what the images are.

        Raises:
            ValueError: for one that this model does not know, if only some are given, and for another number of image_sizes.
        """
        names, videos = self.config.image_inputs, self.config.video_inputs
        known = (*names, *videos, "image_sizes")
        further = [name for name, value in given.items() if name not in known and value is not None]
        if unknown := [name for name in further if not self.images.takes(name)]:
            raise ValueError(f"{unknown[0]} is not known here; expected images as {', '.join(names)}")
        found = _whole("images", names, given)
        if found:  # of some images there may be more than of all
            found |= {name: given[name] for name in further}
        found |= _whole("videos", videos, given)
        sizes, shown = given.get("image_sizes"), given.get("pixel_values")
        # A native model that does not ask for sizes may have packed the patches of its images into one row.
        counts_images = not self.is_native or "image_sizes" in names
        if counts_images and sizes is not None and shown is not None and len(sizes) != len(shown):
            raise ValueError(f"{len(sizes)} image_sizes, but another number of images")
        return found

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
        pixel_values_videos: torch.Tensor | None = None,
        image_sizes_videos: None = None,
        image_index: torch.Tensor | None = None,
        rows: ImageRows | None = None,
        logits_rows: torch.Tensor | None = None,
        row_map: Callable[[torch.Tensor, slice], torch.Tensor] | None = None,
        answer_index: torch.Tensor | None = None,
        text_only: bool = False,
        noisy: torch.Tensor | None = None,
        keep_states: bool = False,
        earlier_states: torch.Tensor | None = None,
        **pixels: Any,
    ) -> CausalLMOutputWithPast:
        """One pass of the trunk.

        Args:
            input_ids: [B, T]; placeholders of `image_token_id` stand for image tokens.
            pixel_values: [N, 3, S, S], in reading order of the placeholders; of a model with tiles [N, views, 3, S, S], of a
                native model what its processor gives.
            image_sizes: [N, 2] original height and width. A model that does not ask for them accepts them for callers of SDAR-VL
                style, and does not need them.
            pixels: the further tensors that say what the images are, by the names in `config.image_inputs`.
            attention_mask: None (causal), [B, K] (1 = token, 0 = padding, causal), [B, T, K] with 1 = attend (key j stands at
                position j; windows are applied on top), or ready-made 4-D masks as `masks_diffvl.attention_masks` gives.
            position_ids: [B, T], the order of the tokens, and their rotation where the trunk has one rotary axis; or [A, B, T],
                the rotation alone. Default: counted on from the cache, images as the trunk numbers them.
            store_kv: False leaves the cache as it was, and still attends to it.
            pixel_values_videos: of a native model that takes videos, what its processor gives; else None. image_sizes_videos:
                None; accepted for callers of SDAR-VL style, which always name both.
            image_index: for each token the row of the image tokens that it shows, -1 for text, [B, T]. Default: the placeholders
                in reading order. A noisy copy of a placeholder names the row of its clean counterpart.
            rows: what `images.encode` gave, in the place of pixels that were encoded before.
            text_only: the caller knows that no token shows an image; else this is looked at, which waits for the device.
            noisy: bool [B, T], of a model with gated adapters: the tokens on which these act. Default: none, and the model is the
                one that the adapters stand on.
            answer_index: not used here; accepted, so that what `processor.apply_chat_template` gives can be passed whole.
            keep_states: the head stays out; `.hidden_states` has the final hidden states [B, T, H], and `.logits` is None.
            earlier_states: such states of all tokens in the cache, which `logits_rows` then counts first in each sample. Needs
                `row_map`.
            logits_rows: bool [B, T], or int64 [M] indices into the flattened [B * T]; the head runs on these rows only and
                `.logits` is [M, V], in row-major order or in the order of the indices.
            row_map: needs `logits_rows`, also of the form [M, k]: the logits of k tokens are then judged together, [m, k, V]. The
                head then runs on a bounded number of rows at a time, and `row_map(logits [m, V], which of the rows)` -> [m, ...]
                takes their place: `.logits` is what it gave, [M, ...]. Logits are computed again in the backward pass where there
                is more than one such chunk, so they never stand in memory all at once.
        Returns:
            logits [B, T, V] (or [M, V]) and the cache.
        Raises:
            ValueError: on inputs that do not fit together, and on videos where the model takes none.
        """
        if self.config.video_token_id is None:
            refuse_videos(pixel_values_videos=pixel_values_videos)
        refuse_videos(image_sizes_videos=image_sizes_videos)
        if noisy is not None and self.gate is None:
            raise ValueError("noisy has no effect: this model has no gated adapters")
        pixels |= {"pixel_values": pixel_values, "image_sizes": image_sizes, "pixel_values_videos": pixel_values_videos}
        seen = self.pixels_of(pixels)
        if rows is None and seen and not text_only:
            rows = self.images.encode(seen)
        shown = None if text_only else self._shown(input_ids, rows, image_index)
        kept = DynamicCache() if use_cache and past_key_values is None else past_key_values
        masks, position_ids = self._masks(attention_mask, position_ids, input_ids, kept, seen, rows)
        cache = kept if kept is None or store_kv or past_key_values is None else ReadingCache(kept)
        inputs = self.images.arguments(input_ids, rows, shown)
        inputs = {**inputs, "position_ids": position_ids, "past_key_values": cache, "use_cache": cache is not None}
        with nullcontext() if self.gate is None else self.gate.opened(noisy):
            if keep_states:
                states = last_states(self.trunk, self._pass(inputs, masks))
                return CausalLMOutputWithPast(hidden_states=(states,), past_key_values=kept)
            logits = self._logits(self._pass(inputs, masks), logits_rows, row_map, earlier_states)
        return CausalLMOutputWithPast(logits=logits, past_key_values=kept)

    def _pass(self, inputs: dict[str, Any], masks: Any) -> Callable[[], Any]:
        """What runs the trunk on these inputs."""

        def trunk_pass() -> Any:
            with masks_for(self.trunk, masks, self.config.masks_at) as given:
                return self.trunk(**inputs, attention_mask=given)

        return trunk_pass

    def _logits(
        self,
        trunk_pass: Callable[[], Any],
        rows: torch.Tensor | None,
        row_map: Callable[[torch.Tensor, slice], torch.Tensor] | None,
        earlier: torch.Tensor | None,
    ) -> torch.Tensor:
        """The trunk's logits, or what `row_map` makes of them; see `forward`."""
        if row_map is not None:
            return mapped_rows(self.trunk, trunk_pass, flat_rows(rows), row_map, earlier)
        if earlier is not None:
            raise ValueError("earlier_states needs row_map")
        with head_on(self.trunk, rows):
            logits = trunk_pass().logits
        return logits if rows is None else logits[0]

    def _masks(
        self,
        mask: Any,
        position_ids: torch.Tensor | None,
        input_ids: torch.Tensor,
        cache: Cache | None,
        pixels: dict[str, torch.Tensor],
        rows: ImageRows | None,
    ) -> tuple[Any, torch.Tensor]:
        """Whatever the caller gave -> masks per layer type and rotary position ids."""
        if isinstance(mask, dict | BlockMask) or (isinstance(mask, torch.Tensor) and mask.dim() == 4):
            if position_ids is None:
                raise ValueError("ready-made masks need explicit position_ids")
            return mask, position_ids
        batch, tokens = input_ids.shape
        past = cache.get_seq_length() if cache is not None else 0
        total, device = past + tokens, input_ids.device
        queries = slice(past, total)
        valid = torch.ones(batch, total, dtype=torch.bool, device=device)
        if mask is not None:
            check_mask(mask, batch, tokens, total)
            valid = mask.bool() if mask.dim() == 2 else valid
        layout = clean_layout(torch.zeros(batch, total, dtype=torch.long, device=device), valid, context="causal")
        if not past:
            self._mark_spans(layout, input_ids)
        order = layout.position[:, queries]
        if position_ids is not None and position_ids.dim() == 2:
            order = position_ids.expand(batch, tokens)
        rope = position_ids if position_ids is not None and position_ids.dim() == 3 else None
        if rope is None:
            rope = self._rope(input_ids, valid, cache, pixels, rows).at(order)
        if mask is None and position_ids is None and past == 0 and layout.span is None:
            return None, rope  # the trunk's own causal attention, which needs no mask
        layout.position = torch.cat([layout.position[:, :past], order], dim=1)
        if mask is not None and mask.dim() == 3:
            layout = GivenMask(layout, mask.bool())
        table: Any = self.get_input_embeddings()
        return attention_masks(self.config.text_config, layout, queries, table.weight.dtype), rope

    def _mark_spans(self, layout: Layout, input_ids: torch.Tensor) -> None:
        """Lets the image tokens of a prompt see each other as the trunk wants it."""
        nothing = torch.zeros_like(input_ids)
        is_image = is_visual(input_ids, self.config)
        layout.span = span_ids(is_image, nothing, layout.valid, nothing.bool(), self.config.image_attention)
        layout.image_attention = self.config.image_attention

    def _rope(
        self,
        input_ids: torch.Tensor,
        valid: torch.Tensor,
        cache: Cache | None,
        pixels: dict[str, torch.Tensor],
        rows: ImageRows | None,
    ) -> Rope:
        """Position ids of tokens that a caller gave none for. A cache remembers those of the prompt that began it: text after it
        goes on from there."""
        if not self.images.has_axes:
            return Rope(first=self.config.first_position)
        if cache is not None and cache.get_seq_length():
            known = getattr(cache, "rope", None)
            if known is None or pixels:
                raise ValueError(
                    "after this cache the model needs position_ids [axes, batch, tokens]: its rotation is not the order"
                )
            return known
        rope = self.images.rope(input_ids, valid, pixels, Shown.in_text(input_ids, valid, rows, self.config))
        if cache is not None:
            cache.rope = rope  # type: ignore[attr-defined]
        return rope


def _whole(what: str, names: Sequence[str], given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of these names; {} where there are none, or nothing is in them. Raises ValueError for some of them alone."""
    found = {name: given[name] for name in names if given.get(name) is not None}
    if not found.keys() - {"image_sizes"}:
        return {}
    if missing := [name for name in names if name not in found and name != NUM_TILES]:
        raise ValueError(f"{what} without {missing[0]}; expected them as {', '.join(names)}")
    return found if all(len(value) for value in found.values()) else {}
