"""Bad data, interrupted runs, and what `generate` and `evaluate` refuse, through the command's own entry point: one clear
message, exit code 2, no traceback, nothing half written; what was finished stays."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from forks import Forks
from processes import on_processes
from tiny_runs import Workshop, copy, cut, record, refused, the_message, tree, write_data

from diffvl.train.order import StepOrder

pytestmark = pytest.mark.usefixtures("offline")


# --- data ------------------------------------------------------------------------------------------------------------------


def refuse_data(convert: Workshop, file: Path, *words: object, says: Sequence[str]) -> None:
    """Bad data of the last stage is found before any work on the first; a dry run finds it too."""
    convert.refuses("--set", f"stages.diffuse.data.train={file}", *words, says=says)
    convert.refuses("--data", file, "--dry-run", *words, says=says)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (record(image="none.png"), "image file not found: {folder}/none.png (relative paths start at the data file's folder; "),
        (record(question="<image><image> Both?"), "more <image> than images: 2 in the text, 1 in the record"),
        (record(answer=" \n"), "turn 2: empty answer; fill it or remove the record"),
        ({"image": "good.png"}, "no `conversations` (nor `messages`)"),
    ],
    ids=["missing image", "more markers", "empty answer", "no turns"],
)
def test_bad_records(bad: dict[str, Any], says: str, convert: Workshop, tmp_path: Path):
    file = write_data(tmp_path, record(), bad)
    refuse_data(convert, file, says=[f"{file}:3: ", says.format(folder=tmp_path)])


def test_malformed_json_names_its_line(convert: Workshop, tmp_path: Path):
    file = write_data(tmp_path, record(), record(), name="data.jsonl")
    file.write_text(f"{json.dumps(record())}\n{json.dumps(record())[:-1]}\n", encoding="utf-8")
    refuse_data(convert, file, says=[f"{file}:2: malformed JSON at column"])


def test_several_bad_records_are_told_at_once(convert: Workshop, tmp_path: Path):
    file = write_data(tmp_path, record(answer=""), record(), record(image="none.png"))
    refuse_data(convert, file, says=[f"{file}: 2 problems", f"{file}:2: turn 2: empty answer", f"{file}:4: image file not found"])


@pytest.mark.parametrize("content", [b"I am no image", b"", None], ids=["text", "empty", "cut short"])
def test_a_corrupt_image_is_found_before_training(content: bytes | None, convert: Workshop, tmp_path: Path):
    file = write_data(tmp_path, record(), record(image="bad.png"))
    if content is None:
        shutil.copy(tmp_path / "good.png", tmp_path / "bad.png")
        cut(tmp_path / "bad.png")
    else:
        (tmp_path / "bad.png").write_bytes(content)
    refuse_data(convert, file, says=[f"data.json:3: image {tmp_path}/bad.png cannot be read", "replace it or leave it out"])


def test_a_corrupt_held_out_image(convert: Workshop, tmp_path: Path):
    file = write_data(tmp_path, record(image="bad.png"))
    (tmp_path / "bad.png").write_text("I am no image", encoding="utf-8")
    convert.refuses("--set", f"stages.diffuse.data.eval={file}", says=[f"data.json:2: image {tmp_path}/bad.png cannot be read"])


def test_a_record_longer_than_max_length(convert: Workshop, tmp_path: Path):
    """With a check of all lengths, before any work; otherwise when its turn comes."""
    file = write_data(tmp_path, record(), record(answer="Yes. " * 200), record(answer="No. " * 200))
    check = ("--set", "stages.align.data.check_lengths=true", "--set", "stages.diffuse.data.check_lengths=true")
    says = [f"{file}: 2 problems", f"{file}:3: 1047 tokens, images included, where at most 400 are allowed (record 2)"]
    says += [f"{file}:4: 847 tokens", "raise data.max_length, or set data.too_long=drop to leave them out"]
    refuse_data(convert, file, *check, says=says)
    drop = ("--set", "stages.align.data.too_long=drop", "--set", "stages.diffuse.data.too_long=drop")
    all_long = write_data(tmp_path, record(answer="Yes. " * 200), name="long.json")
    refuse_data(convert, all_long, *check, *drop, says=[f"{all_long}: all 1 records are longer than 400 tokens"])
    words = ("convert", convert.trunk, "--recipe", convert.recipe, "--out", convert.out, "--data", file)
    message = refused(*words, says=["tokens, images included, where at most 400 are allowed (record "])
    assert message.endswith("(data.check_lengths=true finds all of them before training)\n")
    assert sorted(path.name for path in convert.out.iterdir()) == ["align.partial", "prepared"]


def test_long_records_are_left_out_on_request_and_it_says_so(convert: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = write_data(tmp_path, record(), record(answer="Yes. " * 200), record())
    words = ("--stage", "align", "--data", file, "--set", "stages.align.data.too_long=drop", "--set", "stages.align.epochs=1")
    words += ("--set", "stages.align.steps=null", "--set", "stages.align.batch_size=1")
    tiny_runs.succeed("convert", convert.trunk, "--recipe", convert.recipe, "--out", convert.out, *words)
    told = f"align: records left out: 1 too long; listed in {convert.out}/align/left_out.jsonl"
    assert [entry.getMessage() for entry in caplog.records].count(told) == 1
    state = json.loads((convert.out / "align" / "diffvl.json").read_text(encoding="utf-8"))
    assert state["state"]["steps"] == 3 and state["left_out"] == {"too long": 1}
    (line,) = (convert.out / "align" / "left_out.jsonl").read_text(encoding="utf-8").splitlines()
    assert (json.loads(line)["record"], json.loads(line)["file"]) == (2, str(file))
    report = (convert.out / "align" / "report.html").read_text(encoding="utf-8")
    assert "Records left out" in report and "<th>too long</th><td>1</td>" in report


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (
            "max_length=513",
            "diffuse: data.max_length is 513, but a sample in whole blocks may have 512 tokens in this trunk's context",
        ),
        ("holdout=10", "diffuse: data.holdout is 10, but {train} has 10 records: nothing is left to train on"),
        ("train=null", "diffuse: no training data: give --data FILE (LLaVA-format .json or .jsonl, Parquet, a folder, a hub id)"),
        ("train=none.json", "none.json: no such data file"),
    ],
)
def test_data_settings(setting: str, says: str, convert: Workshop, shapes: dict[str, Path]):
    convert.refuses("--set", f"stages.diffuse.data.{setting}", says=[says.format(train=shapes["train"])])


def test_the_last_block_must_end_inside_the_context(convert: Workshop):
    """With the response grid an answer may begin anywhere, so that its last block may reach past the record's end."""
    words = ("--set", "stages.diffuse.objective.grid=response", "--set", "stages.diffuse.data.max_length=510")
    convert.refuses(*words, says=["may have 509 tokens in this trunk's context: set it to 509 or less"])


