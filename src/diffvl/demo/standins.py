"""Random tiny checkpoints on disk, in the shape of a hub snapshot: trunks with tokenizer and chat template, vision towers.

Place in the flow: they stand in for MODEL and for the vision tower wherever no download is wanted (tests, `SCALE=smoke`), so
that the whole product runs offline on a CPU. Invariant: the same (kind, seed) gives the same bytes, and the caller's random
state is untouched. Weights are not transformers' initialisation, whose std of 0.02 makes attention uniform and every mask
look right: they are scaled so that each token's logits depend visibly on what it may attend to.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.pytorch_utils import Conv1D

from diffvl.errors import UsageError
from diffvl.store.files import share

TRUNKS: tuple[str, ...] = ("qwen2", "qwen3", "qwen3_moe", "llama", "mistral", "gemma2", "gpt2")
TOWERS: tuple[str, ...] = ("siglip", "clip", "dinov2", "vit")
FULL_CLIP = "clip-full"  # text and vision tower in one checkpoint, as CLIP is published

HIDDEN, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, INTERMEDIATE, MAX_POSITIONS = 64, 2, 4, 2, 16, 128, 512
WINDOW = 10  # tokens; shorter than any test prompt, so that a lost window shows
NUM_SPARE_ROWS = 16  # rows of the embedding table above the tokenizer's last id, as Qwen has them
QWEN = ("qwen2", "qwen3", "qwen3_moe")  # these get the spare rows, and the tokenizer class of the published checkpoints
# Of the published Qwen3: the row after its pieces, the special tokens from there on, and the rows of its table.
FIRST_QWEN3_SPECIAL, QWEN3_ROWS = 151643, 151936
QWEN3_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>"),
    *("<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
)
IMAGE_SIZE, PATCH_SIZE, TOWER_HIDDEN, TOWER_LAYERS, TOWER_HEADS = 32, 8, 32, 3, 2  # 16 patch tokens

LOGIT_STD = 2.5  # far from uniform, yet not saturated: the loss of an untrained model stays near log(V) + LOGIT_STD**2 / 2
SHARPNESS = 1.5  # gain of the query and key projections; at 1 the attention of short prompts is almost flat

# A few merges, so that tokens and bytes do not coincide and a character may span tokens or the reverse.
MERGES = (("t", "h"), ("th", "e"), ("Ġ", "a"), ("i", "n"), ("e", "r"), ("o", "n"), ("Ġ", "the"), ("r", "e"), ("a", "t"))

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Gemma's own: it adds <bos>, names the assistant "model", trims the content and knows no system role.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "<start_of_turn>{{ role }}\n{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def make_trunk(directory: Path, model_type: str, seed: int = 0, published_ids: bool = False) -> Path:
    """Writes a causal LM of `model_type` (one of TRUNKS) with tokenizer and chat template; returns `directory`.

    Args:
        published_ids: True gives a Qwen3 the token ids and the table of the published ones, which serving engines rely on.
    """
    if model_type not in TRUNKS:
        raise UsageError(f"no stand-in trunk of type {model_type!r}: expected one of {', '.join(TRUNKS)}")
    tokenizer = make_tokenizer(model_type, FIRST_QWEN3_SPECIAL if published_ids else 0)
    num_rows = len(tokenizer) + (NUM_SPARE_ROWS if model_type in QWEN else 0)
    if published_ids:
        tokenizer.backend_tokenizer.add_special_tokens([AddedToken(text, special=True) for text in QWEN3_SPECIAL])
        num_rows = QWEN3_ROWS
    model = _causal_lm(model_type, tokenizer, seed, _rescale_causal, vocab_size=num_rows, **_trunk_settings(model_type))
    return _save(directory, model, tokenizer)


def make_tower(directory: Path, kind: str = "siglip", seed: int = 0) -> Path:
    """Writes a vision checkpoint (one of TOWERS, or "clip-full") with its PIL image processor; returns `directory`."""
    if kind not in (*TOWERS, FULL_CLIP):
        raise UsageError(f"no stand-in vision tower {kind!r}: expected one of {', '.join((*TOWERS, FULL_CLIP))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _tower_model(kind)
        _rescale(model, embedding_std=0.5)
    return _save(directory, model, _image_processor(kind))


def make_recurrent(directory: Path, seed: int = 0) -> Path:
    """Writes a Mamba checkpoint with tokenizer: an architecture that block diffusion through masks must refuse."""
    tokenizer = make_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": HIDDEN, "num_hidden_layers": NUM_LAYERS, "state_size": 8}
    return _save(directory, _causal_lm("mamba", tokenizer, seed, None, **sizes), tokenizer)


def make_tokenizer(model_type: str = "llama", num_pieces: int = 0) -> PreTrainedTokenizerFast:
    """Makes a byte-level BPE over all 256 bytes: any UTF-8 text survives encode and decode. ChatML, or Gemma's template and
    tokens.

    Qwen's class also normalises to NFC, here as in the published checkpoints: AutoTokenizer takes that class for
    `model_type: qwen2` whatever the directory declares, and what is written must be what is loaded.

    Args:
        num_pieces: fills the vocabulary up to this size with pieces that no text is split into.
    """
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in MERGES]
    names, special = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    if model_type == "gemma2":
        names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<end_of_turn>"}
        special = ["<pad>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    if num_pieces:  # a token of the vocabulary keeps its id when it is added as a special one
        pieces += [f"unused{number}" for number in range(len(pieces), num_pieces)] + special
    vocab = {piece: index for index, piece in enumerate(pieces)}
    added = [AddedToken(text, special=True, normalized=False) for text in special]
    if model_type in QWEN:
        merges: Any = list(MERGES)  # annotated as list[str] there, but handed on to BPE, which takes pairs
        tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, model_max_length=MAX_POSITIONS, **names)
        tokenizer.backend_tokenizer.add_special_tokens(added)
    else:
        bpe = Tokenizer(models.BPE(vocab=vocab, merges=list(MERGES)))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        bpe.add_special_tokens(added)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe, clean_up_tokenization_spaces=False, model_max_length=MAX_POSITIONS, **names
        )
    tokenizer.chat_template = GEMMA if model_type == "gemma2" else CHATML
    return tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `python -m diffvl.demo.standins OUT`: writes OUT/trunk-TYPE and OUT/tower-KIND and prints the two paths."""
    parser = argparse.ArgumentParser(
        prog="python -m diffvl.demo.standins", description="Write a tiny random trunk and vision tower."
    )
    parser.add_argument("out", type=Path, help="directory to write into")
    parser.add_argument("--trunk", choices=TRUNKS, default="qwen2")
    parser.add_argument("--tower", choices=(*TOWERS, FULL_CLIP), default="siglip")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    print(make_trunk(arguments.out / f"trunk-{arguments.trunk}", arguments.trunk, arguments.seed))
    print(make_tower(arguments.out / f"tower-{arguments.tower}", arguments.tower, arguments.seed))


