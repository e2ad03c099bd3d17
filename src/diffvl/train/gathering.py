"""A trained model in parts -> the weight files of a checkpoint: tensor by tensor, so that no process ever holds it whole.

Place in the flow: `stage.train` calls it where a whole model is unfitted and saved. What it writes is the same: adapters merged
by peft's own code, the mask row folded in, the checkpoint's dtype, tied tables once, names as `save_pretrained` gives them. All
processes walk the model in the same order, because each tensor is gathered by all of them; only the main process keeps it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from diffvl.config.recipe import Stage
from diffvl.errors import DiskError
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.store.tensorwriter import TensorWriter
from diffvl.train.launch import main_only, process_state
from diffvl.train.parts import MASK_ROW
from diffvl.train.sharding import layers

Tensors = dict[str, torch.Tensor]


def write_gathered(model: DiffVLForConditionalGeneration, stage: Stage, dtype: torch.dtype, directory: Path) -> None:
    """Writes the weights as they are without sharding after `stage.unfit`. All processes call it; the model is of no further use.

    Raises:
        DiskError: in all processes, when all of them have gone through the model.
    """
    model.config.dtype = dtype
    writer, keeps = TensorWriter(directory), process_state().is_main_process
    faults: list[DiskError] = []
    for tensors in _merged_tensors(model, "mask_row" in stage.trainable, keeps):
        try:
            for name, tensor in _as_saved(model, tensors, dtype).items() if keeps and not faults else ():
                writer.add(name, tensor)
        except DiskError as error:  # told at the end: the others wait for this process at the next tensor
            faults.append(error)
    main_only(lambda: _finish(writer, faults))


def _finish(writer: TensorWriter, faults: list[DiskError]) -> None:
    if faults:
        raise faults[0]
    writer.finish()


def _merged_tensors(model: DiffVLForConditionalGeneration, has_row: bool, keeps: bool) -> Iterator[Tensors]:
    """Gives the tensors of one module after the other by their names without adapters; without content where they are not kept.
    Where transformers saves several tensors of a layer as one, or one as several: of one layer after the other."""
    row = _whole(getattr(model, MASK_ROW), keeps) if has_row else None
    if has_row:
        delattr(model, MASK_ROW)
    joint = set(layers(model)) if _converts(model) else set()
    if isinstance(model.trunk, PeftModel):
        model.put_trunk(model.trunk.get_base_model())
    table, seen, tied = model.get_input_embeddings(), set[int](), set(_tied_names(model))
    gathered: Tensors = {}
    layer = ""
    for path, module in _outermost(model):
        if not _is_inside(path, layer):
            if gathered:
                yield gathered
            gathered, layer = {}, path if module in joint else ""
        own = _merged(module, keeps) if isinstance(module, BaseTunerLayer) else _gathered(module, seen, tied, path, keeps)
        if module is table and row is not None and keeps:
            own["weight"][model.config.mask_token_id] = row.to(own["weight"].dtype)
        gathered |= {f"{path}.{name}" if path else name: tensor for name, tensor in own.items()}
    yield gathered


def _is_inside(path: str, layer: str) -> bool:
    return bool(layer) and path.startswith(f"{layer}.")


def _outermost(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Walks modules from the outside inwards; an adapted layer is one module."""
    yield path, module
    if not isinstance(module, BaseTunerLayer):
        for name, child in module.named_children():
            yield from _outermost(child, f"{path}.{name}" if path else name)


def _converts(model: Any) -> bool:
    """Tells whether tensors are joined or split when the model is saved."""
    return any(isinstance(entry, WeightConverter) for entry in getattr(model, "_weight_conversions", None) or ())


def _tied_names(model: Any) -> Iterator[str]:
    """Names of parameters that are others' twins, by which they are saved."""
    for name, other in model.all_tied_weights_keys.items():
        if model.get_parameter(name) is model.get_parameter(other):
            yield name


def _gathered(module: nn.Module, seen: set[int], tied: set[str], path: str, keeps: bool) -> Tensors:
    """Gathers what a checkpoint holds of a module itself, each parameter once."""
    persistent = (pair for pair in module._buffers.items() if pair[0] not in module._non_persistent_buffers_set)
    own: Tensors = {}
    for name, tensor in (*module._parameters.items(), *persistent):
        if tensor is None or id(tensor) in seen or f"{path}.{name}" in tied:
            continue
        seen.add(id(tensor))
        own[name] = _whole(tensor, keeps)
    return own


def _merged(layer: Any, keeps: bool) -> Tensors:
    """Gathers an adapted layer and merges it; what a checkpoint holds of the plain layer."""
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_whole(parameter, keeps), requires_grad=False)
    if keeps:
        layer.merge()
    plain = layer.get_base_layer()
    merged = {name: tensor.detach() for name, tensor in plain.state_dict().items()}
    for module in layer.modules():
        module._parameters.clear()
    return merged


def _whole(tensor: torch.Tensor, keeps: bool) -> torch.Tensor:
    """The whole tensor on the CPU; one without content where it is not kept. All processes call it."""
    tensor = tensor.detach()
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.cpu() if keeps else whole.to("meta")


def _as_saved(model: Any, tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """The tensors in a dtype, by the names and in the form in which `save_pretrained` writes them."""
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    ignored = model._keys_to_ignore_on_save or ()
    return revert_weight_conversion(model, {name: tensor for name, tensor in cast.items() if name not in ignored})
