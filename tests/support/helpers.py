"""What several tests need: hand-made batches, settings, and comparisons. No fixtures here; those stand in shared_fixtures.py.

Shapes: B batch, L clean length, S side of an image in pixels.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from diffvl.config.objectives import BlockDiffusionObjective
from diffvl.config.recipe import Recipe
from diffvl.config.resolve import resolve
from diffvl.data.loader import StageData
from diffvl.data.sample_dataset import SampleDataset
from diffvl.data.samples import Batch, Sample, collate
from diffvl.demo import standins
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.store.metrics import read_json_lines

QUIET = Console(quiet=True)
CONTEXTS = ("block", "causal")
GRIDS = ("absolute", "response")
TARGETS = ("same", "shift")
ORDINARY = 250  # token ids below stand for single bytes in every stand-in tokenizer


def objective(**settings: Any) -> BlockDiffusionObjective:
    return BlockDiffusionObjective.model_validate({"block_size": 4, **settings})


def sample(config: DiffVLConfig, lengths: Sequence[int], index: int = 0, image: bool = False) -> Sample:
    """Random tokens: `lengths` are those of prompt, answer, prompt, answer ...; an image stands inside the first prompt, and
    its tokens are counted in that prompt's length. Every answer ends with the stop token."""
    generator = torch.Generator().manual_seed(1000 + index)
    ids: list[int] = []
    answer: list[int] = []
    for number, length in enumerate(lengths):
        ids += torch.randint(0, ORDINARY, (length,), generator=generator).tolist()
        answer += [(number + 1) // 2 if number % 2 else 0] * length
        if number % 2:
            ids[-1] = config.stop_token_ids[0]
    pixels = None
    if image:
        ids[2 : 2 + config.image_tokens] = [config.image_token_id] * config.image_tokens
        assert lengths[0] >= 2 + config.image_tokens
        pixels = {"pixel_values": torch.randn(1, 3, standins.IMAGE_SIZE, standins.IMAGE_SIZE, generator=generator)}
    return Sample(ids, answer, pixels, index, int(image))


def tiled_sample(config: DiffVLConfig, lengths: Sequence[int], sizes: Sequence[tuple[int, int]], index: int = 0) -> Sample:
    """The same with images of these heights and widths in the first prompt of a model with tiles."""
    plain, tiles, alone = sample(config, lengths, index), config.tiles, len(sizes) == 1
    assert tiles is not None
    views = [tiles.views(size, alone) for size in sizes]
    shown = sum(tiles.tokens(size, alone) for size in sizes)
    assert lengths[0] >= 2 + shown
    ids = [*plain.ids[:2], *[config.image_token_id] * shown, *plain.ids[2 + shown :]]
    pixels = {
        "pixel_values": torch.randn(len(sizes), max(views), 3, tiles.pixels, tiles.pixels),
        "image_sizes": torch.tensor(sizes),
        "num_tiles": torch.tensor(views),
    }
    return Sample(ids, plain.answer, pixels, index, len(sizes))


def batch(samples: Sequence[Sample]) -> Batch:
    """One sample a row."""
    return collate([[one] for one in samples], pad_token_id=0)  # type: ignore[return-value]


def random_image(seed: int = 0) -> Image.Image:
    """A small image of random colours; different seeds give different images."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
    return Image.fromarray(colours).resize((40, 40), Image.Resampling.NEAREST)


def stage_recipe(data: Path, holdout: int = 0, row_length: int | None = None, **stage: Any) -> Recipe:
    """A recipe with one stage, `diffuse`, in fp32: 4 steps of 2 samples unless `stage` says otherwise. No sample may be longer
    than a row."""
    settings = {
        "objective": {"kind": "block_diffusion", "block_size": 4},
        "trainable": {"trunk": 1e-3, "connector": 1e-3, "mask_row": 1e-3},
        "data": {"train": str(data), "holdout": holdout, "max_length": min(512, row_length or 512), "row_length": row_length},
        "steps": 4,
        "batch_size": 2,
        "precision": "fp32",
        **stage,
    }
    return resolve({"stages": {"diffuse": settings}}, [], "test")


def trained_on(data: StageData) -> SampleDataset:
    """What a stage is trained on, where that is a single set that is not streamed."""
    assert isinstance(data.train, SampleDataset)
    return data.train


def text_only(path: Path, count: int) -> Path:
    """A data file of records without images."""
    turns = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "It."}]
    path.write_text(json.dumps([{"conversations": turns} for _ in range(count)]), encoding="utf-8")
    return path


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without what a clock measured."""
    lines = read_json_lines(directory / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in ("seconds", "tokens_per_second")} for line in lines]


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


# A plain trunk and those that differ where it matters here: windows and soft caps (gemma2), learnt positions and dropout (gpt2).
# The others repeat these, or cost more (experts): their turn is `make test-slow`, and in the gates of one forward.
_DIFFERENT = ("llama", "gemma2", "gpt2")


def trunks(*left_out: str) -> list[Any]:
    """Trunk types as parameters of a test; those that differ from each other by default, all of them among the slow tests."""
    return [
        pytest.param(model_type, marks=() if model_type in _DIFFERENT else pytest.mark.slow)
        for model_type in standins.TRUNKS
        if model_type not in left_out
    ]


def pairwise(*axes: Sequence[Any]) -> list[Any]:
    """All combinations as parameters of a test; by default as few as let every two values meet, the others among the slow
    tests."""
    return _with_slow(itertools.product(*axes), _fewest(*axes))


def crossed(*axes: Sequence[Any], types: Sequence[str] = standins.TRUNKS, default: Sequence[str] = _DIFFERENT) -> list[Any]:
    """Model types with all combinations of the other axes, as `pairwise`; by default of a few types only."""
    return _with_slow(itertools.product(types, *axes), _fewest(default, *axes))


def alternating(default: Sequence[str], values: Sequence[Any], types: Sequence[str] = standins.TRUNKS) -> list[Any]:
    """Model types with each of some values; by default the first of `default` with the first value, the second with the second,
    and so on; the others among the slow tests."""
    pairs = {(model_type, number % len(values)) for number, model_type in enumerate(default)}
    return [
        pytest.param(model_type, value, marks=() if (model_type, number) in pairs else pytest.mark.slow)
        for model_type in types
        for number, value in enumerate(values)
    ]


def _with_slow(every: Iterable[tuple[Any, ...]], chosen: set[tuple[Any, ...]]) -> list[Any]:
    return [pytest.param(*one, marks=() if one in chosen else pytest.mark.slow) for one in every]


def _fewest(*axes: Sequence[Any]) -> set[tuple[Any, ...]]:
    every = list(itertools.product(*axes))
    pairs = {one: set(itertools.combinations(enumerate(one), 2)) for one in every}
    missing, chosen = set().union(*pairs.values()), set()
    while missing:
        best = max(every, key=lambda one: len(pairs[one] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return chosen
