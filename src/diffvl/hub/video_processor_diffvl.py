"""The video processors of transformers, without torchvision: the same classes, with Pillow to resize their frames.

transformers has its video processors for torchvision only. Most of what they do is arithmetic on tensors; what they take from
torchvision are a few functions, which stand here. So a video becomes the same pixels wherever a checkpoint is, as its images do.

Frames on the meta device are measured only: they have sizes, and nothing is resized.
"""

import ast
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
import transformers.models
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend
from transformers.video_processing_utils import BaseVideoProcessor

Resampling = Image.Resampling  # whose values transformers uses in its settings

_ENDING = "VideoProcessor"
_IMPORTING = threading.RLock()
_CLASSES: dict[str, type] = {}


class NoVideoProcessorError(ValueError):
    """There is no video processor of a name that works without torchvision."""


def build_video_processor(class_name: str, settings: dict[str, Any]) -> Any:
    """A video processor of this class of transformers, which resizes with Pillow.

    Raises:
        NoVideoProcessorError: if there is none, or it takes more from torchvision than stands here.
        TypeError, ValueError: by the class itself, for settings that it does not take.
    """
    if class_name not in _CLASSES:
        with _IMPORTING:
            _CLASSES[class_name] = type(class_name, (_stock_class(class_name), _Frames), {})
    return _CLASSES[class_name].from_dict(settings)  # type: ignore[attr-defined]


# --- what torchvision does ---------------------------------------------------------------------------------------------------


def resize(
    image: torch.Tensor,
    size: Sequence[int],
    interpolation: Resampling = Resampling.BILINEAR,
    max_size: None = None,
    antialias: bool = True,
) -> torch.Tensor:
    """Frames [..., C, H, W] in another size (height, width), each by itself; Pillow always smooths what it makes smaller."""
    height, width = size
    if not antialias and (height < image.shape[-2] or width < image.shape[-1]):
        raise ValueError("it makes frames smaller without smoothing, which Pillow does not")
    if image.device.type == "meta":
        return image.new_empty(*image.shape[:-2], height, width)
    planes = image.reshape(-1, *image.shape[-2:])
    resized = [_resized(plane, (width, height), interpolation) for plane in planes]
    return torch.stack(resized).reshape(*image.shape[:-2], height, width).to(image.dtype)


def _resized(plane: torch.Tensor, size: tuple[int, int], interpolation: Resampling) -> torch.Tensor:
    whole = plane.dtype == torch.uint8
    values = (plane if whole else plane.float()).contiguous()
    height, width = values.shape
    image = Image.frombuffer("L" if whole else "F", (width, height), values.numpy().tobytes(), "raw")
    pixels = bytearray(image.resize(size, interpolation).tobytes())
    return torch.frombuffer(pixels, dtype=values.dtype).view(size[::-1])


def pad(image: torch.Tensor, padding: Sequence[int], fill: float = 0, padding_mode: str = "constant") -> torch.Tensor:
    """Frames with pixels of one value around them; `padding`: left, top, right, bottom, or two figures for both sides."""
    left, top, right, bottom = padding if len(padding) == 4 else (*padding, *padding)
    return torch.nn.functional.pad(image, (left, right, top, bottom), mode=padding_mode, value=fill or 0)


def normalize(image: torch.Tensor, mean: Any, std: Any, inplace: bool = False) -> torch.Tensor:
    """(image - mean) / std, channel by channel."""
    mean, std = (torch.as_tensor(value, dtype=image.dtype, device=image.device)[:, None, None] for value in (mean, std))
    return (image - mean) / std


def grayscale_to_rgb(image: torch.Tensor) -> torch.Tensor:
    return image.expand(*image.shape[:-3], 3, *image.shape[-2:]) if image.shape[-3] == 1 else image


def crop(image: torch.Tensor, top: int, left: int, height: int, width: int) -> torch.Tensor:
    return image[..., top : top + height, left : left + width]


