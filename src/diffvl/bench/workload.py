"""What `diffvl bench decode` decodes: a model with random weights and random prompts, or a checkpoint and questions.

Random weights measure the engine: only its limit ends an answer, so every decoder makes the same tokens at a fixed number per
step. A trained checkpoint measures the whole, with its own stops.
"""

from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from diffvl.bench.decoders import NEVER, Prompts
from diffvl.bench.published_decoder import require_same_target
from diffvl.bench.random_model import NUM_SPECIAL, STOP_TOKEN, TrunkSize, build_model
from diffvl.config.recipe import Data
from diffvl.data.records import iterate_records
from diffvl.data.samples import chat_before
from diffvl.decode.answer import Decoder, context_length, encode, load_for_decoding
from diffvl.errors import UsageError
from diffvl.evaluation.evaluate import reading_of
from diffvl.evaluation.questions import answer_turns
from diffvl.hub.processing_diffvl import pixels_in

# Tokens of the prompts of a batch, repeated for larger ones; the first is that of batch 1.
PROMPT_LENGTHS = (96, 64, 128, 80, 112, 72, 120, 88)
PROMPTS = (
    "Describe a harbour at sunrise.",
    "Which three things should a beginner know about growing tomatoes?",
    "Explain how a bicycle stays upright.",
    "Write a short letter to a friend who has moved to another town.",
)
# The std of the weights times the square root of the width. A fresh model's 0.02 is too small at these widths: every position
# predicts the same then, and any order of settling looks right.
WEIGHT_GAIN = 2.0


@dataclass(frozen=True)
class Workload:
    """A model and its prompts. prompts: as many as the largest batch, and no fewer than `num_decoded`, which is how many are
    decoded at any batch size that is smaller. name: of the model, in words."""

    model: Any
    prompts: Prompts
    num_decoded: int
    name: str

    def groups(self, batch: int) -> list[Prompts]:
        """Splits the prompts into batches of this size: as many as hold `num_decoded` prompts, or one."""
        count = max(self.num_decoded // batch, 1)
        return [self.prompts.part(place * batch, (place + 1) * batch) for place in range(count)]


def random_workload(
    size: TrunkSize, block_size: int, context: str, batch: int, tokens: int, device: torch.device, dtype: torch.dtype, seed: int
) -> Workload:
    """Draws weights, and prompts of whole blocks, so that every block is full of masks; absolute grid, target same."""
    model = build_model(size, device, dtype, seed, std=WEIGHT_GAIN / size.hidden**0.5).eval()
    model.config.set_decoding("blocks", block_size, context, "absolute", "same")
    lengths = [max(length // block_size, 1) * block_size for length in islice(cycle(PROMPT_LENGTHS), batch)]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(STOP_TOKEN + 1, size.vocabulary - NUM_SPECIAL, (batch, max(lengths)), generator=generator)
    valid = torch.arange(max(lengths))[None] >= max(lengths) - torch.tensor(lengths)[:, None]
    prompts = Prompts(ids.to(device), valid.to(device), tokens, frozenset({NEVER}))
    sizes = f"hidden {size.hidden}, layers {size.layers}, heads {size.heads}, kv heads {size.kv_heads}, "
    sizes += f"intermediate {size.intermediate}, vocabulary {size.vocabulary}"
    return Workload(model, prompts, 1, f"random weights, llama-like, {sizes}, tied")


def checkpoint_workload(
    directory: Path, data: Path | None, batch: int, num_decoded: int, tokens: int, device: torch.device
) -> Workload:
    """Loads a checkpoint and the first questions of the file (or a few of this module's), repeated where more are needed.

    Raises:
        CheckpointError, DataError: if directory or file are not what they should be.
        UsageError: if the checkpoint does not decode in blocks, or a prompt does not fit its context.
    """
    decoder = load_block_decoder(directory, device)
    config = decoder.model.config
    require_same_target(config)
    count = max(batch, num_decoded)
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    if data is not None:
        chats = first_questions(data, count, reading_of(directory, data))
    chats = list(islice(cycle(chats), count))
    inputs = encode(decoder, chats).to(device)
    length, limit = inputs["input_ids"].shape[1], context_length(decoder)
    if limit is not None and length + tokens > limit:
        raise UsageError(
            f"a prompt of {length} tokens and {tokens} new ones do not fit the context of {limit}: lower --max-new-tokens or "
            "take data with shorter prompts"
        )
    valid = inputs["attention_mask"].bool()
    images = tuple(pixels_in(encode(decoder, [chat]).to(device)) for chat in chats)
    prompts = Prompts(inputs["input_ids"], valid, tokens, frozenset(config.stop_token_ids), images)
    return Workload(decoder.model, prompts, num_decoded, f"{directory} ({config.text_config.model_type})")


def load_block_decoder(directory: Path, device: torch.device) -> Decoder:
    """Loads a checkpoint. Raises UsageError for one that has only seen the next-token objective."""
    decoder = load_for_decoding(directory)
    if decoder.model.config.decoding != "blocks":
        raise UsageError(
            f"{directory}: the checkpoint decodes token by token (it has seen no block-diffusion stage): train one with "
            "`diffvl convert --stage diffuse` and name that directory"
        )
    decoder.model.to(device)
    return decoder


def first_questions(data: Path, count: int, reading: Data) -> list[list[dict[str, Any]]]:
    """Reads the first question of each of the first records, and nothing after them."""
    records = islice(iterate_records(data, reading.image_folder, reading.unpaired_turns), count)
    return [chat_before(record, next(answer_turns(record))) for record in records]
