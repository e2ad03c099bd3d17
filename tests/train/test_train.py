"""What whole runs of `train` met in practice: each test here stands for a defect that a review found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import QUIET, batch, metrics, objective, sample, stage_recipe, text_only

from diffvl.data.problems import Problem
from diffvl.data.records import Record, Turn
from diffvl.data.samples import IGNORED, collate, encode_record, is_filler
from diffvl.demo.standins import make_tokenizer
from diffvl.errors import DataError
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.objective.losses import Draw, loss_of, measured_sums
from diffvl.store.checkpoint import load_checkpoint, saved_dtype, write_checkpoint
from diffvl.train import stage as training
from diffvl.train.order import StepOrder


def test_a_connector_stage_takes_batches_without_images(prepared: Callable[[str], Path], tmp_path: Path):
    """The connector is all that trains, and no token of the batch has passed through it."""
    recipe = stage_recipe(
        text_only(tmp_path / "text.json", 4), objective={"kind": "ar"}, trainable={"connector": 1e-3}, steps=2, batch_size=2
    )
    work = training.train(prepared("llama"), recipe, "diffuse", tmp_path / "out", False, QUIET)
    losses = [line["loss"] for line in metrics(work) if "loss" in line]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_a_step_has_the_same_rows_however_it_is_cut(processes: int, accumulation: int):
    """Ten rows in steps of four: an epoch is a permutation, its last step is filled up from its beginning."""

    def rows_of(step: int) -> list[list[int]]:
        cut: dict[str, Any] = {
            "batch_size": 4 // (processes * accumulation),
            "accumulation": accumulation,
            "processes": processes,
        }
        dealt = [StepOrder(rows=10, seed=3, rank=rank, **cut).micro_batches(step) for rank in range(processes)]
        return [dealt[rank][number] for number in range(accumulation) for rank in range(processes)]

    whole = StepOrder(rows=10, batch_size=4, accumulation=1, seed=3)
    assert whole.steps_per_epoch == 3 and [whole.epoch_after(step) for step in (1, 3, 4)] == [1 / 3, 1.0, 4 / 3]
    epochs = []
    for epoch in range(2):
        steps = [sum(rows_of(3 * epoch + step), []) for step in range(3)]
        assert steps == [whole.micro_batches(3 * epoch + step)[0] for step in range(3)]
        epochs.append(sum(steps, []))
        assert sorted(epochs[-1][:10]) == list(range(10)) and epochs[-1][10:] == epochs[-1][:2]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("kind", ["ar", "block_diffusion"])
def test_a_process_without_held_out_records_knows_what_to_add(kind: str, loaded: Callable[[str], Any]):
    """Every process must name the same sums, or the others wait in the reduction for ever."""
    model, _ = loaded("llama")
    goal = objective() if kind == "block_diffusion" else stage_recipe(
        Path("x"), objective={"kind": "ar"}, trainable={"trunk": 1e-3}
    ).stages["diffuse"].objective  # fmt: skip
    output = loss_of(model, model.config, batch([sample(model.config, [5, 4])]), goal, Draw(0, 0, 0.0))
    assert sorted(output.sums) == measured_sums(goal)


def test_a_batch_without_samples_has_labels_for_the_trainer_to_count():
    batch = collate([[Problem("other", Path("x.json"), 3, 2, None, "no image")]], pad_token_id=0)
    assert (batch["labels"] == IGNORED).all() and is_filler(batch)


def test_an_fp16_checkpoint_trains_under_bf16(
    prepared: Callable[[str], Path], loaded: Callable[[str], Any], shapes: dict[str, Path], tmp_path: Path
):
    """fp16 does not mix with bf16 autocast, so its frozen parts are computed in fp32; on disk it is fp16 again."""
    model, processor = load_checkpoint(prepared("llama"), dtype=torch.float16)
    half = tmp_path / "half"
    half.mkdir()
    write_checkpoint(model, processor, half)
    assert saved_dtype(half) == torch.float16
    recipe = stage_recipe(shapes["train"], objective={"kind": "ar"}, trainable={"connector": 1e-3}, steps=1, precision="bf16")
    work = training.train(half, recipe, "diffuse", tmp_path / "out", False, QUIET)
    assert saved_dtype(work) == torch.float16


# --- the chat template -----------------------------------------------------------------------------------------------------

THINKING = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = (
    "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}\n"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RECORD = Record("r", (), (Turn("user", "What?"), Turn("assistant", "This.")), "x.json:7")


def processor_with(template: str | None = None) -> DiffVLProcessor:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<|MASK|>"})
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.chat_template = template or tokenizer.chat_template
    processor = DiffVLProcessor.__new__(DiffVLProcessor)  # its chat half alone, without an image processor
    processor.tokenizer, processor.image_token, processor.image_tokens, processor.stop_token = (
        tokenizer,
        "<image>",
        1,
        "<|im_end|>",
    )
    return processor


def test_a_template_that_thinks_before_the_last_answer_only_is_refused():
    with pytest.raises(DataError, match=r"x\.json:7: .*writes '<think>.*before an answer, but not at the end of its prompt"):
        encode_record(RECORD, processor_with(THINKING))


def test_a_prompt_does_not_depend_on_the_day():
    assert encode_record(RECORD, processor_with(DATED)).text.startswith("26 Jul 2024")


def test_the_mask_token_cannot_be_an_answer():
    """Its logit is minus infinity: the loss would be infinite, and the message about learning rates."""
    odd = Record("r", (), (Turn("user", "What?"), Turn("assistant", "A <|MASK|> here.")), "x.json:7")
    with pytest.raises(DataError, match=r"x\.json:7: .*holds '<\|MASK\|>', which stands for a token not known yet"):
        encode_record(odd, processor_with())
