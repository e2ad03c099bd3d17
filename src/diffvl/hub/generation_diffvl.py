"""Decoding in blocks over a KV prefix that is never recomputed.

A block starts as mask tokens, is denoised in a few forwards that only read the cache, and is then committed: one more
forward of the finished block stores its keys and values (SDAR, arXiv 2510.06303; DiffusionVL, arXiv 2512.15713, section 3).
The attention of every forward comes from the same `Layout` rule as in training; tests/test_invariant_decoding.py holds
the two against each other.

Shapes: B batch, L prompt length, D block size, C committed tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
)
from transformers.utils.generic import ModelOutput

from .layout_diffvl import Layout, attention_masks, block_end, block_index, segment_start
from .sampling_diffvl import Sampling, check_settings, choose, picker, sampling_of


class BlockCache(DynamicCache):
    """A plain full-length cache that can be read without being written.

    Windows live in the masks, so every layer keeps all tokens; `store` False gives the incoming keys and values to the
    attention but forgets them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.store = True

    @classmethod
    def reading(cls, cache: DynamicCache) -> "BlockCache":
        """A read-only view of another cache, sharing its tensors."""
        if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
            raise ValueError("store_kv=False needs a cache of plain layers: build it as DynamicCache() without a config")
        view = cls()
        view.layers = cache.layers
        view.store = False
        return view

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.store:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx >= len(self.layers) or not getattr(self.layers[layer_idx], "is_initialized", False):
            return key_states, value_states
        layer: Any = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)


@dataclass
class BlockGenerationOutput(ModelOutput):
    """sequences: [B, L + new] prompt and answer, padded after the stop. forwards: passes of the trunk. tokens: answer
    tokens up to and including the stop, summed over the batch."""

    sequences: torch.Tensor | None = None
    forwards: int | None = None
    tokens: int | None = None


