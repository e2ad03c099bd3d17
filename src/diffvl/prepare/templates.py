"""Chat templates: loading a tokenizer with its template, and proving once what every record relies on.

Place in the flow: `prepare` and `doctor` ask here whether a template can be trained on, and both get the same answer. What is
proven: an answer ends with a special token, in every round; the prompt of an answer is the beginning of the whole chat, in text
and in tokens; every turn is in the text. That a system turn works is a fact that is told, not a condition: see `system_advice`.
"""

import logging
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer

from diffvl.config.families import family_of
from diffvl.errors import CheckpointError, UnsupportedModelError, first_line
from diffvl.hub.chat_diffvl import ChatEncoder
from diffvl.hub.seen_diffvl import Size
from diffvl.hub.source_diffvl import SAMPLE
from diffvl.hub.template_diffvl import FAULTS, ChatTemplate, ChatTemplateError, Turn, Visual, shapes_of, with_fixed_date

log = logging.getLogger(__name__)
REASONING_TAG = "<think>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "chat_template.jinja")
ROUND: tuple[str, ...] = ("user", "assistant")
CONTENTS = ("{}", " {} ", "\n{}\n", "Une {} à 90 °, naïve ✓ 🙂")  # forms that a template may strip, and must not change
SYSTEM_SETTING = "prepare.system_turn=first_question"


def load_tokenizer(
    model: str,
    model_type: str,
    trust_remote_code: bool = False,
    revision: str | None = None,
    template: str | dict[str, str] | None = None,
) -> Any:
    """Loads the checkpoint's tokenizer; it must be a fast one and have a chat template.

    A diffusion language model's is read by the stock class that its family names: many bring tokenizer code along.
    Of several named templates it keeps the default one. A template that writes reasoning into some answers is replaced by the
    family's, and one that asks for the date gives the same date from here on, wherever the tokenizer is used.

    Args:
        template: the chat template of the checkpoint's processor, which goes before the tokenizer's own.
    Raises:
        CheckpointError, UnsupportedModelError.
    """
    path, family = Path(model), family_of(model_type)
    try:
        if path.suffix == ".gguf" and path.is_file():
            tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        elif family.loads_as is not None:
            tokenizer = getattr(transformers, family.loads_as.tokenizer).from_pretrained(model, revision=revision or "main")
            tokenizer.init_kwargs.pop("auto_map", None)  # it would be written again, and name code that is not there
        else:
            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code, revision=revision or "main")
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(
            f"{model}: its tokenizer cannot be loaded; expected a whole tokenizer.json beside the weights ({first_line(error)})"
        ) from error
    if not tokenizer.is_fast:
        raise UnsupportedModelError(f"{model}: a slow tokenizer; character offsets need a fast one (tokenizer.json)")
    tokenizer.chat_template = template or tokenizer.chat_template or family.prompt_template
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"{model}: its tokenizer has no chat template, so prompts and answers cannot be told apart; use an instruct "
            "checkpoint, or put a chat_template.jinja beside the tokenizer"
        )
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        raise CheckpointError(
            f"{model}: its tokenizer has the chat templates {', '.join(sorted(named))}, but none named default; put the one to "
            "train on beside the tokenizer as chat_template.jinja"
        )
    chosen = tokenizer.get_chat_template()
    if family.chat_template is not None and REASONING_TAG in chosen:
        log.warning("%s: its chat template writes %s into some answers; replaced by the family's", model, REASONING_TAG)
        chosen = family.chat_template
    tokenizer.chat_template = with_fixed_date(chosen)
    return tokenizer


