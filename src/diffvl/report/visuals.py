"""Images and videos of records, inside a page."""

import base64
import io
from pathlib import Path

from PIL import Image

from diffvl.data.images import open_image
from diffvl.data.references import shown
from diffvl.data.videos import Video, open_video
from diffvl.errors import DataError
from diffvl.hub.clips_diffvl import Sampler
from diffvl.report.chart import escape

IMAGE_SIDE = 224  # pixels


def draw_visual(image: str | None, video: str | list[str] | tuple[str, ...] | None) -> str:
    """Gives what a record shows first: an image, or the frame in the middle of a video; nothing where it shows none."""
    return _image(image) if image else _frame(video) if video else ""


def _image(name: str) -> str:
    """Inlines the image as the model saw it, at most `IMAGE_SIDE` pixels a side. The page says so where the file is gone or
    no image."""
    try:
        flat = open_image(name, "report")
    except DataError as error:
        return f"<p>image not shown ({error.kind}): {escape(shown(name))}</p>"
    return _inlined(flat, Path(shown(name)))


def _frame(video: str | list[str] | tuple[str, ...]) -> str:
    """Inlines the frame in the middle of a video."""
    middle = Sampler(lambda facts: [facts.total_num_frames // 2], 1.0, 1)
    clip_name: Video = video if isinstance(video, str) else tuple(video)
    name = Path(shown(video if isinstance(video, str) else video[0]))
    try:
        clip = open_video(clip_name, "report", middle)
    except DataError as error:
        return f"<p>video not shown ({error.kind}): {escape(str(name))}</p>"
    return _inlined(Image.fromarray(clip.frames[0].permute(1, 2, 0).numpy()), name)


def _inlined(flat: Image.Image, path: Path) -> str:
    flat.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    flat.save(buffer := io.BytesIO(), format="JPEG", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    size, alt = f'width="{flat.width}" height="{flat.height}"', escape(path.name)
    return f'<img {size} alt="{alt}" src="data:image/jpeg;base64,{data}">'
