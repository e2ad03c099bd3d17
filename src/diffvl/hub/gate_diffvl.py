"""Adapters that act on noisy tokens only, over weights that never change: the gate of a lossless conversion.

A model with low-rank adapters drafts with them and checks the drafts without them: the same forward, the same weights. So what
the adapters add must reach the noisy tokens (the masks of a draft) and no clean one. The gate knows nothing of peft: it takes any
layer that has `lora_B` submodules, and puts `torch.where(noisy[..., None], output, 0)` behind each of them.

    model.gate                         None, or the AdapterGate of a model with gated adapters (`config.gated_adapter` of its
                                       checkpoint), which is loaded shut
    model(ids, noisy=noisy_BT, ...)    adapters act on the tokens where `noisy` is True, and on no others
    model(ids, ...)                    without `noisy` the gate is shut: this is the parent

    gate = AdapterGate.attach(trunk)   shut at once; what follows is for code that calls the trunk by itself
    gate.open(noisy_BT)                from here on, for forwards of these [batch, tokens]
    gate.shut()                        from here on no adapter is multiplied at all: a plain flag of each layer
    with gate.opened(noisy_BT): ...    both; `opened(None)` is shut inside
    gate.contexts                      `context_fn` of torch's checkpoint: a layer that is computed again in the backward pass
                                       sees the gate of its forward, whatever was set since

    attach_mask_row(model)             the mask token's embedding as a parameter `model.mask_row`, outside the table: it takes the
                                       place of the table's row wherever that token goes in. The table never changes, so a tied
                                       head does not either; the mask token is never predicted (`never_predicted`)
    require_gate(model)                proves on the model itself that "gate shut" is "no adapters", to the bit, and that an open
                                       gate keeps clean tokens as they are; else ValueError. Layers that are not adapted through
                                       `lora_B` (peft's ParamWrapper around fused experts) and layers that see gathered tokens
                                       (experts that are modules) do not pass

Bit for bit is meant at equal shapes: the rounding of a matrix product depends on its size.

Shapes: B batch, T tokens.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from .configuration_diffvl import never_predicted
from .layout_diffvl import clean_layout
from .masks_diffvl import attention_masks

MASK_ROW = "mask_row"  # the parameter's name
PROBED = (2, 4)  # batch and tokens of the forwards of `require_gate`
LEAK = 1e-3  # std of the logits by which clean tokens may move where routing makes batches of other sizes


class AdapterGate:
    """Which tokens of the coming forwards the adapters act on.

    Attributes:
        layers: the layers with adapters, which have a `lora_B` each. noisy: bool [B, T], or None: shut.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.noisy: torch.Tensor | None = None
        self._hooks = [module.register_forward_hook(self._pass) for layer in layers for module in layer.lora_B.values()]
        for layer in layers:
            layer.merge = refuse_merge
        self.shut()

    @classmethod
    def attach(cls, model: nn.Module) -> "AdapterGate":
        """Puts a gate on every adapted layer of a model, in place, and shuts it.

        Raises:
            ValueError: if there are no adapters, or one already has a gate.
        """
        layers: list[Any] = [module for module in model.modules() if isinstance(getattr(module, "lora_B", None), nn.ModuleDict)]
        if not any(len(layer.lora_B) for layer in layers):
            raise ValueError("there are no adapters here to put a gate on: no layer has a lora_B")
        if any(getattr(layer, "merge", None) is refuse_merge for layer in layers):
            raise ValueError("these adapters have a gate already")
        return cls(layers)

    def detach(self) -> None:
        """Takes the gate off: the adapters act on every token again."""
        for hook in self._hooks:
            hook.remove()
        for layer in self.layers:
            del layer.merge
            layer._disable_adapters = False

    def open(self, noisy: torch.Tensor) -> None:
        """Lets adapters act on the tokens where `noisy`, bool [B, T], is True, in forwards of this shape."""
        self._set(noisy)

    def shut(self) -> None:
        """Lets adapters act on no token, and leaves them out of the computation."""
        self._set(None)

    @contextmanager
    def opened(self, noisy: torch.Tensor | None) -> Iterator[None]:
        """In the block the gate is open for these tokens, or shut for None; afterwards it is as it was."""
        before = self.noisy
        self._set(noisy)
        try:
            yield
        finally:
            self._set(before)

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For torch's checkpoint, which asks at every forward: what surrounds it, and what surrounds its repetition."""
        return self.opened(self.noisy), self.opened(self.noisy)

    def _set(self, noisy: torch.Tensor | None) -> None:
        self.noisy = noisy
        for layer in self.layers:  # a plain flag: peft's own switch also freezes every matrix
            layer._disable_adapters = noisy is None

    def _pass(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """What comes through the gate of an adapter's output [B, T, width]; by `where`, as 0 times inf would be no number."""
        if self.noisy is None:  # somebody has switched the layer on from outside
            return torch.zeros_like(output)
        if output.shape[:-1] != self.noisy.shape:
            raise ValueError(
                f"an adapted layer sees {tuple(output.shape[:-1])} tokens, the gate is open for {tuple(self.noisy.shape)}: "
                "adapters on layers that see gathered tokens cannot be gated"
            )
        return torch.where(self.noisy[..., None], output, 0)


def refuse_merge(*_: Any, **__: Any) -> None:
    """Stands in the place of a gated layer's `merge`.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "gated adapters cannot be merged: they act on noisy tokens only, and the same weights serve the clean ones. Keep them "
        "beside the weights, as they are loaded"
    )


# --- the mask row -----------------------------------------------------------------------------------------------------------


class MaskRow:
    """The hook that shows the mask token by `model.mask_row`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        is_mask = (inputs[0] == self.model.config.mask_token_id)[..., None]
        scaled = getattr(self.model, MASK_ROW) * getattr(module, "embed_scale", 1.0)
        return torch.where(is_mask, scaled.to(output.dtype), output)


def attach_mask_row(model: Any) -> None:
    """Makes the embedding of the mask token a parameter of the model, in fp32. Its output row needs none: the mask token is
    never predicted."""
    embedding = model.get_input_embeddings()
    row = embedding.weight.detach()[model.config.mask_token_id].float().clone()
    model.register_parameter(MASK_ROW, nn.Parameter(row))
    model.mask_row_hook = embedding.register_forward_hook(MaskRow(model))


# --- the proof --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def require_gate(model: Any) -> None:
    """Proves the gate on the model itself, with adapters that matter: fresh ones add nothing, whatever lets them through.

    Args:
        model: a DiffVL model with a gate; as it was when this returns.
    Raises:
        ValueError: if a shut gate is not the model without adapters to the bit, if clean tokens feel an open one, or if noisy
            ones do not.
    """
    gate, training = model.gate, model.training
    given = short_text(model)
    noisy = torch.zeros(PROBED, dtype=torch.bool, device=given["input_ids"].device)
    noisy[:, PROBED[1] // 2 :] = True
    model.eval()
    try:
        with _without_adapters(model):
            plain = model(**given).logits
        with _stirred(model):
            shut = model(**given, noisy=torch.zeros_like(noisy)).logits
            skipped = model(**given).logits
            opened = model(**given, noisy=noisy).logits
    finally:
        gate.shut()
        model.train(training)
    if not (torch.equal(shut, plain) and torch.equal(skipped, plain)):
        raise ValueError(
            "adapters act although their gate is shut: some are on layers that cannot be gated, such as fused experts"
        )
    allowed = LEAK * plain.float().std()
    if (opened - plain)[~noisy].abs().max() > allowed:
        raise ValueError("an adapter reaches clean tokens through its gate")
    if torch.equal(opened[noisy], plain[noisy]):
        raise ValueError("the adapters act on no noisy token")


def short_text(model: Any, first: int = 0, last: int = PROBED[1]) -> dict[str, Any]:
    """Some tokens of two short texts, as arguments of a forward after those before them: each sees itself and the tokens before
    it, as what follows a prompt does. (A prompt may see itself both ways.)"""
    table, queries = model.get_input_embeddings().weight, slice(first, last)
    text = (~never_predicted(model.config, len(table), table.device)).nonzero()[:, 0]
    ids = text[: PROBED[0] * PROBED[1]].view(PROBED)
    layout = clean_layout(torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool), context="causal").part(slice(0, last))
    return {
        "input_ids": ids[:, queries],
        "attention_mask": attention_masks(model.config.text_config, layout, queries, table.dtype),
        "position_ids": layout.position[:, queries] + model.config.first_position,
    }


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """In the block no layer with adapters of any kind uses them."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer._disable_adapters = flag


@contextmanager
def _stirred(model: nn.Module) -> Iterator[None]:
    """In the block every adapter's second matrix is random, whatever it has learnt."""
    matrices = [parameter for name, parameter in model.named_parameters() if ".lora_B." in name]
    kept = [parameter.data for parameter in matrices]
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter in matrices:
            random = torch.randn(parameter.shape, generator=generator)
            parameter.data = random.to(parameter.device, parameter.dtype)
        yield
    finally:
        for parameter, data in zip(matrices, kept, strict=True):
            parameter.data = data
