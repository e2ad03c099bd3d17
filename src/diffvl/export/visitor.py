"""What a client of an exported checkpoint does, as a program of its own: `python -I visitor.py REQUEST`.

It runs in a clean process, where diffvl cannot be imported and PYTHONPATH has no say: transformers loads the directory, the
checkpoint's own processor or tokenizer reads the chats, and the model is called as SDAR's and SDAR-VL's scripts call theirs.
`parity` runs the same `visit` on the model in memory. Only torch, transformers, Pillow and safetensors are used.

Shapes: L prompt length, D block size, V vocabulary.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    DynamicCache,
)

SHOWN = 32  # rows of a prefill whose logits are compared; all of a large picture's would fill the memory
NEW_TOKENS = 12


class NoDiffvl:
    """An import hook that makes diffvl look as if it were not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "diffvl":
            raise ModuleNotFoundError(f"No module named {name!r}: this process is to do without it", name=name)


@torch.no_grad()
def visit(model: Any, encode: Any, chats: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Everything that is compared, by name: for each chat the inputs, the logits of the calling sequence, and an answer.

    Args:
        encode: messages -> the tensors of the prompt. chats: `text`, and `image`, a file, or None.
    """
    found: dict[str, torch.Tensor] = {}
    for number, chat in enumerate(chats):
        content: list[dict[str, Any]] = [{"type": "text", "text": chat["text"]}]
        if chat["image"] is not None:
            content = [{"type": "image", "image": Image.open(chat["image"]).convert("RGB")}, *content]
        inputs = dict(encode([{"role": "user", "content": content}]))
        length = inputs["input_ids"].shape[1]
        found |= {f"{number}.inputs.{name}": value for name, value in inputs.items()}
        found |= {f"{number}.{name}": logits.float() for name, logits in calling_sequence(model, inputs).items()}
        answer = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
        found[f"{number}.answer"] = answer[:, length:]
    return {name: tensor.contiguous() for name, tensor in found.items()}


def calling_sequence(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A prefill of the prompt's whole blocks, the next block denoised (nothing is stored), then stored, and one block more.

    Returns:
        logits of the last rows of the prefill, and of the two blocks, the first of them with `store_kv` both ways.
    """
    size, mask_id = model.config.block_size, model.config.mask_token_id
    pixels = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask", "answer_index")}
    length = inputs["input_ids"].shape[1]
    start = length // size * size
    ids = torch.full((1, start + 2 * size), mask_id)
    ids[:, :length] = inputs["input_ids"]
    block = torch.arange(ids.shape[1]) // size
    sees = (block[:, None] >= block[None]).float()[None]
    positions = torch.arange(ids.shape[1])[None]
    cache = DynamicCache()
    is_gated = getattr(model.config, "gated_adapter", None) is not None

    def call(begin: int, end: int, store: bool, **more: Any) -> torch.Tensor:
        if is_gated:  # its adapters act where they are told to
            more["noisy"] = ids[:, begin:end] == mask_id
        logits = model(
            ids[:, begin:end],
            attention_mask=sees[:, begin:end, :end],
            position_ids=positions[:, begin:end],
            past_key_values=cache,
            use_cache=True,
            store_kv=store,
            **more,
        ).logits[0]
        expected = end if store else begin
        if cache.get_seq_length() != expected:
            raise AssertionError(f"store_kv={store} leaves {cache.get_seq_length()} tokens in the cache, expected {expected}")
        return logits

    found = {}
    if start:
        found["prefill"] = call(0, start, True, **pixels)[-SHOWN:].clone()
    found["denoised"] = call(start, start + size, False)
    found["stored"] = call(start, start + size, True)
    found["following"] = call(start + size, start + 2 * size, False)
    return found


def encode_chats(processor: Any) -> Any:
    """Messages -> tensors, by a processor or, for a language model, by a tokenizer."""

    def encode(messages: list[dict[str, Any]]) -> Any:
        if not hasattr(processor, "image_processor"):
            messages = [{"role": one["role"], "content": one["content"][0]["text"]} for one in messages]
        return processor.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

    return encode


def main(request: dict[str, Any]) -> None:
    """Loads the directory and leaves what `visit` found in a file."""
    torch.set_num_threads(request["threads"])
    directory = request["directory"]
    trusted: dict[str, Any] = {"trust_remote_code": True}
    if request["text_only"]:
        processor: Any = AutoTokenizer.from_pretrained(directory, **trusted)
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", **trusted)
    else:
        processor = AutoProcessor.from_pretrained(directory, **trusted)
        model = AutoModelForImageTextToText.from_pretrained(directory, dtype="auto", **trusted)
    if request["adapter"] is not None:
        from peft import PeftModel  # noqa: PLC0415  (only where it is asked for)

        model = PeftModel.from_pretrained(model, request["adapter"])
        model = model.merge_and_unload()
    save_file(visit(model.eval(), encode_chats(processor), request["chats"]), request["out"])


if __name__ == "__main__":
    sys.meta_path.insert(0, NoDiffvl())  # type: ignore[arg-type]
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
