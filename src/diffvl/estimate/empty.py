"""A model without memory: shapes, dtypes and a graph, and no numbers (torch's `FakeTensorMode`).

Such a model takes a real training step, by the code that trains (`objective.losses`), in the time of its Python alone, whatever
its size. Token ids, layouts and positions are real small tensors, so that whatever depends on them is what it is in training.

What cannot run without numbers has a stand-in: the attention kernels, of which only what they hold is imitated.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from diffvl.attention.block_mask import FLEX
from diffvl.attention.cpu import TILED
from diffvl.config.recipe import Stage
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.train.stage import fit_to_stage, keeps_dtype


def empty_model(
    config: DiffVLConfig, stage: Stage, seed: int, own_dtype: torch.dtype, device: torch.device
) -> DiffVLForConditionalGeneration:
    """Makes a model that is fitted to its stage and has no numbers, in the dtypes that training gives it.

    Args:
        own_dtype: of the checkpoint that the stage starts from. device: the one that would train, by which attention is chosen.
    Raises:
        ConfigError: as training would, for what the stage asks of the model.
    """
    with torch.device("meta"):
        model = DiffVLForConditionalGeneration(config)
        if stage.tiling is not None:
            model.set_tiling(stage.tiling.settings)
        fit_to_stage(model, stage, seed, device)
    frozen = own_dtype if keeps_dtype(stage, own_dtype) else torch.float32
    without_numbers(model, frozen, torch.bfloat16 if stage.sharding == "full_bf16" else torch.float32)
    return model.train()


def without_numbers(model: nn.Module, frozen: torch.dtype, trained: torch.dtype) -> None:
    """Puts fake tensors in the place of all parameters and buffers, in place. What is shared stays shared."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # with the old one, whose id must not be given away

    def fake(old: torch.Tensor) -> torch.Tensor:
        if id(old) not in made:
            is_weight = isinstance(old, nn.Parameter)
            dtype = (trained if old.requires_grad else frozen) if is_weight and old.is_floating_point() else old.dtype
            with mode:
                new = torch.empty(old.shape, dtype=dtype, device="cpu")
            made[id(old)] = (nn.Parameter(new, old.requires_grad) if is_weight else new, old)
        return made[id(old)][0]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]


def fake_inputs(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """Gives a batch of which the pixels have no numbers; all that says where something stands is real."""
    mode = next(model.parameters()).fake_mode  # type: ignore[union-attr]

    def fake(value: torch.Tensor) -> torch.Tensor:
        return mode.from_tensor(value) if value.is_floating_point() else value

    pixels = {name: fake(value) for name, value in batch.get("pixels", {}).items()}
    return {**batch, "pixels": pixels} if pixels else batch


# --- attention -------------------------------------------------------------------------------------------------------------


class _Held(torch.autograd.Function):
    """What an attention kernel without a table of scores holds: q, k, v, its output and the log-sum-exps; backward three
    gradients."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(q[..., :1]).expand(*q.shape[:-1], v.shape[-1]).contiguous()
        ctx.save_for_backward(q, k, v, output, q[..., 0].float())
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _stand_in(repeats_keys: bool) -> Any:
    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        repeats = query.shape[1] // key.shape[1] if repeats_keys else 1
        states = [query, repeat_kv(key, repeats), repeat_kv(value, repeats)]
        if torch.is_autocast_enabled("cpu"):
            states = [state.to(torch.get_autocast_dtype("cpu")) for state in states]
        output = _Held.apply(*states)
        assert isinstance(output, torch.Tensor)
        return output.transpose(1, 2).contiguous(), None

    return attend


@contextmanager
def stand_in_attention() -> Iterator[None]:
    """In the block, our two training kernels and torch's own one only hold what they hold."""
    before = {name: ALL_ATTENTION_FUNCTIONS[name] for name in (TILED, FLEX, "sdpa")}
    for name in before:
        # FlexAttention and the fused kernels of a GPU read grouped keys as they are.
        AttentionInterface.register(name, _stand_in(repeats_keys=name == TILED))
    try:
        yield
    finally:
        for name, function in before.items():
            AttentionInterface.register(name, function)