class BlockDecoder:
    """The state of one batch between forwards: the cache, the layout of what is in it, and the open block.

    Attributes:
        ids_BD: the open block; position_BD, index_BD, valid_BD: its rows (a first block may be shorter than D).
    """

    def __init__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        valid: torch.Tensor,
        answer_index: torch.Tensor,
        pixel_values: torch.Tensor | None,
    ) -> None:
        """`valid` [B, L] marks prompt tokens; `answer_index` [B, L] the earlier answers in the prompt (see block_index)."""
        self.model, self.config = model, model.config
        self.cache = BlockCache()
        self.layout: Layout | None = None
        self.last_logits: torch.Tensor | None = None
        self.forwards = 0
        self.pixel_values = pixel_values
        self._lay_out_prompt(input_ids, valid, answer_index)
        pictures, found = 0 if pixel_values is None else len(pixel_values), int((self.image_index >= 0).sum())
        if found != pictures * self.config.image_tokens:
            raise ValueError(f"{pictures} pictures give {pictures * self.config.image_tokens} image tokens, the text has {found}")

    def _lay_out_prompt(self, input_ids: torch.Tensor, valid: torch.Tensor, answer_index: torch.Tensor) -> None:
        """Rows of the prompt, right-padded, with the first token of the new answer behind it to find its block."""
        device = input_ids.device
        lengths = valid.sum(1)
        order = torch.argsort((~valid).long(), dim=1, stable=True)
        pad = torch.zeros(len(input_ids), 1, dtype=torch.long, device=device)
        self.prompt_ids = torch.cat([input_ids.gather(1, order), pad], 1)
        answers = torch.cat([answer_index.gather(1, order), pad], 1)
        index = torch.arange(self.prompt_ids.shape[1], device=device)[None]
        # Past the prompt everything counts as the new answer.
        answers = torch.where(index >= lengths[:, None], answers.max(1, keepdim=True).values + 1, answers)
        self.prompt_block = block_index(answers, self.config.block_size, self.config.grid)
        at_end = lengths[:, None]
        block_of_answer = self.prompt_block.gather(1, at_end)
        self.prompt_length = lengths
        self.block_number = block_of_answer[:, 0]
        self.start = (self.prompt_block < block_of_answer).sum(1)
        starts = segment_start(answers, self.config.grid).gather(1, at_end)
        self.end = block_end(at_end, starts, self.config.block_size, self.config.grid)[:, 0]
        self.image_index = self._image_rows(self.prompt_ids, index < lengths[:, None])
        self.vision_features_due = self.pixel_values is not None

    def _image_rows(self, ids: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        is_image = (ids == self.config.image_token_id) & valid
        return torch.where(is_image, is_image.flatten().long().cumsum(0).view_as(ids) - 1, -1)

    def prefill(self) -> None:
        """Stores the prompt up to the first open block; nothing to do when that block is the first of all."""
        longest = int(self.start.max())
        if longest == 0:
            return
        index = torch.arange(longest, device=self.start.device).expand(len(self.start), longest)
        rows = Layout(
            position=index,
            block=self.prompt_block[:, :longest],
            noisy=torch.zeros_like(index, dtype=torch.bool),
            valid=index < self.start[:, None],
            document=torch.zeros_like(index),
            context=self.config.context,
        )
        self._forward(self.prompt_ids[:, :longest], rows, self.image_index[:, :longest], store=True)

    def open_block(self) -> None:
        """Lays out the next block: on the first call the prompt's tail (if the grid cuts there) and mask tokens."""
        size = self.config.block_size
        offset = torch.arange(size, device=self.start.device)[None]
        self.position_BD = self.start[:, None] + offset
        self.valid_BD = self.position_BD < self.end[:, None]
        in_prompt = self.position_BD < self.prompt_length[:, None]
        safe = self.position_BD.clamp_max(self.prompt_ids.shape[1] - 1)
        mask_id = torch.full_like(self.position_BD, self.config.mask_token_id)
        self.ids_BD = torch.where(in_prompt, self.prompt_ids.gather(1, safe), mask_id)
        self.image_BD = torch.where(in_prompt, self.image_index.gather(1, safe), -1)
        self.open_BD = self.valid_BD & ~in_prompt

    def block_logits(self) -> torch.Tensor:
        """Prediction for every token of the open block, [B, D, V] in fp32, reading the cache only."""
        if self.config.target == "same":
            return self._forward(self.ids_BD, self._block_rows(noisy=True), self.image_BD, store=False)
        if bool((self.open_BD[:, 0] & (self.start == 0)).any()):
            raise ValueError("target 'shift' predicts a token from the one before it, but the prompt is empty")
        if self.ids_BD.shape[1] == 1 and self.last_logits is not None:
            return self.last_logits[:, None]
        logits = self._forward(self.ids_BD, self._block_rows(noisy=True), self.image_BD, store=False)
        # Nothing is committed before a first block that holds the whole prompt; its first token is then given, not predicted.
        first = torch.zeros_like(logits[:, 0]) if self.last_logits is None else self.last_logits
        return torch.cat([first[:, None], logits[:, :-1]], dim=1)

    def commit(self) -> None:
        """Stores the finished block as clean tokens and moves on to the next."""
        self._forward(self.ids_BD, self._block_rows(noisy=False), self.image_BD, store=True)
        self.start = self.end
        self.end = self.end + self.config.block_size
        self.block_number = self.block_number + 1

    def _block_rows(self, noisy: bool) -> Layout:
        flags = torch.full_like(self.valid_BD, noisy)
        block = self.block_number[:, None].expand_as(self.position_BD)
        document = torch.zeros_like(block)
        return Layout(self.position_BD, block, flags, self.valid_BD, document, self.config.context)

    def _forward(self, ids: torch.Tensor, rows: Layout, image_index: torch.Tensor, store: bool) -> torch.Tensor:
        past = 0 if self.layout is None else self.layout.position.shape[1]
        layout = rows if self.layout is None else self.layout.joined(rows)
        embed_dtype = self.model.get_input_embeddings().weight.dtype
        masks = attention_masks(self.model.language_model.config, layout, slice(past, None), embed_dtype)
        shows_image = bool((image_index >= 0).any())
        wanted = rows.valid if not store else self._last_rows(rows)
        logits = self.model(
            ids,
            pixel_values=self.pixel_values if shows_image else None,
            image_index=image_index if shows_image else None,
            attention_mask=masks,
            position_ids=rows.position,
            past_key_values=self.cache,
            store_kv=store,
            logits_rows=wanted,
        ).logits.float()
        self.forwards += 1
        if not store:
            full = logits.new_zeros(*ids.shape, logits.shape[-1])
            full[wanted] = logits
            return full
        self.layout = layout
        has_row = wanted.any(1)
        last = logits.new_zeros(len(ids), logits.shape[-1]) if self.last_logits is None else self.last_logits
        last[has_row] = logits
        self.last_logits = last
        return logits

    @staticmethod
    def _last_rows(rows: Layout) -> torch.Tensor:
        """The last valid token of each row: what the shift target needs of a commit."""
        index = torch.arange(rows.valid.shape[1], device=rows.valid.device)
        last = torch.where(rows.valid, index, -1).max(1, keepdim=True).values
        return (index[None] == last) & rows.valid


class BlockGeneration:
    """`generate` for a DiffVL model."""

    config: Any
    generation_config: GenerationConfig | None

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        answer_index: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        max_new_tokens: int | None = None,
        denoising_steps: int | None = None,
        remasking: str = "low_confidence_static",
        threshold: float | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        use_cache: bool = True,
        num_beams: int = 1,
        return_dict_in_generate: bool = False,
        **unknown: Any,
    ) -> torch.Tensor | BlockGenerationOutput:
        """Decodes answers block by block.

        Args:
            input_ids: [B, L] prompts, padded left or right; attention_mask: [B, L], 1 = token.
            answer_index: [B, L], 0 outside and k inside the k-th earlier answer of the conversation, as
                `processor.apply_chat_template` gives it. Default: the prompt has no earlier answers.
            max_new_tokens: default from `generation_config`, else 128.
            denoising_steps: forwards per block, 1 to D; default D.
            remasking: "low_confidence_static" or "low_confidence_dynamic" (with `threshold`, default 0.9).
            do_sample, temperature, top_k, top_p: as in transformers; not given, they come from `generation_config`. Without any,
                or at temperature 0, decoding is greedy.
            seed: of the sampling generator.
            eos_token_id, pad_token_id: default: the checkpoint's.
            use_cache, num_beams: accepted at their neutral values, because callers of transformers pass them.
        Raises:
            ValueError: on settings that do not fit together.
        """
        config = self.config
        settings = generation_config or self.generation_config
        limit = int(getattr(settings, "max_new_tokens", None) or 128) if max_new_tokens is None else max_new_tokens
        if limit < 1:
            raise ValueError(f"max_new_tokens is {limit}, expected 1 or more")
        if unknown or not use_cache or num_beams != 1:
            odd = [*unknown, *(["use_cache=False"] if not use_cache else []), *(["num_beams"] if num_beams != 1 else [])]
            raise ValueError(f"block decoding knows no {', '.join(odd)}")
        sampling = sampling_of(settings, Sampling(do_sample, temperature, top_k, top_p))
        steps = denoising_steps if denoising_steps is not None else config.block_size
        check_settings(steps, config.block_size, remasking, threshold, sampling.temperature or 0.0)
        if remasking == "low_confidence_dynamic" and threshold is None:
            threshold = 0.9
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if answer_index is None:
            answer_index = torch.zeros_like(input_ids)
        if image_sizes is not None and (pixel_values is None or len(image_sizes) != len(pixel_values)):
            raise ValueError(f"{len(image_sizes)} image_sizes, but another number of pictures")
        decoder = BlockDecoder(self, input_ids, valid, answer_index, pixel_values)
        pick = picker(sampling, seed, input_ids.device, config)
        stops = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or config.stop_token_ids
        answers = self._decode(decoder, steps, threshold, limit, pick, stops)
        tokens = sum(len(answer) for answer in answers)
        pad = pad_token_id if pad_token_id is not None else getattr(settings, "pad_token_id", None)
        sequences = _sequences(input_ids, answers, pad, stops)
        if return_dict_in_generate:
            return BlockGenerationOutput(sequences=sequences, forwards=decoder.forwards, tokens=tokens)
        return sequences

    def _decode(
        self,
        decoder: BlockDecoder,
        steps: int,
        threshold: float | None,
        max_new_tokens: int,
        pick: Any,
        stops: list[int],
    ) -> list[list[int]]:
        """The block loop: open, denoise, collect, commit. Returns each row's answer, cut after its stop."""
        answers: list[list[int]] = [[] for _ in range(len(decoder.prompt_ids))]
        finished = [False] * len(answers)
        decoder.prefill()
        while True:
            decoder.open_block()
            _denoise(decoder, steps, threshold, pick)
            for row, answer in enumerate(answers):
                if not finished[row]:
                    answer.extend(decoder.ids_BD[row][decoder.open_BD[row]].tolist())
                    finished[row] = _cut(answer, stops, max_new_tokens)
            if all(finished):
                return answers
            decoder.commit()


