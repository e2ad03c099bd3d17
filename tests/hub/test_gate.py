"""Adapters act on noisy tokens only: to the bit, through checkpointing, or the model is refused."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import ORDINARY, trunks
from lossless import Prepared, draft_stage, fitted, stir
from peft import LoraConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffvl.config.recipe import Lora
from diffvl.errors import ConfigError, UnsupportedModelError
from diffvl.hub.gate_diffvl import AdapterGate, attach_mask_row, require_gate
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.store.checkpoint import load_checkpoint
from diffvl.train.gated import add_gated_adapters
from diffvl.train.parts import fold_mask_row, merge_adapters

LORA = Lora(rank=4, alpha=4)


def gated(prepared: Prepared, model_type: str) -> Any:
    model: Any = load_checkpoint(prepared(model_type))[0].eval()
    add_gated_adapters(model, LORA, "all-linear")
    attach_mask_row(model)
    stir(model)
    return model


def parent_of(prepared: Prepared, model_type: str) -> Any:
    return load_checkpoint(prepared(model_type))[0].eval()


def tokens(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Two texts with three masks behind each, and where these are."""
    ids = torch.randint(0, ORDINARY, (2, 12), generator=torch.Generator().manual_seed(0))
    noisy = torch.zeros_like(ids, dtype=torch.bool)
    noisy[:, -3:] = True
    return ids.masked_fill(noisy, model.config.mask_token_id), noisy


@pytest.mark.parametrize("model_type", trunks())
@torch.no_grad()
def test_clean_tokens_are_the_parents_to_the_bit(model_type: str, prepared: Prepared):
    """At equal shapes; experts see batches of other sizes when noisy tokens are routed elsewhere, and round otherwise."""
    model, parent = gated(prepared, model_type), parent_of(prepared, model_type)
    ids, noisy = tokens(model)
    expected, given = parent(ids).logits, model(ids, noisy=noisy).logits
    if model_type == "qwen3_moe":
        torch.testing.assert_close(given[~noisy], expected[~noisy], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(given[~noisy], expected[~noisy])
    assert (given[noisy] - expected[noisy]).abs().max() > 0.1
    text = ids[:, :9]
    assert torch.equal(model(text).logits, parent(text).logits)
    assert torch.equal(model(text, noisy=torch.zeros_like(text, dtype=torch.bool)).logits, parent(text).logits)


@torch.no_grad()
def test_one_clean_token_that_adapters_reach_is_noticed(prepared: Prepared, monkeypatch: pytest.MonkeyPatch):
    model, parent = gated(prepared, "llama"), parent_of(prepared, "llama")
    require_gate(model)
    ids, noisy = tokens(model)
    whole = AdapterGate._set

    def leaking(self: AdapterGate, given: torch.Tensor | None) -> None:
        if given is not None:
            given = given.clone()
            given[0, 1] = True
        whole(self, given)

    monkeypatch.setattr(AdapterGate, "_set", leaking)
    logits = model(ids, noisy=noisy).logits
    assert not torch.equal(logits[~noisy], parent(ids).logits[~noisy])
    with pytest.raises(ValueError, match="adapters act although their gate is shut"):
        require_gate(model)


@torch.no_grad()
def test_a_gate_in_another_order_of_tokens_is_noticed(prepared: Prepared):
    """A layer whose tokens stand elsewhere than the gate thinks: nothing shows while the gate is shut everywhere."""
    model = gated(prepared, "llama")
    layer = model.gate.layers[0].lora_B["default"]
    layer._forward_hooks.clear()
    layer.register_forward_hook(lambda _, __, out: torch.where(model.gate.noisy.flip(1)[..., None], out, 0))
    with pytest.raises(ValueError, match="reaches clean tokens"):
        require_gate(model)


def test_fused_experts_under_peft_are_refused(prepared: Prepared):
    """peft adapts them by adding to the weights: no gate stands there, and nothing tells."""
    model = load_checkpoint(prepared("qwen3_moe"))[0].eval()
    experts = [name for name, parameter in model.trunk.named_parameters() if parameter.dim() == 3]
    model.trunk.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts))
    model.gate = AdapterGate.attach(model.trunk)
    with pytest.raises(ValueError, match="layers that cannot be gated, such as fused experts"):
        require_gate(model)