def stop_token(tokenizer: Any, structured: bool = False) -> str:
    """Finds the special token that the chat template writes after an answer.

    Args:
        structured: see `ChatTemplate`.
    Raises:
        UnsupportedModelError: if there is none, so that a decoder could never stop.
    """
    name = tokenizer.name_or_path
    answer = "answer 1"
    turns: list[Turn] = [("user", ("question 0",)), ("assistant", (answer,))] if structured else _turns(ROUND)
    try:
        text = ChatTemplate(tokenizer, "", structured=structured).render(turns, add_generation_prompt=False)
    except (ChatTemplateError, *FAULTS) as error:
        reason = str(error.__cause__ or error)
        raise UnsupportedModelError(
            f"{name}: its chat template refuses a question and an answer ({reason}); correct it"
        ) from error
    if answer not in text:
        raise UnsupportedModelError(f"{name}: its chat template leaves the answer out, or writes another; correct it")
    rest = tokenizer(text[text.rindex(answer) + len(answer) :], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    for token in rest:
        if token in special:
            return str(tokenizer.convert_ids_to_tokens(token))
    raise UnsupportedModelError(
        f"{name}: its chat template writes no special token after an answer, so decoding could not stop; let it write one"
    )


def check_template(encoder: ChatEncoder) -> None:
    """Proves what every record relies on, on chats of one to three rounds, with a system turn where that works.

    Raises:
        UnsupportedModelError: naming what does not hold.
    """
    name = encoder.tokenizer.name_or_path
    try:
        for rounds in (1, 2, 3):
            _prove(encoder, ROUND * rounds)
        if not encoder.template.system_fault():
            for rounds in (1, 2):
                _prove(encoder, ("system", *ROUND * rounds))
    except (ChatTemplateError, *FAULTS) as error:
        raise UnsupportedModelError(f"{name}: {error}") from error


def _prove(encoder: ChatEncoder, roles: tuple[str, ...]) -> None:
    for form in CONTENTS:
        turns = encoder.template.fold(
            _turns(roles, form, None if encoder.template.structured else encoder.placeholders[Visual.IMAGE])
        )
        text, spans = encoder.template.spans(turns, add_generation_prompt=False)
        skeleton = encoder.template.skeleton(shapes_of(turns))
        if encoder.template.search(text, turns, skeleton) != spans:
            raise ChatTemplateError("what the chat template writes around an answer depends on what the chat says")
        whole = encoder.encode_turns(turns, add_generation_prompt=False, sizes=_sizes(roles))
        if encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] != encoder.tokens(text):
            raise ChatTemplateError(
                "its tokenizer's class changes texts before they are tokenised, which the fast one does not do"
            )
        for turn, (role, _) in enumerate(turns):
            if role == "assistant":
                kept = tuple(role for role, _ in turns[:turn])
                prompt = encoder.encode_turns(turns[:turn], add_generation_prompt=True, sizes=_sizes(kept))
                if whole.ids[: len(prompt.ids)] != prompt.ids or whole.answer[: len(prompt.ids)] != prompt.answer:
                    raise ChatTemplateError("a prompt has other tokens alone than at the beginning of the whole chat")


def system_advice(encoder: ChatEncoder) -> str:
    """Tells what there is to know about system turns, in words; empty if they work."""
    fault = encoder.template.system_fault()
    return (
        f"its chat template takes no system turn ({fault}); {SYSTEM_SETTING} puts it in front of the first question"
        if fault
        else ""
    )


def look_at_template(model: str, model_type: str, trust_remote_code: bool, revision: str | None) -> str:
    """Tells `doctor` whether the template of a checkpoint can be trained on.

    Returns:
        what there is to know, in words: system turns that do not work, or that there is no tokenizer to look at.
    Raises:
        CheckpointError, UnsupportedModelError: as `prepare` does.
    """
    path = Path(model)
    if path.is_dir() and not any((path / name).is_file() for name in TOKENIZER_FILES):
        return "no tokenizer beside it, so its chat template was not looked at"
    tokenizer = load_tokenizer(model, model_type, trust_remote_code, revision)
    encoder = ChatEncoder(tokenizer, family_of(model_type).image_token, 1, stop_token(tokenizer))
    check_template(encoder)
    return system_advice(encoder)


def _turns(roles: tuple[str, ...], form: str = "{}", placeholder: str | None = "") -> list[Turn]:
    """Gives a chat of these roles, with an image in every question: the placeholder in its text, or a part of its own."""
    texts = {"system": "manner", "user": f"{placeholder or ''}question", "assistant": "answer"}
    said = [(role, form.format(f"{texts[role]} {number}")) for number, role in enumerate(roles)]
    if placeholder is not None:
        return [*said]
    return [(role, (Visual.IMAGE, text) if role == "user" else (text,)) for role, text in said]


def _sizes(roles: tuple[str, ...]) -> list[Size]:
    """Gives a size for the image of every question."""
    return [SAMPLE] * roles.count("user")
