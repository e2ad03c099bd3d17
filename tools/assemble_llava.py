"""Joins a language model and a vision transformer to a stock LLaVA checkpoint with a fresh projector.

That makes a small whole vision-language model out of real parts, for machines that reach no model hub. It has to be trained
(`--stage align` of recipes/vlm-demo.yaml).

    python tools/assemble_llava.py models/smollm2-135m-instruct models/dinov2-small models/llava-smollm2
"""

import argparse
from pathlib import Path

import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

IMAGE = "<image>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def assemble(language_model: Path, tower: Path, out: Path, side: int, layer: int, gain: float) -> None:
    """Writes the checkpoint.

    Args:
        side: pixels of the square image. layer: of the tower's hidden states. gain: of the projector's last layer: a small
            language model does not notice images whose embeddings are small beside its own.
    """
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    trunk = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32)
    vision = AutoModel.from_pretrained(tower, dtype=torch.float32)
    trunk.resize_token_embeddings(len(tokenizer))
    config = LlavaConfig(
        text_config=trunk.config,
        vision_config=vision.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(side // vision.config.patch_size) ** 2,
        vision_feature_layer=layer,
        vision_feature_select_strategy="default",
        tie_word_embeddings=trunk.config.tie_word_embeddings,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(trunk.model.state_dict())
    model.model.vision_tower.load_state_dict(vision.state_dict())
    if not config.tie_word_embeddings:
        model.lm_head.load_state_dict(trunk.lm_head.state_dict())
    for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        torch.nn.init.xavier_uniform_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(gain)
    model.generation_config = trunk.generation_config
    images = AutoImageProcessor.from_pretrained(tower, backend="pil")
    images.size, images.crop_size = {"shortest_edge": side}, {"height": side, "width": side}
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=vision.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=TEMPLATE,
    )
    model.save_pretrained(out)
    processor.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("language_model", type=Path)
    parser.add_argument("tower", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--side", type=int, default=84, help="pixels of the square image")
    parser.add_argument("--layer", type=int, default=4, help="of the tower's hidden states")
    parser.add_argument("--gain", type=float, default=20.0, help="of the projector's last layer")
    given = parser.parse_args()
    assemble(given.language_model, given.tower, given.out, given.side, given.layer, given.gain)


if __name__ == "__main__":
    main()
