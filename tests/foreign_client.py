"""A user's program in an environment without diffvl: OUT DIRECTORY..., started by test_invariant_export.py.

It loads each directory with transformers alone, runs SDAR-VL's calling sequence and `generate`, and leaves what came out in
OUT: one JSON line per directory, and the logits of the calling sequence as NUMBER.safetensors.
"""

import json
import sys
from pathlib import Path
from typing import Any


class NoDiffvl:
    """An import hook that makes diffvl look as if it were not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "diffvl":
            raise ModuleNotFoundError(f"No module named {name!r} (kept away by this test)", name=name)


sys.meta_path.insert(0, NoDiffvl())  # type: ignore[arg-type]

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    DynamicCache,
)


def calling_sequence(
    model: Any, input_ids: torch.Tensor, pixel_values: torch.Tensor, blocks: int
) -> tuple[torch.Tensor, list[int]]:
    """SDAR-VL's own: prefill of whole blocks, then for each block a denoising forward that stores nothing, and a commit.

    Returns:
        logits [blocks * B, V] of the denoising forwards, and the tokens of all blocks, the prompt's tail first.
    """
    size, mask_id = model.config.block_size, model.config.mask_token_id
    length = input_ids.shape[1]
    start = length // size * size
    cache = DynamicCache()
    index = torch.arange(start)
    mask = (index[None] // size <= index[:, None] // size).float()[None]
    model(
        input_ids[:, :start],
        pixel_values=pixel_values,
        image_sizes=torch.tensor([[40, 40]]),
        attention_mask=mask,
        position_ids=index[None],
        past_key_values=cache,
        use_cache=True,
        store_kv=True,
    )
    assert cache.get_seq_length() == start > 0
    logits, tokens = [], []
    for number in range(blocks):
        position = torch.arange(start, start + size)[None]
        given = input_ids[:, start:]
        current = torch.cat([given, torch.full((1, size - given.shape[1]), mask_id)], 1)
        arguments = {"attention_mask": torch.ones(1, size, start + size), "position_ids": position, "past_key_values": cache}
        output = model(current, **arguments, use_cache=True, store_kv=False).logits
        assert output.shape[:2] == (1, size) and cache.get_seq_length() == start, "store_kv=False must leave the cache alone"
        logits.append(output[0])
        never = [mask_id, model.config.image_token_id, *range(model.config.vocabulary_size, output.shape[-1])]
        best = output.index_fill(2, torch.tensor(never), float("-inf")).argmax(-1)
        current = torch.where(current == mask_id, best, current)
        tokens += current[0].tolist()
        model(current, **arguments, use_cache=True, store_kv=True)
        start += size
        assert cache.get_seq_length() == start, number
    return torch.cat(logits), tokens


@torch.no_grad()
def visit(directory: str) -> tuple[dict[str, Any], torch.Tensor]:
    model: Any = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True).eval()
    other: Any = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    content = [{"type": "image", "image": Image.new("RGB", (40, 40), "red")}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_tensors="pt")
    logits, tokens = calling_sequence(model, inputs["input_ids"], inputs["pixel_values"], blocks=3)
    length = inputs["input_ids"].shape[1]
    answer = model.generate(**inputs, max_new_tokens=12)[0, length:]
    again = other.generate(**inputs, max_new_tokens=12)[0, length:]
    facts = {
        "classes": [type(part).__name__ for part in (model, other, processor)],
        "module": type(model).__module__,
        "tokens": tokens,
        "answer": answer.tolist(),
        "same": torch.equal(answer, again),
        "text": processor.tokenizer.decode(answer),
        "mask_token": processor.tokenizer.mask_token,
        "recorded": [
            [part.mask_token_id, part.block_size] for part in (model.config, model.config.text_config, model.generation_config)
        ],
    }
    return facts, logits


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    with (out / "facts.jsonl").open("w") as lines:
        for number, directory in enumerate(sys.argv[2:]):
            facts, logits = visit(directory)
            lines.write(json.dumps(facts) + "\n")
            save_file({"logits": logits.contiguous()}, out / f"{number}.safetensors")
    try:
        import diffvl  # noqa: F401
    except ModuleNotFoundError:
        sys.exit(0)
    sys.exit("diffvl could be imported, so nothing is proven")
