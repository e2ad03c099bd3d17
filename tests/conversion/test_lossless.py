"""A lossless conversion from end to end: what is written is adapters over a base that stays as it was, to the byte."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_checkpoints import edit_json
from forks import Forks
from helpers import ORDINARY, metrics
from lossless import stir
from processes import on_processes
from safetensors.torch import load_file, save_file
from tiny_runs import command, record, stage, succeed, write_data, write_recipe
from training_runs import Crash

from diffvl.errors import CheckpointError
from diffvl.store.checkpoint import load_checkpoint
from diffvl.train import loop

DRAFT = {"kind": "draft", "block_size": 3, "drafts": 4}
SHORT = ("--set", "stages.diffuse.data.max_length=64")
ADAPTED: dict[str, Any] = {"objective": DRAFT, "trainable": {"trunk": 1e-2, "mask_row": 1e-2}, "lora": {"rank": 4, "alpha": 4}}


def bytes_of(directory: Path) -> dict[str, str]:
    files = (file for file in sorted(directory.rglob("*")) if file.is_file())
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By the names without adapters; what adapters and mask row add is left out."""
    named = model.state_dict().items()
    return {name.replace(".base_layer.", "."): value for name, value in named if ".lora_" not in name and name != "mask_row"}


@pytest.fixture(scope="module")
def finished(
    prepared: Callable[[str], Path], tower: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path, dict[str, str]]]:
    """Model type -> (the base, what `convert` made of it, the base's bytes before). Drafts of images; one record is held out."""
    known: dict[str, tuple[Path, Path, dict[str, str]]] = {}

    def make(model_type: str) -> tuple[Path, Path, dict[str, str]]:
        if model_type not in known:
            folder = tmp_path_factory.mktemp(f"lossless-{model_type}")
            base = folder / "run" / "prepared"
            shutil.copytree(prepared(model_type), base)
            before = bytes_of(base)
            data = write_data(folder, *[record(answer=f"A {colour} star, a red circle.") for colour in ("red", "blue", "green")])
            section = stage("diffuse", data, **ADAPTED, steps=3, eval_every=3, eval_limit=1, data={"holdout": 1})
            recipe = write_recipe(folder / "recipe.yaml", tower, diffuse=section)
            words = ("--from", base, "--stage", "diffuse", "--recipe", recipe, "--out", folder / "run")
            succeed("convert", *words)
            known[model_type] = (base, folder / "run" / "diffuse", before)
        return known[model_type]

    return make


# Both kinds: a language model with tower and connector, and a whole vision-language model.
KINDS = pytest.mark.parametrize("model_type", ["llama", "qwen2_5_vl"])


@KINDS
def test_the_base_stays_as_it_was_and_answers(model_type: str, finished: Any):
    base, directory, before = finished(model_type)
    assert bytes_of(base) == before
    written = bytes_of(directory)
    assert not any(name.startswith("model") and name.endswith(".safetensors") for name in written)
    assert {name for name in written if "/" in name} == {
        f"gated_adapter/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "mask_row.safetensors")
    }
    parent, model = load_checkpoint(base)[0].eval(), load_checkpoint(directory)[0]
    was, now = tensors_of(parent), tensors_of(model)
    assert was.keys() == now.keys()
    assert all(torch.equal(was[name], now[name]) for name in was)
    adapters = load_file(directory / "gated_adapter" / "adapter_model.safetensors")
    assert all(float(tensor.abs().max()) > 0 for tensor in adapters.values())
    ids = torch.randint(0, ORDINARY, (2, 9), generator=torch.Generator().manual_seed(0))
    noisy = torch.arange(9).expand(2, -1) > 5
    ids = ids.masked_fill(noisy, model.config.mask_token_id)
    with torch.no_grad():
        assert torch.equal(model(ids[:, :6]).logits, parent(ids[:, :6]).logits)
        drafted, plain = model(ids, noisy=noisy).logits, parent(ids).logits
    assert torch.equal(drafted[~noisy], plain[~noisy])
    assert (drafted - plain)[noisy].abs().max() > 1e-3
    held_out = [line for line in metrics(directory) if "eval_draft_loss" in line]
    assert held_out[-1]["eval_draft_loss"] < held_out[0]["eval_draft_loss"]


