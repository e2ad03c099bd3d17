"""The model card: README.md of an exported checkpoint, from what its run recorded.

Invariant: nothing is claimed that is not in the run's files, and no path of this machine is told: of directories and data files
the name alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffvl.config.families import family_of_trunk
from diffvl.config.recipe import PREPARED, VERSION
from diffvl.config.supported import is_vlm
from diffvl.errors import CheckpointError
from diffvl.export.sdar import launches
from diffvl.export.source import Run
from diffvl.store import checkpoint
from diffvl.store.evaluation import metric_name, read_results
from diffvl.store.metrics import METRICS_FILE, measures_of, read_json_lines

CARD = "README.md"
REPO = "REPO"  # what a reader puts his repository or directory in the place of
FIGURES = ("eval", "accuracy", "match", "similarity", "loss")  # words in the names of figures worth a line
LOADS_VLM = """
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("REPO", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("REPO", trust_remote_code=True)
chat = [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "\\nWhat is it?"}]}]
inputs = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
output = model.generate(**inputs)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="REPO", trust_remote_code=True)
print(ask(text=chat, max_new_tokens=64, return_full_text=False)[0]["generated_text"])
```
"""
LOADS_TEXT = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("REPO", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("REPO", trust_remote_code=True)
chat = [{"role": "user", "content": "What is a block?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""
LOADS_ADAPTER = """
```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "REPO/adapter")  # `model` as above: the weights from before the adapters
```
"""


@dataclass(frozen=True)
class Step:
    """One directory on the way to the run. settings: of its stage; None of what was prepared. steps: that it took."""

    name: str
    state: Mapping[str, Any]
    settings: Any


def lineage(run: Run) -> list[Step]:
    """Lists the directories that led to the run, the first one first, as far as they are still there."""
    steps: list[Step] = []
    directory, state, recipe = run.directory, run.state, run.recipe
    while True:
        kind = str(state.get("kind"))
        steps.insert(0, Step(kind, state, dict(recipe.stages).get(kind)))  # type: ignore[arg-type]
        directory = Path(str((state.get("parents") or [""])[0]))
        if kind == PREPARED or not (directory / checkpoint.STATE_FILE).is_file():
            return steps
        state, recipe = checkpoint.read_state(directory), checkpoint.recipe_of(directory)


def source_licence(run: Run) -> str | None:
    """Reads the licence in the front matter of the source's card, if its directory is here."""
    readme = Path(run.recipe.model or "") / CARD
    return front_matter(readme).get("license") if readme.is_file() else None


def front_matter(readme: Path) -> dict[str, Any]:
    """Reads the settings at the head of a card; {} where it has none.

    Raises:
        CheckpointError: if they are no YAML.
    """
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        raise CheckpointError(f"{readme}: its front matter is no YAML ({error}); correct it") from error
    return found if isinstance(found, dict) else {}


def card(run: Run, layout: str, text_only: bool, adapters: bool, figures: Mapping[str, float], licence: str | None) -> str:
    """Writes the card.

    Args:
        figures: of the proof. licence: None where nobody knows it.
    """
    source = Path(run.recipe.model or "unknown").name if Path(run.recipe.model or "").exists() else run.recipe.model or "unknown"
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation" if text_only else "image-text-to-text",
        "base_model": source,
        "tags": ["block-diffusion", "diffvl", layout],
    }
    if licence is not None:
        head = {"license": licence, **head}
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {source}, {'lossless drafts' if run.is_lossless else 'block diffusion in blocks'} of {run.config.block_size}\n",
        _what(run, layout, text_only),
        _source(run, source, licence),
        _stages(run),
        _results(run, figures),
        *_benchmarks(run),
        "## Loading\n" + (LOADS_TEXT if text_only else LOADS_VLM) + (LOADS_ADAPTER if adapters else ""),
        *([_engines(run)] if text_only else []),
        _with_diffvl(layout),
        _limits(run, layout, text_only),
    ]
    return "\n".join(parts)


def _what(run: Run, layout: str, text_only: bool) -> str:
    config = run.config
    part = "The text part of a block-diffusion vision-language model" if text_only else "A block-diffusion vision-language model"
    if config.decoding == "ar":
        return f"{part}, of which this is the state before block diffusion: it answers token by token. Layout `{layout}`.\n"
    if run.is_lossless:
        return (
            f"A vision-language model that answers as its parent does, in fewer forwards: adapters of rank {_rank(run)} draft "
            f"{config.block_size} tokens at a time, and the parent's own weights, which are here unchanged, check them. Greedy "
            f"answers are the parent's, in 16 bits up to rounding. Loading needs peft. Layout `{layout}`.\n"
        )
    return (
        f"{part}: answers come in blocks of {config.block_size} tokens, whose masks (token {config.mask_token_id}) are filled in "
        f"a few steps. Blocks begin {'at multiples of their size' if config.grid == 'absolute' else 'with the answer'}; a clean "
        f"token sees {'its whole block' if config.context == 'block' else 'what stands before it'}; a position predicts "
        f"{'its own' if config.target == 'same' else 'the next'} token. Layout `{layout}`.\n"
    )


def _rank(run: Run) -> int | str:
    """The rank of the adapters, as their stage set it."""
    loras = [stage.lora for stage in run.recipe.stages.values() if stage.lora is not None]
    return loras[-1].rank if loras else "unknown"


def _source(run: Run, source: str, licence: str | None) -> str:
    stock = run.config.source_config or run.config.text_config
    tower = run.config.vision_config
    seen = f" and a {tower.model_type} tower ({run.config.connector} connector)" if tower is not None else ""
    route = "vision-language model" if is_vlm(stock) else family_of_trunk(stock).route
    told = licence or "not known here; look at the source's card, and set `license` above"
    return f"## Source\n\n- made from: {source}, a {route} ({stock.model_type}){seen}\n- licence of the source: {told}\n"


def _stages(run: Run) -> str:
    rows = ["## Stages\n", "| stage | objective | trained (learning rate) | steps | data |", "|---|---|---|---|---|"]
    for step in lineage(run):
        if step.settings is None:
            proofs = step.state.get("proofs") or {}
            told = ", ".join(f"{name} {value:.1e}" for name, value in proofs.items())
            rows.append(f"| {step.name} | parity with the source (std of the logits): {told or 'not recorded'} | | | |")
            continue
        objective = step.settings.objective
        kind = objective.kind + (f", blocks of {objective.block_size}" if objective.kind != "ar" else "")
        trained = ", ".join(f"{part} {rate:g}" for part, rate in step.settings.trainable.items())
        lora = f", LoRA of rank {step.settings.lora.rank}" if step.settings.lora else ""
        data = ", ".join(
            f"{Path(str(facts.get('file'))).name} ({facts.get('records'):,} records)"
            for facts in (step.state.get("data") or {}).values()
        )
        done = (step.state.get("state") or {}).get("steps", "")
        rows.append(f"| {step.name} | {kind} | {trained}{lora} | {done} | {data} |")
    return "\n".join(rows) + "\n"


def _results(run: Run, figures: Mapping[str, float]) -> str:
    """The last held-out figures of the run, and those of the proof."""
    file = run.directory / METRICS_FILE
    measures = measures_of(read_json_lines(file)) if file.is_file() else {}
    rows = [
        f"| {name} | {measure.points[-1][1]:.4f} | {measure.points[-1][0]} |"
        for name, measure in measures.items()
        if measure.points and any(word in name for word in FIGURES)
    ]
    measured = ["| figure | last value | at step |", "|---|---|---|", *rows] if rows else ["The run recorded no figures."]
    worst = max(figures.values())
    proof = f"Loaded in a process of its own, it gives the logits of the model in memory: largest difference {worst:.1e} std."
    return "\n".join(["## Results\n", *measured, "", proof, ""])


def _benchmarks(run: Run) -> list[str]:
    """What benchmarks said of the run, as `diffvl evaluate --tasks` left it; nothing where none was run."""
    rows = [
        f"| {result['task']} | {metric_name(one)} | {one['value']:.4f} | {result['n']} | {_decoding(result['decoding'])} "
        f"| lmms-eval {result['versions']['lmms_eval']}, {result['date']} |"
        for result in read_results(run.directory)
        for one in result["metrics"]
    ]
    heads = ["| benchmark | metric | value | n | decoding | measured with |", "|---|---|---|---|---|---|"]
    return ["\n".join(["### Benchmarks\n", *heads, *rows, ""])] if rows else []


def _decoding(settings: Mapping[str, Any]) -> str:
    """The settings that decide what an answer is, in a few words."""
    shown = ("mode", "denoising_steps", "remasking", "threshold", "entropy_budget", "temperature", "max_new_tokens")
    return ", ".join(f"{name} {settings[name]}" for name in shown if name in settings)


def _engines(run: Run) -> str:
    lines = [
        "## Serving\n",
        "The engines read neither block size nor mask token from config.json: say the block size, as here; the mask token is in "
        "their code.\n",
    ]
    for name, command in launches(Path(REPO), run.config.block_size, run.config.mask_token_id).items():
        lines.append(f"- {name}:\n\n  ```\n  {command}\n  ```\n")
    return "\n".join(lines)


def _with_diffvl(layout: str) -> str:
    command = {
        "native": 'diffvl generate REPO --image cat.jpg --prompt "What is it?"',
        "sdar_v": "diffvl convert --from REPO --stage diffuse --data my.json",
        "sdar": "diffvl convert REPO --stage align --data my.json",
    }[layout]
    return f"With diffvl {VERSION}, `{command}`{'' if layout == 'native' else ' trains it further'}.\n"


def _limits(run: Run, layout: str, text_only: bool) -> str:
    limits = ["Prompts and answers are in the checkpoint's own chat template; another one was not trained on."]
    longest = getattr(run.config.text_config, "max_position_embeddings", None)
    if longest is not None:
        limits.append(f"A conversation has at most {longest:,} tokens, images included.")
    if text_only:
        limits.append("Images are left out of this layout. It was trained with them; how it answers without was not measured.")
    elif run.config.source_config is None:
        limits.append("No videos.")
    if layout != "native":
        limits.append("One prompt at a time where it is called block by block as SDAR's scripts do; `generate` takes batches.")
    limits.append("Nothing was done against wrong, harmful or private answers beyond what the source has.")
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits) + "\n"
