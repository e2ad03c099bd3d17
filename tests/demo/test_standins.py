"""The stand-ins load through the Auto classes, are deterministic, and their attention is strong enough to show a wrong mask."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from diffvl.demo import standins
from diffvl.errors import UsageError

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
TEXT = "Hello the thé 😀中文\n\t \x00 x , . it 's  12345\r\n"


def logits_TV(model: torch.nn.Module, ids_T: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids_T[None]).logits[0]


@pytest.mark.parametrize("model_type", standins.TRUNKS)
def test_trunk_loads_and_looks_like_a_trained_model(tmp_path: Path, model_type: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(standins.make_trunk(tmp_path, model_type)).eval()
    assert model.config.model_type == model_type
    assert model.dtype == torch.float32
    ids_T = torch.randint(0, 250, (40,), generator=torch.Generator().manual_seed(1))
    out_TV = logits_TV(model, ids_T)
    assert torch.isfinite(out_TV).all()
    assert 2.0 < out_TV.std() < 3.0  # the tied and the untied head alike; transformers' own initialisation gives about 0.15

    def moved(position: int) -> float:
        changed_T = ids_T.clone()
        changed_T[position] = (ids_T[position] + 1) % 250
        return float((logits_TV(model, changed_T)[-1] - out_TV[-1]).abs().max() / out_TV.std())

    assert moved(35) > 0.03
    # Two layers of window 10 reach back 18 positions; where a layer sees everything, position 5 is within reach.
    assert (moved(5) == 0.0) == (model_type == "mistral")
    head = model.get_output_embeddings()
    assert head is not None
    assert (head.weight is model.get_input_embeddings().weight) == (model_type not in ("qwen2", "qwen3_moe", "mistral"))


@pytest.mark.parametrize("model_type", standins.TRUNKS)
def test_tokenizer_round_trips_and_knows_its_stop(tmp_path: Path, model_type: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(standins.make_trunk(tmp_path, model_type))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    written = standins.make_tokenizer(model_type)
    assert tokenizer(TEXT)["input_ids"] == written(TEXT)["input_ids"]
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    spare = standins.NUM_SPARE_ROWS if model_type in standins.QWEN else 0
    rows = model.get_input_embeddings().num_embeddings
    assert rows == len(tokenizer) + spare
    assert model.generation_config is not None
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    stop = "<end_of_turn>" if model_type == "gemma2" else "<|im_end|>"
    assert tokenizer.eos_token == stop
    rendered = tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)
    if model_type == "gemma2":
        assert rendered == "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
    else:
        assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == rendered + f"yes{stop}\n"
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1  # one id, not spelled in bytes


@pytest.mark.parametrize("kind", [*standins.TOWERS, standins.FULL_CLIP])
def test_tower_loads_with_its_processor(tmp_path: Path, kind: str) -> None:
    model = AutoModel.from_pretrained(standins.make_tower(tmp_path, kind)).eval()
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(Image.new("RGB", (70, 50), "red"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    tower = model.vision_model if kind == standins.FULL_CLIP else model
    with torch.no_grad():
        states, other = (tower(pixel_values=p).last_hidden_state for p in (pixels, pixels.flip(1)))
    assert states.shape == (1, 16 if kind == "siglip" else 17, 32)
    assert torch.isfinite(states).all()
    assert (states - other).abs().max() > 0.1


def test_same_seed_same_bytes_and_the_callers_random_state_is_kept(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    for make, kind in ((standins.make_trunk, "llama"), (standins.make_tower, "vit")):
        one, two, other = (
            make(tmp_path / f"{kind}-{name}", kind, seed) / "model.safetensors" for name, seed in (("a", 3), ("b", 3), ("c", 4))
        )
        assert one.read_bytes() == two.read_bytes()
        assert one.read_bytes() != other.read_bytes()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_recurrent_loads(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(standins.make_recurrent(tmp_path))
    assert model.config.model_type == "mamba"
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == model.config.vocab_size
    assert torch.isfinite(logits_TV(model, torch.arange(8))).all()


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no stand-in trunk of type 'mamba': expected one of qwen2, qwen3, qwen3_moe, llama"):
        standins.make_trunk(tmp_path, "mamba")
    with pytest.raises(UsageError, match="no stand-in vision tower 'bit': expected one of siglip, clip, dinov2, vit, clip-full"):
        standins.make_tower(tmp_path, "bit")
    assert not list(tmp_path.iterdir())


def test_main_writes_both_and_prints_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    standins.main([str(tmp_path), "--trunk", "gpt2", "--tower", "clip"])
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "trunk-gpt2"), str(tmp_path / "tower-clip")]
    assert (tmp_path / "trunk-gpt2" / "config.json").is_file()
    assert (tmp_path / "tower-clip" / "preprocessor_config.json").is_file()
