"""The command itself, run whole on tiny stand-ins: what the tests of bad input, of whole runs and of kills share."""

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffvl.cli import main as cli

BLOCK = 4
MAX_LENGTH = 400  # tokens; the built-in images' questions take up to 300 in the stand-ins' bytes


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def command(*words: object) -> Ended:
    """Runs `diffvl WORDS` in this process, from its entry point."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["diffvl", *map(str, words)])
        patch.setattr(sys, "excepthook", sys.excepthook)  # Typer replaces it
        with pytest.raises(SystemExit) as stop:
            cli.main()
    code = stop.value.code
    assert isinstance(code, int)
    return Ended(code, out.getvalue(), err.getvalue())


def succeed(*words: object) -> Ended:
    """Runs a command that must end well."""
    ended = command(*words)
    assert ended.code == 0, ended.err
    return ended


def stage(kind: str, train: Path, **settings: Any) -> dict[str, Any]:
    """A stage's section: two steps of two samples in fp32, nothing held out, unless `settings` say otherwise."""
    objective: dict[str, Any] = {"kind": "ar"}
    rates = {"connector": 1e-3}
    if kind == "diffuse":
        objective = {"kind": "block_diffusion", "block_size": BLOCK}
        rates = {"trunk": 1e-3, "connector": 1e-3, "mask_row": 1e-3}
    common = {"objective": objective, "trainable": rates, "steps": 2, "batch_size": 2, "precision": "fp32"}
    return {**common, **settings, "data": {"train": str(train), "max_length": MAX_LENGTH, **settings.get("data", {})}}


def write_recipe(file: Path, tower: Path, **stages: dict[str, Any]) -> Path:
    """A recipe file with these stages."""
    file.write_text(yaml.safe_dump({"prepare": {"vision_tower": str(tower)}, "stages": stages}), encoding="utf-8")
    return file


@dataclass(frozen=True)
class Run:
    """A finished run of both stages. output: what the command printed."""

    root: Path
    recipe: Path
    output: str

    @property
    def align(self) -> Path:
        return self.root / "align"

    @property
    def diffuse(self) -> Path:
        return self.root / "diffuse"


_MADE: dict[str, Run] = {}


def finished_run(factory: pytest.TempPathFactory, source: Callable[[str], Path], tower: Path, shapes: dict[str, Path]) -> Run:
    """Both stages on the llama stand-in, with a held-out record each, made once a session; not to be written into."""
    if not _MADE:
        folder = factory.mktemp("finished")
        shown = {"data": {"holdout": 1}, "eval_every": 2, "eval_limit": 1}
        stages = {"align": stage("align", shapes["align"], **shown), "diffuse": stage("diffuse", shapes["train"], **shown)}
        recipe = write_recipe(folder / "recipe.yaml", tower, **stages)
        ended = succeed("convert", source("llama"), "--recipe", recipe, "--out", folder / "run")
        _MADE["llama"] = Run(folder / "run", recipe, ended.out)
    return _MADE["llama"]


def tree(directory: Path) -> dict[str, tuple[int, int]]:
    """Everything under a directory: path -> (size, modification time in ns), to see that nothing was touched."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.stat()
        found[str(path.relative_to(directory))] = (status.st_size if path.is_file() else 0, status.st_mtime_ns)
    return found


def record(image: str | None = "good.png", question: str = "<image>\nWhat is it?", answer: str = "A red dot.") -> dict[str, Any]:
    """One record of LLaVA's form; its image, if any, must lie beside the data file."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"conversations": turns} if image is None else {"image": image, "conversations": turns}


def write_data(folder: Path, *records: dict[str, Any], name: str = "data.json") -> Path:
    """A data file with these records, one a line (record i from 0 starts in line i + 2), and `good.png` beside it."""
    Image.new("RGB", (20, 30), "red").save(folder / "good.png")
    file = folder / name
    file.write_text("[\n" + ",\n".join(json.dumps(value) for value in records) + "\n]\n", encoding="utf-8")
    return file


def short_records(folder: Path, count: int, name: str = "data.json") -> Path:
    """A data file of records with images and answers of one word, two words, ..., five words, one word, ..."""
    return write_data(folder, *[record(answer="Red. " * (number % 5 + 1)) for number in range(count)], name=name)


def write_gguf(model: Path, file: Path) -> None:
    """A llama checkpoint as a .gguf file in full precision."""
    gguf = pytest.importorskip("gguf")
    llama: Any = AutoModelForCausalLM.from_pretrained(model)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    config = llama.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tokenizer.get_vocab()
    names = sorted(vocabulary, key=vocabulary.get)
    added = tokenizer.get_added_vocab()
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([gguf.TokenType.CONTROL if name in added else gguf.TokenType.NORMAL for name in names])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names_there = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in llama.state_dict().items():
        part = name.split(".")[-2]
        values = tensor
        if part in heads:  # llama.cpp pairs the rotary halves row by row
            values = tensor.view(heads[part], 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        if name != "lm_head.weight":  # tied
            writer.add_tensor(names_there.get_name(name, try_suffixes=(".weight",)), values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- commands that must refuse -----------------------------------------------------------------------------------------------


def refused(*words: object, says: Sequence[str]) -> str:
    """The message of a command that must refuse; every text of `says` must be in it."""
    ended = command(*words)
    assert ended.code == 2, ended
    message = the_message(ended.err)
    for text in says:
        assert text in message, (text, message)
    return message


def the_message(err: str) -> str:
    """What follows the one `error:` on stderr."""
    assert "Traceback" not in err
    before, _, message = err.partition("error: ")
    assert message and "error:" not in before + message, err
    return message


@dataclass(frozen=True)
class Workshop:
    """`convert TRUNK --recipe RECIPE --out OUT` with more words; OUT must not be there afterwards."""

    trunk: Path
    recipe: Path
    out: Path

    def refuses(self, *words: object, says: Sequence[str], model: object = None) -> None:
        refused("convert", model or self.trunk, "--recipe", self.recipe, "--out", self.out, *words, says=says)
        assert not self.out.exists()


def workshop(source: Callable[[str], Path], tower: Path, shapes: dict[str, Path], folder: Path) -> Workshop:
    """A recipe of both stages on good data, in `folder`."""
    stages = {"align": stage("align", shapes["align"]), "diffuse": stage("diffuse", shapes["train"])}
    return Workshop(source("llama"), write_recipe(folder / "recipe.yaml", tower, **stages), folder / "out")


def copy(directory: Path, to: Path) -> Path:
    shutil.copytree(directory, to)
    return to


def cut(file: Path) -> None:
    """Leaves the first half of a file."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
