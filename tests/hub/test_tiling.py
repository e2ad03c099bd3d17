"""Tiles against transformers' own LLaVA-OneVision: which grid, what is cut off, how many tokens, and the rows themselves."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import random_image
from shared_fixtures import TILED
from transformers import LlavaOnevisionProcessor
from transformers.models.llava_onevision import modeling_llava_onevision as theirs

from diffvl.config.tiling import AnyresTiling
from diffvl.hub import tiling_diffvl
from diffvl.hub.processing_diffvl import pixels_in
from diffvl.hub.source_diffvl import build_processor
from diffvl.hub.tiling_diffvl import Tiling, tiled_rows, views_of

SIDE, PIXELS = 27, 384  # the published towers'
WIDTH = 2  # of features: every row is compared


def sizes(count: int) -> list[tuple[int, int]]:
    """Heights and widths up to 4,000, as many small ones as large ones, and of every aspect; the last are hardly images."""
    draw = random.Random(0)
    return [tuple(int(4000 ** draw.uniform(0.0 if number > 180 else 0.6, 1)) for _ in "hw") for number in range(count)]  # type: ignore[misc]


def published(max_tiles: int, side: int = SIDE, pixels: int = PIXELS) -> Tiling:
    return Tiling.of(AnyresTiling(max_tiles=max_tiles).settings, side, pixels)


def pinpoints(tiling: Tiling) -> list[list[int]]:
    return [[rows * tiling.pixels, columns * tiling.pixels] for rows, columns in tiling.grids]


def packed_by_transformers(tiling: Tiling, views: torch.Tensor, size: tuple[int, int], newline: torch.Tensor) -> torch.Tensor:
    vision = SimpleNamespace(image_size=tiling.pixels, patch_size=tiling.pixels // tiling.side)
    model: Any = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints(tiling)))
    ratio = f"anyres_max_{tiling.max_tiles}"
    pack: Any = theirs.LlavaOnevisionModel.pack_image_features
    rows, _ = pack(model, [views], torch.tensor([size]), image_newline=newline, vision_aspect_ratio=ratio)
    return rows[0]


def counted_by_transformers(tiling: Tiling, size: tuple[int, int]) -> int:
    images = SimpleNamespace(image_grid_pinpoints=pinpoints(tiling))
    settings = {"num_image_tokens": tiling.side**2, "vision_aspect_ratio": f"anyres_max_{tiling.max_tiles}"}
    processor: Any = SimpleNamespace(image_processor=images, **settings)
    count = LlavaOnevisionProcessor._get_unpadded_features
    processor._get_unpadded_features = lambda *given: count(processor, *given)
    return LlavaOnevisionProcessor._get_number_of_features(processor, *size, tiling.pixels, tiling.pixels)


def test_200_sizes_are_cut_as_transformers_cuts_them():
    """Both maxima of the papers; every row of every size, base view, newlines and reduced grids included."""
    generator = torch.Generator().manual_seed(0)
    newline, reduced, cut = torch.randn(WIDTH, generator=generator), 0, 0
    features = torch.randn(37, SIDE**2, WIDTH, generator=generator)
    for number, size in enumerate(sizes(200)):
        tiling = published((4, 9)[number % 2])
        canvas = theirs.get_anyres_image_grid_shape(size, pinpoints(tiling), PIXELS)
        assert tiling.grid(size) == canvas
        assert tiling.views(size) == theirs.image_size_to_num_patches(size, pinpoints(tiling), PIXELS)
        grid = torch.zeros(1, canvas[0] * SIDE, canvas[1] * SIDE)
        left = theirs.unpad_image(grid, size)
        top, side = tiling.margins(size)
        assert left.shape[1:] == (grid.shape[1] - 2 * top, grid.shape[2] - 2 * side)
        assert tiling.tokens(size) == counted_by_transformers(tiling, size)
        views = features[: tiling.views(size)]
        rows = tiling.packed(views, size, newline)
        assert len(rows) == tiling.tokens(size)
        assert torch.equal(rows, packed_by_transformers(tiling, views, size, newline)), size
        assert torch.equal(rows[: SIDE**2], views[0])
        reduced += tiling.shape(size) != left.shape[1:]
        cut += bool(top or side)
    assert reduced > 50 and cut > 100, "sizes that need no work prove little"


def test_an_image_among_others_is_one_view():
    tiling, newline = published(9), torch.ones(WIDTH)
    views = torch.randn(1, SIDE**2, WIDTH)
    rows = tiling.packed(views, (600, 800), newline)
    assert torch.equal(rows, packed_by_transformers(tiling, views, (600, 800), newline))
    assert len(rows) == tiling.tokens((600, 800), alone=False) == SIDE**2 + 1 and tiling.views((600, 800), alone=False) == 1


def test_a_strip_is_never_reduced_to_nothing():
    """A strip of one row of tokens, on a small tower with a small maximum; transformers would ask for no row at all."""
    tiling = Tiling(side=5, pixels=40, grids=((1, 8),), max_tiles=1)
    assert tiling.shape((2, 3000)) == (1, 31)
    rows = tiling.packed(torch.randn(9, 25, WIDTH), (2, 3000), torch.zeros(WIDTH))
    assert len(rows) == tiling.tokens((2, 3000)) == 25 + 32


@pytest.mark.parametrize("size", [(40, 90), (64, 33), (20, 20), (31, 300), (500, 480)])
def test_the_text_is_what_transformers_own_processor_writes(size: tuple[int, int], loaded: Any):
    model, processor = loaded(TILED)
    tiling = processor.tiles
    assert tiling == model.config.tiles
    settings = {"num_image_tokens": tiling.side**2, "vision_feature_select_strategy": "full"}
    settings["vision_aspect_ratio"] = f"anyres_max_{tiling.max_tiles}"
    own = build_processor("LlavaOnevisionProcessor", settings, processor.image_processor, processor.tokenizer)
    image = random_image(3).resize((size[1], size[0]))
    text = f"See {processor.image_token} here"
    expected = own(text=[text], images=[image], add_special_tokens=False, return_tensors="pt")
    found = processor(text=[text], images=[image], return_tensors="pt")
    for name in ("input_ids", "pixel_values", "image_sizes"):
        assert torch.equal(found[name], expected[name]), name
    rows = model.images.encode(pixels_in(found))
    assert rows.counts == (int((found["input_ids"] == processor.image_token_id).sum()),)


def test_the_tower_sees_every_view_once_and_a_bounded_number_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """Of pixels that are filled up for a batch only the real views; in parts, the rows are the same."""
    tiling = Tiling(side=2, pixels=4, grids=((1, 1), (1, 2), (2, 2)), max_tiles=4)
    shapes = [((4, 8), 3), ((8, 8), 5), ((5, 5), 1), ((3, 3), 2)]
    pixels = {
        "pixel_values": torch.randn(4, 5, 3, 4, 4),
        "image_sizes": torch.tensor([size for size, _ in shapes]),
        "num_tiles": torch.tensor([count for _, count in shapes]),
    }
    seen: list[torch.Tensor] = []

    def look(views: torch.Tensor) -> torch.Tensor:
        seen.append(views)
        return views.flatten(2).mT[:, :4]

    rows, counts = tiled_rows(tiling, pixels, torch.zeros(3), look)
    (views,) = seen
    expected = [pixels["pixel_values"][number, :count] for number, (_, count) in enumerate(shapes)]
    assert torch.equal(views, torch.cat(expected))
    assert counts == (*(tiling.tokens(size) for size, _ in shapes[:2]), 5, tiling.tokens((3, 3)))
    monkeypatch.setattr(tiling_diffvl, "MOST_VIEWS", 4)
    seen.clear()
    assert torch.equal(tiled_rows(tiling, pixels, torch.zeros(3), look)[0], rows)
    assert [len(views) for views in seen] == [4, 4, 3]


WRONG = [
    ({"pixel_values": torch.zeros(1, 3, 4, 4)}, "shape .1, 3, 4, 4., expected .images, views, 3, height, width."),
    ({"num_tiles": torch.tensor([2])}, "2 views of an image of 4 x 8 pixels, expected 3, or 1 for an image of several"),
    ({"pixel_values": torch.zeros(1, 2, 3, 4, 4)}, "2 views of an image of 4 x 8 pixels, expected 3"),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_pixels_that_do_not_fit_together(change: dict[str, torch.Tensor], words: str):
    tiling = Tiling(side=2, pixels=4, grids=((1, 1), (1, 2)), max_tiles=4)
    pixels = {"pixel_values": torch.zeros(1, 3, 3, 4, 4), "image_sizes": torch.tensor([[4, 8]])}
    assert views_of(tiling, pixels)[2] == [3], "a caller may leave num_tiles out"
    with pytest.raises(ValueError, match=words):
        views_of(tiling, {**pixels, **change})
