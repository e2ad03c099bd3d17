"""The layout `sdar`: the text part alone, as LMDeploy, SGLang, JetEngine and SDAR's own script load it.

The engines read neither block size nor mask token from config.json: the mask token is a number in their code, and the block size
is told at launch. `launches` says how.
"""

from pathlib import Path
from typing import Any

from diffvl.export.code import write_code
from diffvl.export.files import write_generation_config, write_json, write_tokenizer
from diffvl.export.shards import write_tensors
from diffvl.export.source import Run
from diffvl.export.text_part import text_family, text_settings, text_tensors

SGLANG_FILE = "sglang.yaml"  # where SGLang is told the block size
CLASSES = {"sdar": "SDAR", "sdar_moe": "SDARMoe"}
CODE = {
    "sdar": ("configuration_sdar.py", "modeling_sdar.py"),
    "sdar_moe": ("configuration_sdar.py", "configuration_sdar_moe.py", "modeling_sdar.py", "modeling_sdar_moe.py"),
}


def write(run: Run, directory: Path) -> None:
    """Writes the whole layout into an empty directory. Raises DiskError."""
    write_tensors(text_tensors(run), directory)
    kind = text_kind(run)
    write_json(directory / "config.json", {**config_settings(run), "architectures": [f"{CLASSES[kind]}ForCausalLM"]})
    write_generation_config(run, directory)
    write_tokenizer(run, directory, str(run.processor.chat_template))
    (directory / SGLANG_FILE).write_text(f"block_size: {run.config.block_size}\n", encoding="utf-8")
    write_code(directory, CODE[kind])


def text_kind(run: Run) -> str:
    """Gives the model type of the trunk in these layouts."""
    family = text_family(run)
    assert family is not None
    return family.model_type


def config_settings(run: Run) -> dict[str, Any]:
    """Gives config.json, but for `architectures`, in which the two layouts differ."""
    kind = text_kind(run)
    return {**text_settings(run), "model_type": kind, "auto_map": auto_map(kind)}


def auto_map(kind: str) -> dict[str, str]:
    """Gives the classes that transformers is to load, by the layout's names."""
    name = CLASSES[kind]
    return {
        "AutoConfig": f"configuration_{kind}.{name}Config",
        "AutoModel": f"modeling_{kind}.{name}Model",
        "AutoModelForCausalLM": f"modeling_{kind}.{name}ForCausalLM",
    }


def launches(directory: Path, block_size: int, mask_token_id: int) -> dict[str, str]:
    """Gives the command or call with which each engine serves the directory, by its name."""
    return {
        "LMDeploy": f"lmdeploy serve api_server {directory} --backend pytorch --dllm-block-length {block_size} "
        f"--dllm-denoising-steps {block_size} --dllm-unmasking-strategy low_confidence_dynamic --dllm-confidence-threshold 0.85",
        "SGLang": f"python -m sglang.launch_server --model-path {directory} --trust-remote-code --dllm-algorithm LowConfidence "
        f"--dllm-algorithm-config {directory / SGLANG_FILE}",
        "JetEngine": f'LLM("{directory}", mask_token_id={mask_token_id}, block_length={block_size})  '
        f"and SamplingParams(block_length={block_size}, denoising_steps={block_size}, ...)",
    }