# --- interrupted runs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interrupted:
    """An align run stopped at a bad image. words: the command that began it."""

    words: tuple[object, ...]
    out: Path
    image: Path
    line: int
    message: str


def interrupt(convert: Workshop, folder: Path, workers: int, **more: object) -> Interrupted:
    """A set too large to look at beforehand (check_images=0), read by so many loader processes, with a bad
    image in the fifth of six steps."""
    fifth = StepOrder(rows=6, batch_size=1, accumulation=1, seed=0).micro_batches(4)[0][0]
    file = write_data(folder, *(record(image="bad.png" if number == fifth else "good.png") for number in range(6)))
    (folder / "bad.png").write_text("I am no image", encoding="utf-8")
    settings = {"data.workers": workers, "data.check_images": 0, "save_every": 1, "batch_size": 1, "steps": 6, **more}
    changes = [word for key, value in settings.items() for word in ("--set", f"stages.align.{key}={value}")]
    words = (
        "convert",
        convert.trunk,
        "--recipe",
        convert.recipe,
        "--stage",
        "align",
        "--data",
        file,
        "--out",
        convert.out,
        *changes,
    )
    message = refused(*words, says=[])
    return Interrupted(words, convert.out, folder / "bad.png", fifth + 2, message)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_of_a_large_set_stops_the_run_at_its_step_and_it_can_go_on(workers: int, convert: Workshop, tmp_path: Path):
    interrupted = interrupt(convert, tmp_path, workers)
    image = interrupted.image
    reason = f"cannot identify image file '{image}'"
    told = f"data.json:{interrupted.line}: image {image} cannot be read ({reason}); replace it or leave it out (record "
    assert told in interrupted.message and "set data.on_error=skip" in interrupted.message
    work = interrupted.out / "align.partial"
    assert sorted(path.name for path in interrupted.out.iterdir()) == ["align.partial", "prepared"]
    assert sorted(path.name for path in (work / "checkpoints").iterdir()) == ["checkpoint-3", "checkpoint-4"]
    if workers:
        shutil.copy(interrupted.image.with_name("good.png"), interrupted.image)
        tiny_runs.succeed(*interrupted.words, "--resume")
    else:  # or it goes on without the record, as the message says
        skip = ("--set", "stages.align.data.on_error=skip", "--set", "stages.align.data.max_skipped=0.2")
        tiny_runs.succeed(*interrupted.words, "--resume", *skip)
    lines = [json.loads(line) for line in (interrupted.out / "align" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_training_checkpoint_with_a_file_cut_short(convert: Workshop, tmp_path: Path):
    """And the one before it is still good."""
    interrupted = interrupt(convert, tmp_path, workers=0)
    folder = interrupted.out / "align.partial" / "checkpoints"
    last = folder / "checkpoint-4"
    for name in ("__0_0.distcp", ".metadata", "state.json"):
        spare = (last / name).read_bytes()
        cut(last / name)
        says = [f"{last / name}: damaged or cut short", f"remove {last}, and --resume goes on from the checkpoint before it"]
        refused(*interrupted.words, "--resume", says=says)
        (last / name).write_bytes(spare)
    shutil.rmtree(last)
    shutil.copy(interrupted.image.with_name("good.png"), interrupted.image)
    assert "going on after step 3" in tiny_runs.succeed(*interrupted.words, "--resume").out


def test_an_interrupted_run_goes_on_only_as_it_was(
    convert: Workshop, run: tiny_runs.Run, source: Callable[[str], Path], tmp_path: Path
):
    interrupted = interrupt(convert, tmp_path, workers=0)
    before = tree(interrupted.out)
    words, out = interrupted.words, interrupted.out
    refused(*words, says=[f"{out / 'prepared'} exists and is not empty", "add --resume"])
    refused(
        "convert", "--from", out / "prepared", *words[2:], says=[f"{out / 'align.partial'} holds an interrupted run", "--resume"]
    )
    changes = ("--set", "stages.align.batch_size=2", "--set", "stages.align.trainable.connector=0.01")
    says = ["align.partial has other settings, so --resume cannot continue it", "batch_size: began with 1, asked for 2"]
    says += ["trainable.connector: began with 0.001, asked for 0.01", "use the same, or another --out"]
    refused(*words, "--resume", *changes, says=says)
    says = ["prepared has other settings", "prepare.image_size: began with None, asked for 16", "seed: began with 0, asked for 7"]
    refused(*words, "--resume", "--set", "prepare.image_size=16", "--set", "seed=7", says=says)
    other = source("qwen2")
    says = ["prepared has other settings", f"model: began with '{source('llama')}', asked for '{other}'"]
    refused(words[0], other, *words[2:], "--resume", says=says)
    says = ["align.partial has other settings", f"start: began with '{out / 'prepared'}', asked for '{run.root / 'prepared'}'"]
    refused("convert", "--from", run.root / "prepared", *words[2:], "--resume", says=says)
    assert tree(out) == before


def test_data_that_changed_is_refused(convert: Workshop, tmp_path: Path):
    """Answers, order, a record more or less; told with the first record that differs. A touched or moved set is the same."""
    interrupted = interrupt(convert, tmp_path, workers=0)
    words, work = interrupted.words, interrupted.out / "align.partial"
    file = tmp_path / "data.json"
    values, before = json.loads(file.read_text(encoding="utf-8")), tree(interrupted.out)
    answer = {**values[3], "conversations": record(answer="A blue dot.")["conversations"]}
    for changed, first in (
        ([*values[:3], answer, *values[4:]], "(6 records); record 4 is the first that differs"),
        ([*values, values[0]], "(7 records); record 7 is the first that differs"),
        (values[:-1], "(5 records); record 6 is the first that differs"),
        ([answer, *values[1:3], values[0], *values[4:]], "(6 records); record 1 is the first that differs"),
    ):
        write_data(tmp_path, *changed)
        says = [
            f"{work}: the data is not what the run began with",
            f"data.train: began with {file} (6 records), now {file} {first}",
        ]
        refused(*words, "--resume", says=[*says, "--resume --accept-changed-data"])
        assert tree(interrupted.out) == before
    refused(*words, "--accept-changed-data", says=["--accept-changed-data has no effect without --resume"])
    moved = tmp_path / "moved"
    moved.mkdir()
    write_data(moved, *values, name="renamed.json")
    shutil.copy(tmp_path / "good.png", moved / "bad.png")
    tiny_runs.succeed(*(moved / "renamed.json" if word == file else word for word in words), "--resume")


def test_data_that_changed_is_accepted_where_it_is_asked_for(convert: Workshop, tmp_path: Path):
    """With a record more, so that an epoch has another number of steps."""
    interrupted = interrupt(convert, tmp_path, workers=0, steps="null", epochs=1)
    shutil.copy(interrupted.image.with_name("good.png"), interrupted.image)
    write_data(tmp_path, *[record(answer="A blue dot.")] * 7)
    tiny_runs.succeed(*interrupted.words, "--resume", "--accept-changed-data")
    state = json.loads((interrupted.out / "align" / "diffvl.json").read_text(encoding="utf-8"))
    assert state["data"]["train"]["records"] == 7 and state["state"]["steps"] == 7
    again = ("--data", tmp_path / "data.json", "--resume")
    assert "finished already" in tiny_runs.succeed(*interrupted.words, *again).out


# --- generate and evaluate -------------------------------------------------------------------------------------------------


@pytest.fixture
def good_image(tmp_path: Path) -> Path:
    write_data(tmp_path, record())
    return tmp_path / "good.png"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--threshold", "0.5"], "--threshold 0.5 has no effect with --strategy low_confidence_static"),
        (["--steps", "5"], "is 5, expected 1 to the block size, 4"),
        (["--prompt", "Hi " * 400], "tokens and 128 new ones do not fit the context of 512: shorten the prompt or lower"),
        (["--max-new-tokens", "500"], "and 500 new ones do not fit the context of 512: shorten the prompt or lower"),
        (["--image", "none.png"], "--image: image none.png does not exist"),
        (["--image", "."], "--image: image . cannot be read"),
        (["--image", "text.png"], "--image: image text.png cannot be read (cannot identify image file"),
        (["--image", "good.png", "--prompt", "<image><image>"], "the prompt has 2 <image> markers, 1 images were given"),
    ],
)
def test_generate(words: list[str], says: str, run: tiny_runs.Run, good_image: Path):
    good_image.with_name("text.png").write_text("I am no image", encoding="utf-8")
    refused("generate", run.diffuse, "--prompt", "What is it?", *words, says=[says])


