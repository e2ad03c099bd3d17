"""The Python API: `convert`, `load`, `generate` and `evaluate`, and the base of the errors that they raise.

`import diffvl` loads neither torch nor transformers. Each function imports what it needs when it is called.
"""

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffvl.errors import DiffvlError

if TYPE_CHECKING:
    from PIL.Image import Image

    from diffvl.config.recipe import StageName
    from diffvl.decode.answer import Answer, Decoder, DecodeSettings

__all__ = ["DiffvlError", "convert", "evaluate", "generate", "load"]

PathName = str | PathLike[str]


def convert(
    model: PathName | None = None,
    *,
    stage: "StageName | None" = None,
    recipe: PathName | None = None,
    data: PathName | None = None,
    start: PathName | None = None,
    out: PathName | None = None,
    lora: bool = False,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    accept_changed_data: bool = False,
    dry_run: bool = False,
    machine: str | None = None,
    measure: bool = False,
    trust_remote_code: bool = False,
    control: bool = False,
    speed: bool = True,
) -> Path:
    """Converts a model, as `diffvl convert` does: prepares it, trains the stages, writes a checkpoint after each.

    Args:
        model: a name from `diffvl models`, a hub id, a directory or a `.gguf` file.
        stage: only this stage; default: all stages of the recipe in order.
        recipe: a name from `diffvl recipes` or a file.
        data: the records to train on; see `docs/records.md`.
        start: the DiffVL directory to start from, in the place of `model`.
        out: where to write; default: a folder under `runs/`.
        lora: True trains low-rank adapters on the trunk and merges them at the end.
        settings: recipe settings by key path, such as `{"stages.diffuse.steps": 100}`.
        resume: True continues an interrupted run; accept_changed_data: although its data has changed.
        dry_run: True checks everything, prints the plan and writes nothing.
        machine: with `dry_run`, the GPUs to plan for, such as "8x80GB"; measure: True takes a few real steps of each stage.
        trust_remote_code: True runs the Python code that the checkpoint brings along.
        control: True trains next-token finetuning beside it, and writes a page that compares both; speed: False times nothing
            there, so that one model at a time is in memory.
    Returns:
        the last directory written, which is not that of the control (with `dry_run`: the folder of the run).
    Raises:
        DiffvlError: on a mistake of the caller, most of them before any work. What was finished stays.
    """
    from diffvl.conversion.run import ConvertRequest
    from diffvl.conversion.run import convert as run_convert
    from diffvl.store.files import Writing

    request = ConvertRequest(
        model=None if model is None else str(model),
        stage=stage,
        recipe=None if recipe is None else str(recipe),
        data=_path(data),
        start=_path(start),
        out=_path(out),
        lora=lora,
        assignments=tuple(_assignment(key, value) for key, value in (settings or {}).items()),
        resume=resume,
        accept_changed_data=accept_changed_data,
        dry_run=dry_run,
        machine=machine,
        measure=measure,
        trust_remote_code=trust_remote_code,
        control=control,
        speed=speed,
    )
    with Writing():
        if not control:
            return run_convert(request)
        from diffvl.compare.control import convert_with_control

        return convert_with_control(request)[0]


def load(directory: PathName) -> "Decoder":
    """Loads a checkpoint that `convert` wrote, onto a GPU where there is one.

    Returns:
        what `generate` answers with. It has a `model` and a `processor`, which are transformers' own kinds.
    Raises:
        CheckpointError: if the directory holds no such checkpoint, or a damaged one. It is a DiffvlError.
    """
    from diffvl.decode.answer import load_for_decoding

    return load_for_decoding(Path(directory))


def generate(
    model: "Decoder",
    prompt: str,
    images: "PathName | Image | Sequence[PathName | Image]" = (),
    videos: "PathName | Sequence[PathName | Sequence[PathName | Image]]" = (),
    **settings: Any,
) -> "Answer":
    """Answers a prompt, as `diffvl generate` does.

    Args:
        model: what `load` gave.
        prompt: the question. `<image>` marks where an image stands, `<video>` a video; without markers they stand before the
            text.
        images: one image or several, as files or as PIL images.
        videos: one video or several, each a file, a folder of its frames, or a list of frames.
        settings: how to decode, by the names of the fields of `DecodeSettings`, such as `max_new_tokens=64`.
    Returns:
        the answer: its `text`, its number of `tokens`, the number of `forwards` that they took, and the `seconds`.
    Raises:
        UsageError: if the settings, the prompt and the checkpoint do not fit together.
        DataError: if an image cannot be read. Both are DiffvlErrors.
    """
    from PIL.Image import Image

    from diffvl.data.images import open_image
    from diffvl.decode.answer import Decoder, answer_chats, user_message
    from diffvl.errors import UsageError

    if not isinstance(model, Decoder):
        raise UsageError(f"generate answers with what diffvl.load gives, not with {model!r}: load the checkpoint first")
    several = [images] if isinstance(images, str | PathLike | Image) else images
    opened = [image if isinstance(image, Image) else open_image(str(image), "images") for image in several]
    chosen = _decode_settings(settings)
    try:
        clips = [videos] if isinstance(videos, str | PathLike) else videos
        return answer_chats(model, [[user_message(prompt, opened, clips)]], chosen)[0]
    except ValueError as error:  # what the model's own `generate` raises where settings do not fit
        raise UsageError(str(error)) from error


def evaluate(directory: PathName, data: PathName, limit: int | None = None, **settings: Any) -> dict[str, float | int | str]:
    """Measures a checkpoint on held-out answers, as `diffvl evaluate` does.

    Args:
        directory: a checkpoint that `convert` wrote.
        data: the records with the true answers.
        limit: only so many records are looked at.
        settings: how to decode, as for `generate`.
    Returns:
        figures by name: masked-token loss and accuracy, exact match, edit similarity, and what was counted.
    Raises:
        DiffvlError: if the checkpoint or a record cannot be used.
    """
    from diffvl.evaluation.evaluate import evaluate_directory
    from diffvl.terminal.bars import quiet_libraries

    quiet_libraries()
    return evaluate_directory(Path(directory), Path(data), limit, _decode_settings(settings))


def _path(name: PathName | None) -> Path | None:
    return None if name is None else Path(name)


def _assignment(key: str, value: Any) -> str:
    """A setting as `--set` takes it. Raises ConfigError for a value that a recipe cannot hold."""
    from diffvl.errors import ConfigError

    try:
        return f"{key}={json.dumps(value, ensure_ascii=False, default=_as_text)}"
    except TypeError as error:
        raise ConfigError(f"{key}: a recipe cannot hold {value!r} ({error})") from error


def _as_text(value: Any) -> str:
    """A path as text. Raises TypeError for anything else that JSON does not know."""
    if isinstance(value, PathLike):
        return str(value)
    raise TypeError(f"{type(value).__name__} is neither text, number, list nor mapping")


def _decode_settings(given: Mapping[str, Any]) -> "DecodeSettings":
    """Raises UsageError for a name that is no setting."""
    from dataclasses import fields

    from diffvl.decode.answer import DecodeSettings
    from diffvl.errors import UsageError

    names = [field.name for field in fields(DecodeSettings)]
    if unknown := [name for name in given if name not in names]:
        raise UsageError(f"no setting of decoding is called {', '.join(unknown)}; there are: {', '.join(names)}")
    return DecodeSettings(**given)