def _functional() -> ModuleType:
    made = ModuleType("torchvision.transforms.v2.functional")
    for function in (resize, pad, normalize, grayscale_to_rgb, crop):
        setattr(made, function.__name__, function)
    made.InterpolationMode = Resampling  # type: ignore[attr-defined]
    return made


_FUNCTIONAL = _functional()


# --- the classes of transformers ---------------------------------------------------------------------------------------------


def _on_pillow(stock: type) -> dict[str, Any]:
    """The methods of a base class that call torchvision, calling what stands here."""
    names = {
        "tvF": _FUNCTIONAL,
        "pil_torch_interpolation_mapping": {mode: mode for mode in Resampling},
        "is_torchvision_greater_or_equal": lambda version: True,  # asked before it resizes with Lanczos, as Pillow can
        "logger": SimpleNamespace(warning_once=lambda *_: None),  # warns of Lanczos where frames are only measured
    }
    found = {}
    for name, method in vars(stock).items():
        if isinstance(method, FunctionType) and names.keys() & set(method.__code__.co_names):
            known = {**method.__globals__, **names}
            found[name] = FunctionType(method.__code__, known, name, method.__defaults__, method.__closure__)
            found[name].__kwdefaults__ = method.__kwdefaults__
    return found


# Stands behind a family's own class in the order of methods, and before the bases of transformers.
_Frames = type("_Frames", (BaseVideoProcessor,), {**_on_pillow(TorchvisionBackend), **_on_pillow(BaseVideoProcessor)})


class _WithoutTorchvision(ast.NodeTransformer):
    """Takes the imports of torchvision out of a module. names: what they would have bound, from what stands here."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"tvF": _FUNCTIONAL}

    def visit_Import(self, node: ast.Import) -> ast.stmt:
        found = [alias for alias in node.names if alias.name.partition(".")[0] == "torchvision"]
        for alias in found:
            if alias.asname is None or not alias.name.endswith(".functional"):
                raise NoVideoProcessorError(f"it imports {alias.name}")
            self.names[alias.asname] = _FUNCTIONAL
        return ast.copy_location(ast.Pass(), node) if found else node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:
        if node.module is None or node.module.partition(".")[0] != "torchvision":
            return node
        for alias in node.names:
            if alias.name != "functional" and not hasattr(_FUNCTIONAL, alias.name):
                raise NoVideoProcessorError(f"it takes {alias.name} from torchvision")
            self.names[alias.asname or alias.name] = getattr(_FUNCTIONAL, alias.name, _FUNCTIONAL)
        return ast.copy_location(ast.Pass(), node)


def _stock_class(class_name: str) -> type:
    """The class of transformers, from a module of its own that imports what stands here in the place of torchvision."""
    models = Path(next(iter(transformers.models.__path__)))
    wanted = re.sub(f"{_ENDING}$", "", class_name).lower().replace("_", "")
    folder = next((one.name for one in models.iterdir() if one.name.replace("_", "") == wanted), None)
    file = models / str(folder) / f"video_processing_{folder}.py"
    if folder is None or not class_name.endswith(_ENDING) or not file.is_file():
        raise NoVideoProcessorError(f"transformers has no {class_name} here")
    imports = _WithoutTorchvision()
    try:
        code = compile(imports.visit(ast.parse(file.read_text(encoding="utf-8"))), str(file), "exec")
    except NoVideoProcessorError as error:
        raise NoVideoProcessorError(f"{class_name} needs torchvision: {error}") from error
    module = ModuleType(f"transformers.models.{folder}.video_processing_pil_{folder}")
    vars(module).update(imports.names, __package__=f"transformers.models.{folder}", __file__=str(file))
    sys.modules[module.__name__] = module  # where transformers looks for the source of a class
    try:
        exec(code, vars(module))
    except ImportError as error:  # by another module, from which it takes something
        del sys.modules[module.__name__]
        raise NoVideoProcessorError(f"{class_name} needs torchvision ({error})") from error
    return vars(module)[class_name]