@pytest.mark.parametrize("verb", ["generate", "evaluate"])
def test_directories_that_are_no_diffvl_checkpoint(verb: str, convert: Workshop, run: tiny_runs.Run, tmp_path: Path):
    file = write_data(tmp_path, record())
    rest = ("--prompt", "Hi") if verb == "generate" else ("--data", file)
    for directory, says in (
        (tmp_path / "nowhere", "nowhere: no such directory"),
        (run.root, f"{run.root}: no config.json there; expected a DiffVL checkpoint, as `diffvl convert` writes it"),
        (
            convert.trunk,
            f"a 'llama' checkpoint; expected one that `diffvl convert` wrote. To convert it: diffvl convert {convert.trunk}",
        ),
    ):
        refused(verb, directory, *rest, says=[says])


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "processor_config.json", "generation_config.json"]
)
def test_a_diffvl_directory_with_a_file_cut_short(name: str, run: tiny_runs.Run, tmp_path: Path):
    directory = copy(run.align, tmp_path / "align")
    cut(directory / name)
    says = [str(directory), "damaged", "again"]
    refused("generate", directory, "--prompt", "Hi", says=says)
    refused("evaluate", directory, "--data", write_data(tmp_path, record()), says=says)
    refused("convert", "--from", directory, "--stage", "diffuse", "--out", tmp_path / "out", says=says)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mask_token_id", "image_token_id"])