def test_experts_are_left_out_and_named(prepared: Prepared, caplog: pytest.LogCaptureFixture):
    model = gated(prepared, "qwen3_moe")
    assert "no gated adapters on layers.*.mlp.experts.down_proj" in caplog.text
    adapted = {name.rsplit(".", 1)[-1] for name, module in model.trunk.named_modules() if hasattr(module, "lora_B")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_layer_that_sees_gathered_tokens_gets_no_adapters(prepared: Prepared, caplog: pytest.LogCaptureFixture):
    """As an expert that is a module of its own does."""
    model = parent_of(prepared, "llama")
    for layer in model.trunk.model.layers:
        whole = layer.mlp.forward
        layer.mlp.forward = lambda states, whole=whole: whole(states.flatten(0, 1)).view_as(states)
    add_gated_adapters(model, LORA, "all-linear")
    adapted = {name.rsplit(".", 1)[-1] for name, module in model.trunk.named_modules() if hasattr(module, "lora_B")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "layers.*.mlp.up_proj" in caplog.text
    with pytest.raises(ConfigError, match="names no linear layer that a gate can be put on"):
        add_gated_adapters(load_checkpoint(prepared("llama"))[0], Lora(targets="nothing"), "all-linear")


def test_another_shape_than_the_gates_is_refused(prepared: Prepared):
    model = gated(prepared, "llama")
    ids, noisy = tokens(model)
    with pytest.raises(ValueError, match=r"sees \(2, 12\) tokens, the gate is open for \(2, 11\)"):
        model(ids, noisy=noisy[:, 1:])
    assert model.gate is not None
    assert model.gate.noisy is None


def test_noisy_without_adapters_is_refused(prepared: Prepared):
    model = load_checkpoint(prepared("llama"))[0]
    ids, noisy = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="no gated adapters"):
        model(ids, noisy=noisy)
    with pytest.raises(ValueError, match="no adapters here"):
        AdapterGate.attach(model)


@torch.no_grad()
def test_merging_and_folding_are_refused(prepared: Prepared):
    model = gated(prepared, "llama")
    table = model.get_input_embeddings().weight.clone()
    with pytest.raises(UnsupportedModelError, match="cannot be merged"):
        merge_adapters(model)
    with pytest.raises(UnsupportedModelError, match="cannot be folded"):
        fold_mask_row(model)
    with pytest.raises(ValueError, match="gated adapters cannot be merged"):  # peft's own
        model.gate.layers[0].merge()
    assert torch.equal(model.get_input_embeddings().weight, table)
    assert torch.equal(model.get_output_embeddings().weight, table)  # tied: its rows would be another head's


@torch.no_grad()
def test_the_mask_row_shows_where_the_token_stands_and_nowhere_else(prepared: Prepared):
    model, parent = gated(prepared, "llama"), parent_of(prepared, "llama")
    ids, noisy = tokens(model)
    table = model.get_input_embeddings()
    rows = table(ids)
    assert torch.equal(rows[~noisy], parent.get_input_embeddings()(ids)[~noisy])
    assert torch.equal(rows[noisy], model.get_parameter("mask_row").expand(6, -1))
    assert torch.equal(table.weight, parent.get_input_embeddings().weight)


@torch.no_grad()
def test_a_copied_model_has_a_gate_of_its_own(prepared: Prepared):
    model = gated(prepared, "llama")
    ids, noisy = tokens(model)
    expected = model(ids, noisy=noisy).logits
    copied = copy.deepcopy(model)
    model.get_parameter("mask_row").zero_()
    for layer in model.gate.layers:
        layer.lora_B["default"].weight.zero_()
    assert torch.equal(copied(ids, noisy=noisy).logits, expected)


def test_a_gate_can_be_taken_off(prepared: Prepared):
    model = gated(prepared, "llama")
    gate = model.gate
    assert gate is not None
    with pytest.raises(ValueError, match="have a gate already"):
        AdapterGate.attach(model.trunk)
    gate.detach()
    assert AdapterGate.attach(model.trunk).noisy is None


class Adapted(nn.Module):
    """The least that a gate goes on: it knows nothing of peft."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, 3, bias=False)})
        self._disable_adapters = False

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states if self._disable_adapters else (states + self.lora_B["default"](states)).square()


@pytest.mark.parametrize("keeps", [True, False])
def test_the_gate_outlives_the_forward_until_the_backward_pass(keeps: bool):
    """A layer that is computed again sees the gate of its forward, though another one of the same shape was set since. Without
    the gate's contexts the gradients would be others, and nothing would tell."""
    layer = Adapted()
    gate = AdapterGate.attach(layer)
    states = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    noisy, other = torch.tensor([[False, False, True, True]]), torch.tensor([[True, False, False, False]])

    def gradient(run: Callable[[], torch.Tensor]) -> torch.Tensor:
        with gate.opened(noisy):
            result = run()
        gate.open(other)
        layer.zero_grad()
        result.sum().backward()
        (gradient,) = (parameter.grad for parameter in layer.parameters())
        assert gradient is not None
        return gradient.clone()

    plain = gradient(lambda: layer(states))
    repeated: Any = partial(checkpoint, layer, states, use_reentrant=False)
    again = gradient(partial(repeated, context_fn=gate.contexts) if keeps else repeated)
    assert torch.equal(again, plain) == keeps


@pytest.mark.parametrize("model_type", trunks())
def test_a_fitted_model_trains_adapters_and_mask_row_alone(model_type: str, prepared: Prepared):
    model, _ = fitted(prepared(model_type), draft_stage())
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {name for name, _ in model.named_parameters() if ".lora_" in name or name == "mask_row"}
    config = model.config
    assert (config.context, config.grid, config.target, config.block_size) == ("causal", "response", "shift", 4)


def test_what_still_trains_drafts_and_checks(prepared: Prepared):
    """Answers during training are the parent's too, which blocks without a check are not."""
    model = gated(prepared, "llama")
    model.config.set_decoding("blocks", 4, "causal", "response", "shift")
    assert DecodeSettings().for_checkpoint(model.config).mode == "speculative"
