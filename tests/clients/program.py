"""A client's program, run by another interpreter than the tests': CLIENT DIRECTORY [CHECKOUT]; prints one JSON object.

Each client asks what `QUESTIONS` ask, as its own documentation shows, and prints the ids of its greedy answers. diffvl cannot be
imported here.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

NEW = 12  # tokens of an answer, at most
QUESTIONS = ("What is it?", "Name every colour that you see, from left to right, and count the shapes.")


class NoDiffvl:
    """An import hook that makes diffvl look as if it were not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "diffvl":
            raise ModuleNotFoundError(f"No module named {name!r}: clients do without it", name=name)


def picture(high: int = 56) -> Any:
    from PIL import Image

    return Image.radial_gradient("L").convert("RGB").crop((0, 0, 88, high))


def chat(question: str, image: Any = None) -> list[dict[str, Any]]:
    shown = [] if image is None else [{"type": "image", **({} if image is True else {"image": image})}]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": f"\n{question}" if shown else question}]}]


def module_of(checkout: str) -> Any:
    """The published script, unmodified, as a module."""
    spec = importlib.util.spec_from_file_location("generate", Path(checkout) / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sdar_vl(directory: str, checkout: str) -> dict[str, Any]:
    """SDAR-VL's generate.py: what stands under its `__main__`, on a CPU, greedily (top_k=1), with block size and mask of the
    checkpoint, with a picture and without."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    module = module_of(checkout)
    model: Any = AutoModelForImageTextToText.from_pretrained(
        directory, torch_dtype=torch.float32, low_cpu_mem_usage=True, trust_remote_code=True
    )
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    answers = []
    for question in QUESTIONS:
        for image in (None, picture()):
            prompt = processor.apply_chat_template(chat(question, image is not None or None), add_generation_prompt=True)
            inputs = processor(images=image, text=prompt, return_tensors="pt")
            answers.append(_blocks(module, model, inputs, {"inputs": inputs}))
    return {"answers": answers}


def sdar(directory: str, checkout: str) -> dict[str, Any]:
    """SDAR's generate.py: the same of its own function, which takes texts alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = module_of(checkout)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, torch_dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    assert tokenizer(tokenizer.mask_token)["input_ids"] == [model.config.mask_token_id]
    answers = []
    for question in QUESTIONS:
        messages = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        inputs = tokenizer([messages], return_tensors="pt", padding=True, truncation=True, add_special_tokens=False)
        answers.append(_blocks(module, model, inputs, {"prompt": inputs}))
    return {"answers": answers}


def _blocks(module: Any, model: Any, inputs: Any, given: dict[str, Any]) -> list[int]:
    size = model.config.block_size
    ids = module.block_diffusion_generate(
        model,
        **given,
        mask_id=model.config.mask_token_id,
        gen_length=NEW,
        block_length=size,
        denoising_steps=size,
        temperature=1.0,
        top_k=1,
        remasking_strategy="low_confidence_static",
        stopping_criteria_idx=model.generation_config.eos_token_id,
    )
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def pipeline(directory: str) -> dict[str, Any]:
    """transformers' pipeline("image-text-to-text"): texts of answers to a chat, with a picture and without."""
    from transformers import pipeline as make

    ask: Any = make("image-text-to-text", model=directory, trust_remote_code=True)
    settings = {"max_new_tokens": NEW, "return_full_text": False}
    texts = [
        ask(text=chat(question, image), **settings)[0]["generated_text"] for question in QUESTIONS for image in (None, picture())
    ]
    return {"texts": texts}


def causal(directory: str) -> dict[str, Any]:
    """AutoModelForCausalLM, with the tokenizer alone: answers to texts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    answers = []
    for question in QUESTIONS:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answers.append(model.generate(**inputs, max_new_tokens=NEW)[0, inputs["input_ids"].shape[1] :].tolist())
    return {"answers": answers}


CLIENTS = {"sdar_vl": sdar_vl, "sdar": sdar, "pipeline": pipeline, "causal": causal}

if __name__ == "__main__":
    sys.meta_path.insert(0, NoDiffvl())  # type: ignore[arg-type]
    client, *words = sys.argv[1:]
    print(json.dumps(CLIENTS[client](*words)))
