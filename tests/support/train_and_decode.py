"""Holds what training computes for a block against what decoding computes for it.

Training's logits are taken from `block_diffusion` itself, through a spy in the place of the model; decoding's from
`BlockDecoder`, with its cache, on the prompt as the processor renders it for decoding.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from helpers import CONTEXTS, GRIDS, TARGETS, batch, objective, random_image
from shared_fixtures import Loaded
from transformers.modeling_outputs import CausalLMOutputWithPast

from diffvl.data.samples import Sample, collate
from diffvl.hub.chat_diffvl import arranged
from diffvl.hub.decoder_diffvl import BlockDecoder
from diffvl.hub.layout_diffvl import block_index, noisy_stream
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.hub.processing_diffvl import DiffVLProcessor, pixels_in
from diffvl.objective.losses import Draw, block_diffusion, corrupt

SETTINGS = list(itertools.product(CONTEXTS, GRIDS, TARGETS))
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "Now?"}, {"type": "image", "image": random_image()}]},
    {"role": "assistant", "content": "A red circle and, to the right, 2 blue stars."},
    {"role": "user", "content": "What else?"},
    {"role": "assistant", "content": "Nothing else is in this picture, of that I am sure, and I have looked twice."},
]
OTHER: list[dict[str, Any]] = [
    {"role": "user", "content": "A longer question, without any picture, so that the other sample of the batch is padded. " * 2},
    {"role": "assistant", "content": "Yes."},
]


class Spy:
    """Stands for the model in `block_diffusion` and keeps the logits that it was asked for."""

    def __init__(self, model: DiffVLForConditionalGeneration) -> None:
        self.model, self.logits, self.images = model, torch.empty(0), model.images

    def __call__(self, **arguments: Any) -> CausalLMOutputWithPast:
        judge = arguments.pop("row_map")
        output = self.model(**arguments)
        self.logits = output.logits
        output.logits = judge(self.logits, slice(0, len(self.logits)))
        return output


def training_sample(processor: DiffVLProcessor, messages: list[dict[str, Any]], index: int) -> Sample:
    encoding = processor.encode_chat(messages)
    images, clips = images_in(messages), images_in(messages, "video")
    contents = [turn["content"] for turn in messages if isinstance(turn["content"], list)]
    shown = [part[part["type"]] for content in contents for part in content if part["type"] != "text"]
    pixels = processor.pixels(arranged(encoding.shown, shown) if processor.asks_sizes else shown, encoding.alone) or None
    return Sample(encoding.ids, encoding.answer, pixels, index, len(images), len(clips))


def images_in(messages: list[dict[str, Any]], kind: str = "image") -> list[Any]:
    contents = [turn["content"] for turn in messages if isinstance(turn["content"], list)]
    return [part[kind] for content in contents for part in content if kind in part]


@torch.no_grad()
def compare(
    loaded: Loaded,
    block_size: int,
    context: str,
    grid: str,
    target: str,
    trained: tuple[int, ...] = (1, 2),
    chat: list[dict[str, Any]] = CHAT,
    beside: Sequence[list[dict[str, Any]]] = (OTHER,),
    packed: bool = False,
) -> list[bool]:
    """Holds every block of the trained answers (the first, the second) of a chat against decoding; returns, per answer, whether
    its first block shows an image.

    Args:
        beside: other chats in the batch, in rows of their own or (packed) all in one.
    """
    model, processor = loaded
    model.config.set_decoding("blocks", block_size, context, grid, target)
    noise = {"schedule": "uniform", "t_min": 0.4, "t_max": 0.9}
    settings = objective(block_size=block_size, context=context, grid=grid, target=target, noise=noise)
    first = training_sample(processor, chat, 5)
    first = replace(first, answer=[mark if mark in (0, *trained) else -mark for mark in first.answer])
    others = [training_sample(processor, other, 6 + number) for number, other in enumerate(beside)]
    both: Any = collate([[first, *others]], pad_token_id=0) if packed else batch([first, *others])
    draw = Draw(seed=1, step=0, progress=0.0)
    # 1. Training: logits of the masked tokens, by the place that the stream gives them.
    spy = Spy(model)
    block_diffusion(spy, model.config, both, settings, draw)
    block = block_index(both["answer_index"], block_size, grid)
    stream = noisy_stream(both["answer_index"], block, block_size, grid)
    masked = corrupt(stream, settings, draw, both["sample"])[0].masked
    logits_of = dict(zip(map(tuple, masked.nonzero().tolist()), spy.logits, strict=True))
    # 2. Decoding: the same blocks, opened in the same state.
    truth = both["input_ids"].gather(1, stream.source)[0]
    shows_image, compared = [], 0
    for turn in (2 * number - 1 for number in trained):
        inputs = processor.apply_chat_template(chat[:turn], tokenize=True, add_generation_prompt=True)
        decoder = BlockDecoder(
            model, inputs["input_ids"], inputs["attention_mask"].bool(), inputs["answer_index"], pixels_in(inputs)
        )
        decoder.prefill()
        of_answer = (both["answer_index"].gather(1, stream.source)[0] == (turn + 1) // 2) & stream.valid[0]
        blocks = stream.block[0][of_answer].unique().tolist()
        assert len(blocks) > 1
        for number, index in enumerate(blocks):
            opened = decoder.block
            places = ((stream.block[0] == index) & stream.valid[0]).nonzero()[:, 0]
            size = len(places)
            assert opened.position_BD[0, opened.valid_BD[0]].tolist() == stream.position[0, places].tolist()
            assert opened.open_BD[0, :size].tolist() == stream.eligible[0, places].tolist()
            prompt = ~opened.open_BD[0, :size]
            assert torch.equal(opened.ids_BD[0, :size][prompt], truth[places][prompt])
            if number == 0:
                shows_image.append(bool((opened.image_index_BD >= 0).any()))
            opened.ids_BD[0, :size] = truth[places].masked_fill(masked[0, places], model.config.mask_token_id)
            logits = decoder.block_logits()[0]
            for offset, place in enumerate(places.tolist()):
                if masked[0, place]:
                    expected = logits_of[0, place]
                    torch.testing.assert_close(logits[offset], expected, rtol=1e-4, atol=1e-4)
                    compared += 1
            opened.ids_BD[0, :size] = truth[places]
            decoder.commit()
    assert compared == int(masked[0].sum()) > 20
    return shows_image
