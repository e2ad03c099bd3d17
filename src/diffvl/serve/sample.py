"""A request as the batch knows it: a prompt on its way to an answer, with settings of its own.

Shapes: B batch, L prompt tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad
from transformers import BatchFeature

from diffvl.hub.answers_diffvl import Picker, cut
from diffvl.hub.pixels_diffvl import join_pixels
from diffvl.hub.processing_diffvl import TEXT_INPUTS, pixels_in
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.serve.coupling import PositionDraws
from diffvl.serve.denoising import Step


@dataclass(eq=False)
class Sample:
    """One prompt on its way to an answer.

    inputs: what the processor gave for it, alone; nothing any more once the prompt is taken in.
    settings: checked and filled in for the checkpoint, with the tokenizer. on_step: is shown every denoising step, in the model's
    thread; None for nobody. draw: what makes tokens of logits where the sample draws, with a generator of its own.
    coupling: the draws of a sample whose tokens are drafted and checked, where it draws.
    answer: its tokens so far. ended: why it has ended, "stop" or "length"; None while it goes on.
    blocks (or rounds of drafts), forwards, tokens of drafts that were checked (drafted) and kept (accepted): so far.
    """

    inputs: BatchFeature
    settings: DecodeSettings
    on_step: Callable[[Step], None] | None = None
    draw: Picker | None = None
    coupling: PositionDraws | None = None
    answer: list[int] = field(default_factory=list)
    ended: str | None = None
    blocks: int = 0
    forwards: int = 0
    drafted: int = 0
    accepted: int = 0
    prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_tokens = self.inputs["input_ids"].shape[1]

    def extend(self, tokens: list[int]) -> None:
        """Adds the tokens of a finished block, up to where the answer ends."""
        before = len(self.answer)
        self.answer.extend(tokens)
        if cut(self.answer, before, self.settings):
            self.ended = self._reason(before + len(tokens))

    def _reason(self, whole: int) -> str:
        """An answer that fills its limit without having been cut before ended for its length."""
        stops = self.settings.eos_token_id
        assert stops is not None
        if len(self.answer) < min(whole, self.settings.max_new_tokens) or self.answer[-1] in stops:
            return "stop"
        text = self.settings.tokenizer.decode(self.answer, skip_special_tokens=False) if self.settings.stop_strings else ""
        return "stop" if any(string in text for string in self.settings.stop_strings) else "length"


def inputs_of(
    samples: Sequence[Sample], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The prompts as one batch on a device: ids, valid tokens and earlier answers, [B, L], padded left; pixels."""
    longest = max(sample.prompt_tokens for sample in samples)

    def rows(name: str, fill: int) -> torch.Tensor:
        given = [sample.inputs[name] for sample in samples]
        return torch.cat([pad(row, (longest - row.shape[1], 0), value=fill) for row in given]).to(device)

    ids, valid, marks = (rows(name, pad_token_id if name == "input_ids" else 0) for name in TEXT_INPUTS)
    pixels = join_pixels([pixels_in(sample.inputs) for sample in samples])
    return ids, valid.bool(), marks, {name: value.to(device) for name, value in pixels.items()}
