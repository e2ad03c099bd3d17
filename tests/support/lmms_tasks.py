"""A folder of tasks for lmms-eval, as its own are written: YAML files, a module beside them, and a local parquet file with images
in bytes. Nothing is fetched."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import pyarrow
import pyarrow.parquet
from PIL import Image

NEW = 12  # tokens of an answer, at most
UNTIL = "\n\n"
COLOURS = ("red", "lime", "blue", "white", "yellow", "black")
QUESTION = "What colour is it?"

MODULE = """
import json
from io import BytesIO

from lmms_eval.tasks._task_utils.file_utils import generate_submission_file
from PIL import Image


def shown(doc):
    return [Image.open(BytesIO(doc[name])).convert("RGB") for name in ("first", "second") if doc[name] is not None]


def first(doc):
    return shown(doc)[:1]


def asked(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def interleaved(doc):
    one, other = shown(doc)
    content = [{"type": "text", "text": "This is one: "}, {"type": "image", "url": one}]
    content += [{"type": "text", "text": " and this the other: "}, {"type": "image", "url": other}]
    return [{"role": "user", "content": [*content, {"type": "text", "text": doc["question"]}]}]


def choices(doc):
    return ["red", "blue"]


def chosen(doc):
    return doc["choice"]


def scored(doc, results):
    return {"exact": float(results[0] == doc["answer"])}


def loudly(doc, results):
    print("a document:", results)
    return {"submitted": results[0]}


def submission(results, args):
    print("Overall:", len(results))
    with open(generate_submission_file(f"{args.tasks}.json", args), "w") as file:
        json.dump(results, file)
    return 1.0


def unscored(doc, results):
    raise KeyError("gold")


def compared(doc, results):
    best = max(range(len(results)), key=lambda place: results[place][0])
    return {"acc": float(best == doc["choice"])}
"""

GENERATING = """
task: {task}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {parquet}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function scenes.{visual}
doc_to_text: !function scenes.asked
{messages}
doc_to_target: answer
process_results: !function scenes.{scores}
generation_kwargs: {{max_new_tokens: {new}, temperature: 0, do_sample: false, num_beams: 1, until: ["\\n\\n"]}}
metric_list: [{{metric: {metric}, aggregation: {aggregation}, higher_is_better: true}}]
metadata: [{{version: 1.0}}]
"""

CHOOSING = """
task: scenes_choice
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {parquet}}}}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function scenes.first
doc_to_text: question
doc_to_choice: !function scenes.choices
doc_to_target: !function scenes.chosen
process_results: !function scenes.compared
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 1.0}}]
"""


def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (40 + 8 * number, 40), colour) for number, colour in enumerate(COLOURS)]


def write_tasks(folder: Path, answers: Sequence[str], choices: Sequence[int]) -> Path:
    """Writes the tasks `scenes_one` (an image), `scenes_two` (two of them between words), `scenes_choice` (given answers),
    `scenes_loud`, which prints while it scores and writes its answers to a file, as tasks with hidden truths do, `scenes_broken`,
    which fails while it scores, and `scenes_drawn`, which asks for an image.

    Args:
        answers: to each picture. choices: which of "red" and "blue" is right.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [_bytes(picture) for picture in pictures()]
    columns = {
        "question": [QUESTION] * len(files),
        "first": files,
        "second": files[1:] + files[:1],
        "answer": list(answers),
        "choice": list(choices),
    }
    parquet = folder / "scenes.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), parquet)
    (folder / "scenes.py").write_text(MODULE, encoding="utf-8")
    fields = {"parquet": parquet, "new": NEW}
    mean = {"scores": "scored", "metric": "exact", "aggregation": "mean"}
    loud = {"scores": "loudly", "metric": "submitted", "aggregation": "!function scenes.submission"}
    messages = "doc_to_messages: !function scenes.interleaved"
    broken = mean | {"scores": "unscored"}
    one = GENERATING.format(task="scenes_one", visual="first", messages="", **mean, **fields)
    written = {
        "scenes_one": one,
        "scenes_two": GENERATING.format(task="scenes_two", visual="shown", messages=messages, **mean, **fields),
        "scenes_loud": GENERATING.format(task="scenes_loud", visual="first", messages="", **loud, **fields),
        "scenes_broken": GENERATING.format(task="scenes_broken", visual="first", messages="", **broken, **fields),
        "scenes_drawn": one.replace("scenes_one", "scenes_drawn").replace("generate_until", "generate_visual_cot"),
        "scenes_choice": CHOOSING.format(**fields),
    }
    for name, text in written.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def _bytes(picture: Image.Image) -> bytes:
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
