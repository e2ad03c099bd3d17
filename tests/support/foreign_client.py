"""A user's program in an environment without diffvl: OUT DIRECTORY..., started by test_export.py.

It loads each directory with transformers alone, runs SDAR-VL's calling sequence and `generate`, and leaves what came out in
OUT: one JSON line per directory, and the logits of the calling sequence as NUMBER.safetensors.
"""

import itertools
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

STRATEGIES = ("low_confidence_static", "low_confidence_dynamic", "sequential")
THRESHOLD = 0.2  # random weights are seldom surer


def calling_sequence(model: Any, inputs: dict[str, Any], new: int, steps: int, strategy: str) -> tuple[torch.Tensor, list[int]]:
    """SDAR-VL's own, keyword for keyword (batch 1, blocks counted from the first token): a prefill of the prompt's whole blocks,
    if there are any; then for each block denoising forwards that store nothing, and a commit.

    Two things of it are left out, for random weights would trip over them: it may predict the mask token, and where fewer masks
    are left than a step settles it settles given tokens anew.

    Returns:
        logits [blocks * B, V] of each block's first denoising forward, and the tokens of these blocks, the prompt's tail first.
    """
    size, mask_id, length = model.config.block_size, model.config.mask_token_id, inputs["input_ids"].shape[1]
    count = -(-(length + new) // size)
    block_mask = torch.tril(torch.ones(count, count)).repeat_interleave(size, 0).repeat_interleave(size, 1)[None]
    position_ids = torch.arange(count * size)[None]
    x = torch.full((1, count * size), mask_id)
    x[:, :length] = inputs["input_ids"]
    start = length // size * size
    cache = DynamicCache()
    if start:
        model(
            input_ids=x[:, :start],
            pixel_values=inputs.get("pixel_values"),
            image_sizes=inputs.get("image_sizes"),
            pixel_values_videos=inputs.get("pixel_values_videos"),
            image_sizes_videos=inputs.get("image_sizes_videos"),
            attention_mask=block_mask[:, :start, :start],
            position_ids=position_ids[:, :start],
            past_key_values=cache,
            use_cache=True,
            store_kv=True,
        )
    logits = []
    for begin in range(start, count * size, size):
        assert cache.get_seq_length() == begin
        block = slice(begin, begin + size)
        arguments = {
            "attention_mask": block_mask[:, block, : block.stop],
            "position_ids": position_ids[:, block],
            "past_key_values": cache,
            "use_cache": True,
        }
        current = x[:, block].clone()
        for step in range(steps + 1):
            masked = current == mask_id
            if not masked.any():
                model(current, **arguments, store_kv=True)
                break
            output = model(current, **arguments, store_kv=False).logits
            assert output.shape[:2] == (1, size) and cache.get_seq_length() == begin, "store_kv=False must leave the cache alone"
            if step == 0:
                logits.append(output[0])
            quota = size // steps + (step < size % steps)
            current = settled(model, output, current, masked, min(quota, int(masked.sum())), strategy)
        x[:, block] = current
    return torch.cat(logits).float(), x[0, start:].tolist()


def settled(
    model: Any, logits: torch.Tensor, current: torch.Tensor, masked: torch.Tensor, quota: int, strategy: str
) -> torch.Tensor:
    """The block [1, B] after a step of one of SDAR-VL's three remasking strategies, greedily."""
    config = model.config
    never = [config.mask_token_id, config.image_token_id, *range(config.vocabulary_size, logits.shape[-1])]
    confidence, best = logits.index_fill(2, torch.tensor(never), float("-inf")).softmax(-1).max(-1)
    confidence = torch.where(masked, confidence, -torch.inf)
    chosen = torch.zeros_like(masked)
    if strategy == "sequential":
        first = int(masked[0].nonzero()[0])
        chosen[:, first : first + quota] = True
    else:
        chosen[0, confidence[0].topk(quota).indices] = True
    if strategy == "low_confidence_dynamic":
        chosen = chosen | (confidence > THRESHOLD)
    return torch.where(chosen, best, current)


def answers(model: Any, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """What the calling sequence and `generate` answer with each strategy, to prompts that end inside a block and at its end,
    with fewer steps where SDAR-VL's quotas and ours agree, and to a prompt shorter than a block."""
    size, found = model.config.block_size, []
    ids = inputs["input_ids"]
    spaces = ids[:, -1:].expand(1, -ids.shape[1] % size)
    aligned = {**inputs, "input_ids": torch.cat([ids, spaces], 1)}
    short = {"input_ids": ids[:, :1]}
    cases = [(inputs, size), (inputs, 1), (aligned, size), (aligned, 2), (short, size)]
    for (given, steps), strategy in itertools.product(cases, STRATEGIES):
        length = given["input_ids"].shape[1]
        _, tokens = calling_sequence(model, given, 2 * size, steps, strategy)
        tokens = tokens[length % size :]
        threshold = {"threshold": THRESHOLD} if strategy == "low_confidence_dynamic" else {}
        ours = model.generate(
            **{key: value for key, value in given.items() if key != "attention_mask"},
            max_new_tokens=len(tokens),
            denoising_steps=steps,
            remasking=strategy,
            eos_token_id=-1,
            **threshold,
        )
        case = f"{length} tokens, {steps} steps, {strategy}"
        found.append({"case": case, "theirs": tokens, "ours": ours[0, length:].tolist()})
    return found


def refusals(model: Any, ids: torch.Tensor) -> list[str]:
    """What `forward` and `generate` say to a video."""
    said = []
    for call, name in itertools.product((model, model.generate), ("pixel_values_videos", "image_sizes_videos")):
        try:
            call(ids, **{name: torch.zeros(1, 2)})
        except ValueError as error:
            said.append(str(error))
    return said


def half_precision(directory: str, inputs: dict[str, Any]) -> dict[str, list[Any]]:
    """dtype -> [the model's own, the largest logit's distance from fp32 in the calling sequence, tokens]; loaded with the
    keyword that SDAR-VL's loader uses."""
    found: dict[str, list[Any]] = {}
    exact: torch.Tensor | None = None
    for name in ("float32", "float16", "bfloat16"):
        dtype = getattr(torch, name)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            directory, torch_dtype=dtype, low_cpu_mem_usage=True, trust_remote_code=True
        )
        given = {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}
        logits, tokens = calling_sequence(model.eval(), given, 4, 1, "sequential")
        exact = logits if exact is None else exact
        first = slice(inputs["input_ids"].shape[1] % model.config.block_size, model.config.block_size)
        found[name] = [str(model.dtype), float((logits - exact)[first].abs().max()), tokens]
    return found


@torch.no_grad()
def visit(directory: str) -> tuple[dict[str, Any], torch.Tensor]:
    model: Any = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True).eval()
    other: Any = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    content = [{"type": "image", "image": Image.new("RGB", (40, 40), "red")}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_tensors="pt")
    # SDAR-VL's way to the same tensors: the text of the chat, then text and image.
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    shown = dict(processor(images=content[0]["image"], text=prompt, return_tensors="pt"))
    plain = dict(processor(images=None, text=prompt.replace(processor.image_token, ""), return_tensors="pt"))
    given = {**shown, "image_sizes": torch.tensor([[40, 40]])}
    length, size = inputs["input_ids"].shape[1], model.config.block_size
    logits, tokens = calling_sequence(model, given, 3 * size - length % size, 1, "sequential")
    answer = model.generate(**inputs, max_new_tokens=12)[0, length:]
    again = other.generate(**inputs, max_new_tokens=12)[0, length:]
    pixels = {name: inputs[name] for name in model.config.image_inputs}
    causal = model(inputs["input_ids"], **pixels, use_cache=True)
    facts = {
        "classes": [type(part).__name__ for part in (model, other, processor)],
        "module": type(model).__module__,
        "same_inputs": all(torch.equal(shown[name], inputs[name]) for name in ("input_ids", *pixels)),
        "tokens": tokens,
        "answers": [*answers(model, shown), *answers(model, plain)],
        "refusals": refusals(model, plain["input_ids"]),
        "no_mask": [list(causal.logits.shape), causal.past_key_values.get_seq_length()],
        "answer": answer.tolist(),
        "same": torch.equal(answer, again),
        "text": processor.tokenizer.decode(answer),
        "mask_token": processor.tokenizer.mask_token,
        "recorded": [
            [part.mask_token_id, part.block_size] for part in (model.config, model.config.text_config, model.generation_config)
        ],
        "half": half_precision(directory, shown),
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