def test_token_ids_that_a_hand_has_changed(name: str, run: tiny_runs.Run, tmp_path: Path):
    """Behind the table, before it, and on an ordinary token, which would be taken for a mask without a word."""
    directory = copy(run.align, tmp_path / "align")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    data, right, rows = write_data(tmp_path, record()), config[name], config["text_config"]["vocab_size"]
    token = {"mask_token_id": "<|MASK|>", "image_token_id": "<image>"}[name]
    for wrong in (rows, 10**6, -1, 65, None):
        (directory / "config.json").write_text(json.dumps({**config, name: wrong}), encoding="utf-8")
        says = [
            f"{directory}/config.json: {name} is {wrong}, expected {right}, which the tokenizer gives {token}; the embedding has "
        ]
        says += [f"{rows} rows. Set it back, or copy the checkpoint again"]
        refused("generate", directory, "--prompt", "Hi", says=says)
        refused("evaluate", directory, "--data", data, says=says)
        refused("convert", "--from", directory, "--stage", "diffuse", "--out", tmp_path / "out", says=says)
    assert not (tmp_path / "out").exists()


def test_a_run_whose_own_records_are_damaged(run: tiny_runs.Run, tmp_path: Path):
    directory = copy(run.align, tmp_path / "align")
    words = ("convert", "--from", directory, "--stage", "diffuse", "--out", tmp_path / "out")
    cut(directory / "diffvl.json")
    refused(*words, says=[f"{directory}/diffvl.json: damaged, not readable as JSON"])
    (directory / "diffvl.json").unlink()
    refused(*words, says=[f"{directory}: no diffvl.json there; expected a directory that `diffvl convert` finished"])
    assert not (tmp_path / "out").exists()


