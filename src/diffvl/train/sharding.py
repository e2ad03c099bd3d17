"""A model in parts: torch's own `fully_shard` over the processes of a run.

Place in the flow: `stage.train` shards a model that is fitted to its stage, before the optimiser is made. Each process then holds
a part of every tensor, and a unit's tensors are gathered while it runs.

Units are the layers of the decoder, and those of the vision tower where it trains. Everything else stays in the root, which is
gathered once a forward and stays so until its one reduction: a head that runs several times, as often as this process has masked
rows to fill chunks with, is then no collective, and a tied table gets the gradients of all its uses. A unit of [embedding, head]
would lose the embedding's part of the gradient without an error; `tests/train/test_sharding.py` builds it and catches it.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from diffvl.config.recipe import Stage
from diffvl.hub.images_diffvl import stock
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.train.parts import image_encoder, parts_of, upcast


def shard(model: DiffVLForConditionalGeneration, stage: Stage, everything: bool) -> None:
    """Shards a model over all processes, in place: each unit is upcast and cut before the next one is touched, so that no process
    ever holds a whole model in fp32.

    Args:
        everything: whether frozen tensors are upcast too.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if stage.sharding == "full_bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*units(model), model):
        upcast(module, everything)
        fully_shard(module, mesh=mesh, mp_policy=policy)
    # A parameter that only some processes use in a step, an expert say: without a zero from the others its gradient would be
    # added to that of another one.
    sharded: Any = model
    sharded.set_reduce_scatter_unused_params(True)


def is_sharded(model: nn.Module) -> bool:
    """Tells whether a model lies in parts over the processes."""
    return isinstance(model, FSDPModule)


def units(model: DiffVLForConditionalGeneration) -> list[nn.Module]:
    """Lists the modules that are gathered one at a time. A tower that is shown videos too runs as often as a batch has kinds of
    them, which differs by process: it stays in the root."""
    tower = _tower(model)
    cuts_tower = _trains(tower.parameters()) and model.config.video_token_id is None
    return [*decoder_layers(model), *(_layers(tower) if cuts_tower else ())]


def layers(model: DiffVLForConditionalGeneration) -> list[nn.Module]:
    """Lists the layers of decoder and vision tower."""
    return [*decoder_layers(model), *_layers(_tower(model))]


def decoder_layers(model: DiffVLForConditionalGeneration) -> list[nn.Module]:
    """Lists the layers of the text part."""
    return list(_layers(stock(model.trunk).get_decoder()))


def learns_to_see(model: DiffVLForConditionalGeneration) -> bool:
    """Tells whether tower or connector train. All processes must then show images to the model in the same micro-steps: one that
    shows none would gather neither the tower's layers nor, where nothing else trains, the decoder's in the backward pass."""
    named, parts = dict(model.named_parameters()), parts_of(model)
    return _trains(named[name] for name, part in parts.items() if part in ("tower", "connector"))


def _trains(parameters: Iterable[nn.Parameter]) -> bool:
    return any(parameter.requires_grad for parameter in parameters)


def _tower(model: DiffVLForConditionalGeneration) -> nn.Module:
    return image_encoder(stock(model.source)) if model.is_native else model.vision_tower


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The items of the list of modules that holds most of a model's parameters."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    sizes = {found: sum(parameter.numel() for parameter in found.parameters()) for found in lists}
    return iter(max(lists, key=sizes.__getitem__)) if lists else iter(())
