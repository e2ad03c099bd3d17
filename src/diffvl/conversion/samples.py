"""The held-out questions of a stage, answered before and after it by the model that is in memory: `samples.jsonl`.

So no model is loaded to answer, and none at all where nothing is held out. Before, the model has the dtypes that training loads:
fp32, or its own where training is in bf16. Afterwards it has those of the checkpoint that is written.
"""

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diffvl.config.recipe import Data
from diffvl.conversion.resume import BEFORE_FILE
from diffvl.data.loader import SampleDataset
from diffvl.decode.answer import Decoder
from diffvl.evaluation.evaluate import held_out_answers
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.report.stage_run import SAMPLES_FILE
from diffvl.store.files import read_json, replace_text
from diffvl.train.stage import Onlooker

SAMPLE_SETTINGS = DecodeSettings(max_new_tokens=48)


def answering(start: Path, work: Path, data: Data, console: Console) -> Onlooker:
    """Makes the onlooker that answers before training and again after it, and then writes the samples. The first answers are kept
    in the unfinished directory `work`, for a resume."""
    before = work / BEFORE_FILE

    def answer(model: Any, processor: Any, held_out: SampleDataset | None) -> list[dict[str, Any]]:
        if held_out is None:
            return []
        device = "cuda" if torch.cuda.is_available() else "cpu"
        decoder = Decoder(torch.nn.Module.to(model.eval(), device), processor)
        return held_out_answers(decoder, held_out, data, SAMPLE_SETTINGS, console)

    def answer_before(*loaded: Any) -> None:
        if not before.is_file():
            facts = {"start": str(start), "answers": answer(*loaded)}
            replace_text(before, json.dumps(facts, ensure_ascii=False))

    def answer_after(*loaded: Any) -> None:
        _write(work / SAMPLES_FILE, read_json(before)["answers"], answer(*loaded))

    return Onlooker(answer_before, answer_after)


def _write(file: Path, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    lines = []
    for old, new in zip(before, after, strict=True):
        asked = {key: new[key] for key in ("image", "question", "truth")}
        lines.append(json.dumps({**asked, "before": old["answer"], "after": new["answer"]}, ensure_ascii=False) + "\n")
    replace_text(file, "".join(lines))
