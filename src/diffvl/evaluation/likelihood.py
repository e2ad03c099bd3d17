"""How likely the weights find an answer, token by token: what tasks with given choices ask for.

It is the likelihood of `mode="ar"`: the product of what the causal logits say of each next token. For a masked-diffusion model
there is a bound on the likelihood only (docs/objective.md), which no benchmark's `acc` is defined by.

Shapes: B batch, L length, M rows, V vocabulary.
"""

from collections.abc import Sequence

import torch

from diffvl.decode.answer import Decoder, Message
from diffvl.hub.configuration_diffvl import DiffVLConfig, never_predicted

# Why a task with given answers is refused; its name goes before.
ONLY_A_BOUND = (
    "compares likelihoods, of which block diffusion has a bound only: add mode=ar (the same weights token by token, which have "
    "exact ones), or take a task that generates its answers"
)


def is_exact(config: DiffVLConfig, mode: str | None) -> bool:
    """Tells whether a checkpoint decodes by next-token probabilities, so that an answer has a likelihood that can be computed."""
    return mode == "ar" or config.decoding == "ar"


def spoken(chat: list[Message], answer: str) -> list[Message]:
    """Puts an answer behind the chat that asks for it."""
    return [*chat, {"role": "assistant", "content": answer.strip()}]


@torch.inference_mode()
def likelihoods(decoder: Decoder, chats: Sequence[list[Message]], answers: Sequence[str]) -> list[tuple[float, bool]]:
    """The log-likelihood of an answer to each chat, without its stop token, and whether greedy decoding would write it.

    Raises:
        ValueError: if the processor refuses a chat.
    """
    whole = [spoken(chat, answer) for chat, answer in zip(chats, answers, strict=True)]
    inputs = decoder.processor.apply_chat_template(whole, tokenize=True).to(decoder.model.device)
    asked_BL = _last_answers(inputs["answer_index"])
    row_B, place_B = asked_BL.nonzero(as_tuple=True)
    before_BL = torch.zeros_like(asked_BL)
    before_BL[row_B, place_B - 1] = True
    logits_MV = decoder.model(**inputs, logits_rows=before_BL).logits.float()
    forbidden_V = never_predicted(decoder.model.config, logits_MV.shape[1], logits_MV.device)
    log_MV = logits_MV.masked_fill(forbidden_V, -torch.inf).log_softmax(-1)
    ids_M = inputs["input_ids"][asked_BL]
    of_M, best_M = log_MV.gather(1, ids_M[:, None])[:, 0], log_MV.argmax(-1) == ids_M
    return [(float(of_M[row_B == row].sum()), bool(best_M[row_B == row].all())) for row in range(len(whole))]


def _last_answers(answer_BL: torch.Tensor) -> torch.Tensor:
    """bool [B, L]: the tokens of each sample's last answer, without its stop token."""
    last_BL = (answer_BL == answer_BL.max(1, keepdim=True).values) & (answer_BL > 0)
    ends_BL = last_BL & ~torch.nn.functional.pad(last_BL[:, 1:], (0, 1))
    return last_BL & ~ends_BL