def _denoise(decoder: BlockDecoder, steps: int, threshold: float | None, pick: Any) -> None:
    """Fills the open block in at most `steps` forwards; each step settles at least its share of the masks."""
    masked = decoder.open_BD.clone()
    count = masked.sum(1)
    for step in range(steps):
        # The remainder goes to the first steps, as in SDAR.
        quota = count // steps + (step < count % steps).long()
        if not bool(masked.any()):
            return
        if int(quota.max()) == 0:
            continue
        ids, confidence = pick(decoder.block_logits())
        quota = torch.minimum(quota, masked.sum(1))
        chosen = choose(confidence, masked, quota, threshold)
        decoder.ids_BD = torch.where(chosen, ids, decoder.ids_BD)
        masked = masked & ~chosen


def _cut(answer: list[int], stops: list[int], max_new_tokens: int) -> bool:
    """Trims an answer in place after its first stop token or at the limit; True if it is finished."""
    for place, token in enumerate(answer[:max_new_tokens]):
        if token in stops:
            del answer[place + 1 :]
            return True
    if len(answer) >= max_new_tokens:
        del answer[max_new_tokens:]
        return True
    return False


def _sequences(input_ids: torch.Tensor, answers: list[list[int]], pad_token_id: Any, stops: list[int]) -> torch.Tensor:
    """Prompts with their answers behind them, [B, L + longest answer]."""
    pad = pad_token_id if isinstance(pad_token_id, int) else stops[0]
    longest = max(len(answer) for answer in answers)
    rows = [answer + [pad] * (longest - len(answer)) for answer in answers]
    return torch.cat([input_ids, torch.tensor(rows, dtype=torch.long, device=input_ids.device)], dim=1)