def test_data_to_evaluate_on(run: tiny_runs.Run, tmp_path: Path):
    refused("evaluate", run.diffuse, "--data", tmp_path / "none.json", says=["none.json: no such data file"])
    file = write_data(tmp_path, record(image="bad.png"))
    (tmp_path / "bad.png").write_text("I am no image", encoding="utf-8")
    refused("evaluate", run.diffuse, "--data", file, says=[f"data.json:2: image {tmp_path}/bad.png cannot be read"])
    file = write_data(tmp_path, record(answer="Yes. " * 200))
    says = [f"{file}:2: 1047 tokens, images included, where at most 512 are allowed", "remove these records"]
    refused("evaluate", run.diffuse, "--data", file, says=says)


def test_evaluate_reads_no_more_than_it_needs(run: tiny_runs.Run, tmp_path: Path):
    """What is wrong after the limit is not met: neither text, nor an image, nor the file's end."""
    file = write_data(tmp_path, record(), record(), record(answer="Yes. " * 200), record(image="none.png"))
    file.write_text(file.read_text(encoding="utf-8").rstrip().removesuffix("]") + ", {oops", encoding="utf-8")
    figures = json.loads(tiny_runs.succeed("evaluate", run.diffuse, "--data", file, "--limit", 2, "--json").out)
    assert figures["records"] == figures["answers"] == 2
    refused("evaluate", run.diffuse, "--data", file, "--limit", 3, says=["data.json:4: 1047 tokens"])
    refused("evaluate", run.diffuse, "--data", file, "--limit", 4, says=["data.json:5: image file not found"])


@pytest.mark.parametrize("program", ["diffvl", pytest.param("fresh diffvl", marks=pytest.mark.slow)])
def test_a_bad_image_in_a_process_of_its_own(program: str, forks: Forks, run: tiny_runs.Run, tmp_path: Path):
    """What a user sees: the message, and nothing else."""
    long = record(answer="Yes. " * 200)
    file = write_data(tmp_path, record(image="bad.png"), record(), long)
    (tmp_path / "bad.png").write_text("I am no image", encoding="utf-8")
    words = ("convert", "--from", run.align, "--stage", "diffuse", "--data", file, "--out", tmp_path / "out")
    (ended,) = on_processes(forks, tmp_path, program, [*words, "--set", "stages.diffuse.data.too_long=drop"], number=1)
    assert ended.code == 2
    assert ended.err == f"error: {the_message(ended.err)}"
    assert the_message(ended.err).startswith(f"{file}:2: image {tmp_path}/bad.png cannot be read")
    assert not (tmp_path / "out").exists()


def test_the_stand_ins_of_these_tests_are_good(convert: Workshop, tmp_path: Path):
    """Every refusal above begins with a command that would pass."""
    printed = tiny_runs.succeed("convert", convert.trunk, "--recipe", convert.recipe, "--out", convert.out, "--dry-run").out
    assert "dry run: nothing was written" in printed and not convert.out.exists()
    assert torch.get_num_threads() == 1