def _trunk_settings(model_type: str) -> dict:
    """Sizes under the names that the architecture's config gives them, and what makes each architecture worth a test."""
    if model_type == "gpt2":
        # The published 0.1 dropout would make two runs of the same data differ for reasons no test is about.
        silent = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return {"n_embd": HIDDEN, "n_layer": NUM_LAYERS, "n_head": NUM_HEADS, "n_positions": MAX_POSITIONS, **silent}
    sizes = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": MAX_POSITIONS,
    }
    if model_type != "qwen2":  # qwen2 always takes hidden / heads
        sizes["head_dim"] = HEAD_DIM
    special: dict[str, dict] = {
        "qwen2": {"tie_word_embeddings": False},
        "qwen3": {"tie_word_embeddings": True},
        "qwen3_moe": {"tie_word_embeddings": False, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN},
        "llama": {"tie_word_embeddings": True},
        "mistral": {"tie_word_embeddings": False, "sliding_window": WINDOW},
        "gemma2": {
            "tie_word_embeddings": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": HEAD_DIM,
        },
    }
    return sizes | special[model_type]


def _causal_lm(
    model_type: str,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    rescale: Callable[[PreTrainedModel], None] | None,
    **settings: Any,
) -> PreTrainedModel:
    """Makes a causal LM with the tokenizer's special tokens; `rescale` draws new weights in place, from the same seed."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, **special, **settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if rescale is not None:
            rescale(model)
    model.generation_config = GenerationConfig(**special)
    return model


def _tower_model(kind: str) -> PreTrainedModel:
    sizes = {
        "hidden_size": TOWER_HIDDEN,
        "intermediate_size": 2 * TOWER_HIDDEN,
        "num_hidden_layers": TOWER_LAYERS,
        "num_attention_heads": TOWER_HEADS,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    if kind == FULL_CLIP:
        text = {
            "vocab_size": 99,
            "hidden_size": TOWER_HIDDEN,
            "intermediate_size": 2 * TOWER_HIDDEN,
            "num_hidden_layers": 1,
            "num_attention_heads": TOWER_HEADS,
            "projection_dim": TOWER_HIDDEN,
            "bos_token_id": 97,
            "eos_token_id": 98,
            "pad_token_id": 98,
        }
        vision = sizes | {"projection_dim": TOWER_HIDDEN}
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=TOWER_HIDDEN))
    if kind == "dinov2":  # named by a ratio there, not by a width
        del sizes["intermediate_size"]
        sizes["mlp_ratio"] = 2
    model_type = {"siglip": "siglip_vision_model", "clip": "clip_vision_model"}.get(kind, kind)
    config: PreTrainedConfig = AutoConfig.for_model(model_type, **sizes)
    return AutoModel.from_config(config, dtype=torch.float32)


def _image_processor(kind: str) -> BaseImageProcessor:
    """Gives the processor that each architecture is published with; they differ in mean, std and cropping."""
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    if kind == "siglip":
        return SiglipImageProcessorPil(size=square)
    if kind == "vit":
        return ViTImageProcessorPil(size=square)
    cropping = BitImageProcessorPil if kind == "dinov2" else CLIPImageProcessorPil
    return cropping(size={"shortest_edge": IMAGE_SIZE}, crop_size=square)


@torch.no_grad()
def _rescale(model: nn.Module, embedding_std: float) -> None:
    """Redraws every parameter in place: unit-variance projections, visible biases, norms off their neutral value."""
    drawn: set[int] = set()  # a tied head is the embedding's own tensor and must not be drawn again as a projection
    for name, module in model.named_modules():
        for key, weight in module.named_parameters(recurse=False):
            if weight.dim() == 0 or id(weight) in drawn:  # the scalar is CLIP's temperature
                continue
            drawn.add(id(weight))
            if key == "bias":
                weight.normal_(std=0.1)
            elif isinstance(module, nn.Embedding):
                weight.normal_(std=embedding_std)
            elif isinstance(module, nn.Linear | Conv1D | nn.Conv2d | nn.Conv3d):
                fan_in = weight.shape[0] if isinstance(module, Conv1D) else weight[0].numel()
                gain = SHARPNESS if name.endswith(("q_proj", "k_proj", "c_attn")) else 1.0
                weight.normal_(std=gain * fan_in**-0.5)
            elif weight.dim() == 1:  # norms and layer scales stand at 1, or at 0 where the model adds the 1 itself
                weight.add_(torch.randn_like(weight), alpha=0.1)
            else:  # class token, position table, attention pooling
                weight.normal_(std=weight.shape[-1] ** -0.5)


def _rescale_causal(model: PreTrainedModel) -> None:
    norm = model.get_parameter("transformer.ln_f.weight" if model.config.model_type == "gpt2" else "model.norm.weight")
    rescale_trunk(model, norm, model.config.tie_word_embeddings, model.config.model_type == "gemma2")


@torch.no_grad()
def rescale_trunk(model: PreTrainedModel, norm: torch.Tensor, tied: bool, is_gemma: bool) -> None:
    """Rescales in place, then sets the gain of the final norm such that logits have a std near LOGIT_STD, tied or not."""
    # A tied table must be small beside what the layers add, or every position predicts its own input.
    stream_std = 0.5 if tied else 1.0
    embedding_std = stream_std * HIDDEN**-0.5 if is_gemma else stream_std  # gemma multiplies embeddings by sqrt(hidden)
    _rescale(model, embedding_std)
    head_std = embedding_std if tied else HIDDEN**-0.5
    gain = LOGIT_STD / (HIDDEN**0.5 * head_std)
    norm.copy_((norm + 1.0) * gain - 1.0 if is_gemma else norm * gain)


def _save(directory: Path, model: PreTrainedModel, companion: PreTrainedTokenizerFast | BaseImageProcessor) -> Path:
    """Saves the model, then tokenizer or image processor, into one directory, which is created if needed."""
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    share(directory)
    companion.save_pretrained(directory)
    return directory


if __name__ == "__main__":
    main()
