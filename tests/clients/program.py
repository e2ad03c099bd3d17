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
        answers.append(_blocks(module, model, inputs, {"prompt": inputs}, "sequential"))
    return {"answers": answers}


def _blocks(module: Any, model: Any, inputs: Any, given: dict[str, Any], strategy: str = "low_confidence_static") -> list[int]:
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
        remasking_strategy=strategy,
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


def peft(directory: str) -> dict[str, Any]:
    """PeftModel on the weights from before the adapters, not merged."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)

    def ask(asked: Any) -> list[list[int]]:
        answers = []
        for question in QUESTIONS:
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            answers.append(asked.generate(**inputs, max_new_tokens=NEW)[0, inputs["input_ids"].shape[1] :].tolist())
        return answers

    without = ask(model)
    return {"without": without, "answers": ask(PeftModel.from_pretrained(model, str(Path(directory) / "adapter")))}


def lm_eval(directory: str) -> dict[str, Any]:
    """lm-evaluation-harness' own model class for images, on one question with the picture."""
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]  (in its own environment)
    from lm_eval.models.hf_vlms import HFMultimodalLM  # pyright: ignore[reportMissingImports]

    model = HFMultimodalLM(directory, trust_remote_code=True, device="cpu", dtype="float32", batch_size=1, max_images=1)
    asked = f"<image>\n{QUESTIONS[0]}"
    prompt = model.apply_chat_template([{"role": "user", "content": asked}])
    settings = {"until": ["<|im_end|>"], "max_gen_toks": NEW, "do_sample": False}
    request = Instance("generate_until", {}, (prompt, settings, {"visual": [picture()]}), 0)
    return {"texts": model.generate_until([request])}


def lmdeploy(directory: str) -> dict[str, Any]:
    """LMDeploy's PyTorch engine up to where it needs a GPU: its configuration, its model class, its weight loader."""
    import torch
    from lmdeploy.pytorch.config import DLLMConfig, ModelConfig  # pyright: ignore[reportMissingImports]
    from lmdeploy.pytorch.model_inputs import BuildModelContext  # pyright: ignore[reportMissingImports]
    from lmdeploy.pytorch.models.patch import build_patched_model  # pyright: ignore[reportMissingImports]
    from lmdeploy.pytorch.weight_loader.model_weight_loader import load_model_weights  # pyright: ignore[reportMissingImports]

    config = ModelConfig.from_pretrained(directory, trust_remote_code=True, dtype="auto")
    context = BuildModelContext(dllm_config=DLLMConfig(block_length=4))
    model: Any = build_patched_model(config, device=torch.device("cpu"), build_model_ctx=context)
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    load_model_weights(model, directory, device=torch.device("cpu"))
    assert config.model_paradigm == "dllm"
    return {"mask_token": config.dllm_mask_token, "rope_theta": config.hf_config.rope_theta, **_placed(model, directory)}


def _placed(model: Any, directory: str) -> dict[str, Any]:
    """Whether every parameter of an engine's model got its values, in the engine's dtype, and every tensor of the files has a
    place. Engines join the projections of queries, keys and values, and those of gate and up, in this order."""
    import torch
    from safetensors.torch import load_file

    files = load_file(Path(directory) / "model.safetensors")
    joined = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    different, used = [], set()
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        module = name.split(".")[-2]
        parts = [name.replace(module, part) for part in joined.get(module, (module,))]
        used |= set(parts)
        expected = torch.cat([files[part] for part in parts])
        if not torch.equal(parameter[: len(expected)], expected.to(parameter.dtype)):
            different.append(name)
    total = sum(parameter.numel() for parameter in parameters.values())
    return {"missing": sorted(set(files) - used), "different": different, "parameters": total}


CLIENTS = {
    "sdar_vl": sdar_vl,
    "sdar": sdar,
    "pipeline": pipeline,
    "causal": causal,
    "peft": peft,
    "lm_eval": lm_eval,
    "lmdeploy": lmdeploy,
}

if __name__ == "__main__":
    sys.meta_path.insert(0, NoDiffvl())  # type: ignore[arg-type]
    client, *words = sys.argv[1:]
    print(json.dumps(CLIENTS[client](*words)))