@KINDS
def test_token_by_token_it_is_the_parent(model_type: str, finished: Any):
    base, directory, _ = finished(model_type)
    words = ("--prompt", "What is it?", "--max-new-tokens", "12", "--mode", "ar")
    assert succeed("generate", directory, *words).out == succeed("generate", base, *words).out


CLIENT = """
import json, sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
directory, base = sys.argv[1:3]
more = {"base": base} if base else {}
model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True, **more).eval()
AutoProcessor.from_pretrained(directory, trust_remote_code=True)
ids = torch.arange(5, 13)[None]
noisy = torch.arange(8)[None] > 4
ids = ids.masked_fill(noisy, model.config.mask_token_id)
with torch.no_grad():
    print(json.dumps([model(ids, noisy=noisy).logits.sum(-1).tolist(), model(ids).logits.sum(-1).tolist()]))
"""


def clean_process(directory: Path, base: Path | None = None) -> Any:
    """Logits of a process in which diffvl cannot be found."""
    words = [sys.executable, "-I", "-c", f"import sys; sys.modules['diffvl'] = None\n{CLIENT}", str(directory), str(base or "")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@KINDS
def test_transformers_loads_it_without_diffvl(model_type: str, finished: Any, tmp_path: Path):
    base, directory, _ = finished(model_type)
    model = load_checkpoint(directory)[0].eval()
    ids, noisy = torch.arange(5, 13)[None], torch.arange(8)[None] > 4
    ids = ids.masked_fill(noisy, model.config.mask_token_id)
    with torch.no_grad():
        own = [model(ids, noisy=noisy).logits.sum(-1).tolist(), model(ids).logits.sum(-1).tolist()]
    assert clean_process(directory) == own
    moved = tmp_path / "elsewhere"
    shutil.copytree(base, moved)
    assert clean_process(directory, moved) == own
    succeed("export", directory, "-o", tmp_path / "whole")
    assert clean_process(tmp_path / "whole") == own


@pytest.mark.slow
@KINDS
def test_an_export_has_the_bases_weights_and_the_gate_in_it(model_type: str, finished: Any, tmp_path: Path):
    base, directory, before = finished(model_type)
    out = tmp_path / "whole"
    assert "parity: largest difference" in succeed("export", directory, "-o", out).out
    exported = bytes_of(out)
    assert exported["model.safetensors"] == before["model.safetensors"]
    again = load_checkpoint(out)[0]  # its base is itself, wherever it lies
    assert again.gate is not None
    assert json.loads((out / "config.json").read_text())["gated_adapter"]["base"] == "."
    assert "lossless drafts of 3" in (out / "README.md").read_text()


def test_what_merges_refuses_it(finished: Any, tmp_path: Path):
    _, directory, _ = finished("llama")
    for layout in ("sdar_v", "sdar"):
        refused = command("export", directory, "--layout", layout, "-o", tmp_path / "other")
        assert refused.code == 2
        assert "act on drafts only, so they cannot be merged" in refused.err
    kept = command("export", directory, "--keep-adapters", "-o", tmp_path / "other")
    assert kept.code == 2
    assert "adapters are never merged" in kept.err
    assert not (tmp_path / "other").exists()


def copied_run(finished: Any, to: Path) -> tuple[Path, Path]:
    base, directory, _ = finished("llama")
    shutil.copytree(base.parent, to)
    return to / base.name, to / directory.name


def test_another_base_is_refused(finished: Any, tmp_path: Path):
    """One value of one weight is another; or no base is there."""
    base, directory = copied_run(finished, tmp_path / "run")
    load_checkpoint(directory)  # a run that was moved as a whole still has its base beside it
    weights = load_file(base / "model.safetensors")
    weights["connector.layers.0.bias" if "connector.layers.0.bias" in weights else next(iter(weights))].view(-1)[0] += 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    ended = command("generate", directory, "--prompt", "What?")
    assert ended.code == 2
    assert "is another base than these adapters were trained on" in ended.err
    assert ended.err.count("\n") <= 2
    (base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    ended = command("generate", directory, "--prompt", "What?")
    assert ended.code == 2
    assert "holds no weights: fetch it again" in ended.err
    shutil.rmtree(base)
    ended = command("generate", directory, "--prompt", "What?")
    assert ended.code == 2
    assert "which is not there. Bring it back, or say where it lies" in ended.err


def test_adapters_that_do_not_fit_are_refused(finished: Any, tmp_path: Path):
    _, directory = copied_run(finished, tmp_path / "run")
    file = directory / "gated_adapter" / "adapter_model.safetensors"
    adapters = load_file(file)
    adapters.pop(next(iter(adapters)))
    save_file(adapters, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="the adapters do not fit the trunk"):
        load_checkpoint(directory)
    shutil.rmtree(file.parent)
    with pytest.raises(CheckpointError):
        load_checkpoint(directory)


def test_nothing_goes_on_from_it(finished: Any, tmp_path: Path):
    base, directory, _ = finished("llama")
    words = ("--stage", "diffuse", "--recipe", "sdar", "--data", "none.json", "--out", tmp_path / "on")
    ended = command("convert", "--from", directory, *words)
    assert ended.code == 2
    assert f"is a lossless conversion, whose adapters stand on {directory / '..' / base.name}" in ended.err


WRONG = {
    "context": (
        "objective.context=block",
        "a lossless conversion has no such setting: context: drafts are checked by the parent",
    ),
    "ar loss": ("objective.ar_weight=1.0", "a lossless conversion has no such setting: ar_weight: the parent never changes"),
    "target": ("objective.target=same", "it is always shift"),
    "noise": ("objective.noise={schedule: full}", "every token of a draft is a mask"),
    "tower": ("trainable.tower=1.0e-5", "trainable names trunk (the adapters on it) and mask_row, and nothing else; tower"),
    "connector": ("trainable.connector=1.0e-5", "and nothing else; connector cannot be in it"),
    "trunk itself": ("lora=null", "without lora the trunk itself would train"),
    "no mask row": ("trainable={trunk: 1.0e-3}", "mask_row is missing"),
    "answers": (
        "eval_every=1 --set stages.diffuse.data.holdout=1 --set stages.diffuse.eval_answers=1",
        "eval_answers has no effect",
    ),
    "tiles": ("tiling={kind: none}", "tiling would show it other images"),
    "attention": ("objective.forwards=two --set stages.diffuse.attention=tiled", "attention: tiled is for a whole row"),
    "decay": ("objective.block_size=1 --set stages.diffuse.objective.decay=0.5", "decay has no effect with block_size: 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_told_in_one_message(name: str, prepared: Callable[[str], Path], tmp_path: Path):
    setting, told = WRONG[name]
    sets = [word for part in setting.split(" --set stages.diffuse.") for word in ("--set", f"stages.diffuse.{part}")]
    data = write_data(tmp_path, record(None, "What is it?", "A star, and a red one."))
    require_mistake(prepared("llama"), data, tmp_path / "run", told, *sets)


def test_data_without_answers_is_told(prepared: Callable[[str], Path], tmp_path: Path):
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"conversations": [{"from": "human", "value": "What is it?"}]}\n')
    require_mistake(prepared("llama"), data, tmp_path / "run", "prompts.jsonl")


def require_mistake(base: Path, data: Path, out: Path, told: str, *sets: str) -> None:
    words = ("--from", base, "--stage", "diffuse", "--recipe", "lossless", "--data", data, "--out", out)
    ended = command("convert", *words, *SHORT, *sets)
    assert ended.code == 2, ended.out
    assert told in ended.err
    assert "Traceback" not in ended.err
    assert not out.exists()


def test_weights_that_see_whole_blocks_are_no_parent(prepared: Callable[[str], Path], tower: Path, tmp_path: Path):
    data = write_data(tmp_path, record(None, "What is it?", "A star, and a red one."))
    blocks = tmp_path / "blocks"
    shutil.copytree(prepared("llama"), blocks)
    edit_json(blocks / "config.json", decoding="blocks", context="block")
    require_mistake(blocks, data, tmp_path / "run", "draft needs a parent that answers token by token")
    edit_json(blocks / "config.json", context="causal")
    ended = command(
        "convert", "--from", blocks, "--stage", "diffuse", "--recipe", "lossless", "--data", data, "--dry-run", *SHORT
    )
    assert ended.code == 0, ended.err
    stages = {"align": stage("diffuse", data), "diffuse": stage("diffuse", data, **ADAPTED)}
    recipe = write_recipe(tmp_path / "recipe.yaml", tower, **stages)
    ended = command("convert", "--from", prepared("llama"), "--recipe", recipe, "--out", tmp_path / "run")
    assert ended.code == 2
    assert "the stage align has context: block" in ended.err


def test_a_diffusion_model_is_no_parent(dllm: Callable[[str], Path], tower: Path, tmp_path: Path):
    data = write_data(tmp_path, record(None, "What is it?", "A star."))
    section = stage("diffuse", data, **ADAPTED)
    recipe = write_recipe(tmp_path / "recipe.yaml", tower, diffuse=section)
    ended = command("convert", dllm("llada"), "--recipe", recipe, "--out", tmp_path / "run")
    assert ended.code == 2
    assert "draft has no meaning for llada, a diffusion language model" in ended.err


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("forwards", ["one", "two"])
def test_two_processes_are_one(
    forwards: str, sharding: str, forks: Forks, prepared: Callable[[str], Path], tower: Path, tmp_path: Path
):
    """With the model whole in each and in parts over both, packed: the same losses, the same adapters, the gate in place."""
    texts = ["Red. " * (2 + 3 * number % 7) for number in range(9)]
    data = write_data(tmp_path, *(record(None, "What is it?", text) for text in texts))
    ended: list[Path] = []
    for processes in (1, 2):
        section = stage(
            "diffuse",
            data,
            **{**ADAPTED, "objective": {**DRAFT, "forwards": forwards}},
            steps=3,
            log_every=1,
            batch_size=2 // processes,
            accumulation=2,
            sharding="none" if processes == 1 else sharding,
            data={"row_length": 400, "holdout": 1},
            eval_every=3,
            eval_limit=1,
        )
        recipe = write_recipe(tmp_path / f"{processes}.yaml", tower, diffuse=section)
        out = tmp_path / str(processes)
        words = ["convert", "--from", prepared("llama"), "--stage", "diffuse", "--recipe", recipe, "--out", out]
        done = on_processes(forks, tmp_path, "diffvl", words, processes)
        assert [one.code for one in done] == [0] * processes, "\n".join(one.err for one in done)
        ended.append(out / "diffuse")
    one, two = (metrics(directory) for directory in ended)
    assert [line["loss"] for line in two if "loss" in line] == pytest.approx(
        [line["loss"] for line in one if "loss" in line], rel=1e-4
    )
    own, theirs = (load_file(directory / "gated_adapter" / "adapter_model.safetensors") for directory in ended)
    for name, tensor in own.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-2, atol=1e-4)
    load_checkpoint(ended[1])


def test_a_resumed_run_is_the_uninterrupted_one(prepared: Callable[[str], Path], tower: Path, tmp_path: Path, monkeypatch: Any):
    """To the bit, drafts included."""
    data = write_data(tmp_path, *(record(None, "What is it?", "Red. " * number) for number in range(2, 8)))
    section = stage("diffuse", data, **ADAPTED, steps=4, save_every=2)
    recipe = write_recipe(tmp_path / "recipe.yaml", tower, diffuse=section)
    words = ("convert", "--from", prepared("llama"), "--stage", "diffuse", "--recipe", recipe, "--out")
    succeed(*words, tmp_path / "whole")
    whole = loop.Loop.train_step

    def train_step(self: Any, *arguments: Any) -> float:
        if self.step == 3:
            raise Crash
        return whole(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(loop.Loop, "train_step", train_step)
        command(*words, tmp_path / "cut")
    succeed(*words, tmp_path / "cut", "--resume")
    files = [tmp_path / name / "diffuse" / "gated_adapter" / "adapter_model.safetensors" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_stirred_adapters_stay_behind_the_gate(finished: Any):
    """Whatever the adapters are, a forward without `noisy` is the parent's."""
    base, directory, _ = finished("llama")
    model, parent = load_checkpoint(directory)[0].eval(), load_checkpoint(base)[0].eval()
    stir(model, 50.0)
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, parent(ids).logits)
