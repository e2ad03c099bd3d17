"""The model class of lmms-eval: `--model diffvl --model_args pretrained=DIR,...`, and what `diffvl evaluate --tasks` hands over.

lmms-eval has two interfaces: chat tasks give messages, simple tasks a text and its images. Both become the same questions here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.model_utils.gen_metrics import log_metrics  # pyright: ignore[reportMissingImports]

from diffvl.decode.answer import Decoder, Message, load_for_decoding
from diffvl.errors import UsageError
from diffvl.evaluation.benchmark_answers import Answering, Choice, Question
from diffvl.evaluation.benchmark_chats import chat_of_messages, chat_of_text
from diffvl.evaluation.task_settings import read_settings
from diffvl.terminal import console as terminal
from diffvl.terminal.bars import quiet_libraries


class DiffVLChat(lmms):
    """A checkpoint that `diffvl convert` wrote, for tasks that give messages."""

    is_simple = False

    def __init__(
        self,
        pretrained: str | Decoder | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        """
        Args:
            pretrained: the checkpoint's directory, or the checkpoint loaded.
            batch_size: questions that are answered together.
            device: `cuda`, `cuda:1`, `cpu`; default: a GPU where there is one.
            settings: how to decode, by the names of `DecodeSettings`; they hold against what a task asks for.
        Raises:
            UsageError, CheckpointError: if one of them is wrong.
        """
        super().__init__()
        quiet_libraries()
        chosen = read_settings(settings)
        size = _batch_size(batch_size, max_batch_size)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        decoder = _loaded(pretrained)
        self.device = _device(device, self.accelerator)
        decoder.model.to(self.device)
        try:
            chosen.for_checkpoint(decoder.model.config)
        except ValueError as error:
            raise UsageError(f"{pretrained}: {error}") from error
        self.is_answered = False  # whether all that lmms-eval asked was answered, so that what follows is scoring
        self.answering = Answering(decoder, chosen, settings, size, terminal.console(stderr=True, quiet=self._rank > 0))

    # --- lmms-eval's interface -----------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers questions, in their order."""
        before = {task: (found.tokens, found.seconds) for task, found in self.answering.figures.items()}
        given = self.answering.answers([self._question(request) for request in requests])
        tokens = sum(found.tokens - before.get(task, (0, 0))[0] for task, found in self.answering.figures.items())
        seconds = sum(found.seconds - before.get(task, (0, 0))[1] for task, found in self.answering.figures.items())
        if seconds:
            log_metrics(total_elapsed_time=seconds, total_gen_tokens=tokens, avg_speed=tokens / seconds)
        return [GenerationResult(text, TokenCounts(output_tokens=count)) for text, count in given]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """The likelihoods of given answers. Raises UsageError where there are none to compute."""
        return self.answering.likelihoods([self._choice(request) for request in requests])

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raises UsageError."""
        raise UsageError(f"task {requests[0].task_name} asks in several rounds, which diffvl does not answer: take another task")

    def clean(self) -> None:
        """Frees what lmms-eval frees when nothing more is asked."""
        self.is_answered = True
        super().clean()

    # --- requests ------------------------------------------------------------------------------------------------------------

    def _question(self, request: Instance) -> Question:
        _, messages, asked, number, task, split = request.args
        place = f"task {task}, document {number}"

        def chat() -> list[Message]:
            return chat_of_messages(messages(self.task_dict[task][split][number]), place)

        return Question(task, place, chat, asked)

    def _choice(self, request: Instance) -> Choice:
        """A question with the answer whose likelihood is asked for; without more than these two there is nothing to look at."""
        text, answer, *more = request.args
        if not more:
            task = request.task_name
            return Choice(Question(task, f"task {task}", lambda: chat_of_text(text, (), f"task {task}"), {}), answer)
        visuals, number, task, split = more
        question = self._shown(text, visuals, number, task, split, {})
        return Choice(question, str(answer(self.task_dict[task][split][number]) if callable(answer) else answer))

    def _shown(self, text: str, visuals: Any, number: int, task: str, split: str, asked: dict[str, Any]) -> Question:
        """A question of a text and its images."""
        place = f"task {task}, document {number}"

        def chat() -> list[Message]:
            return chat_of_text(text, () if visuals is None else visuals(self.task_dict[task][split][number]), place)

        return Question(task, place, chat, asked)


class DiffVLSimple(DiffVLChat):
    """The same for tasks that give a text and its images."""

    is_simple = True

    def _question(self, request: Instance) -> Question:
        text, asked, visuals, number, task, split = request.args
        return self._shown(text, visuals, number, task, split, asked)


# --- arguments ---------------------------------------------------------------------------------------------------------------


def _loaded(pretrained: str | Decoder | None) -> Decoder:
    """Raises UsageError without a checkpoint."""
    if pretrained is None:
        raise UsageError("the model diffvl needs a checkpoint: --model_args pretrained=DIR, one that `diffvl convert` wrote")
    return pretrained if isinstance(pretrained, Decoder) else load_for_decoding(Path(pretrained))


def _batch_size(size: int | str, largest: int | None) -> int:
    if largest is not None:
        raise UsageError("max_batch_size has no effect: batches are of batch_size")
    if not str(size).isdecimal() or int(size) < 1:
        raise UsageError(f"batch_size={size!r}: expected a whole number from 1 on; it is not found automatically")
    return int(size)


def _device(name: str | None, accelerator: Any) -> torch.device:
    """The device that was asked for, or this process's own. Raises UsageError for one that is not there."""
    if name is None:
        return accelerator.device
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device={name}: not a device of this machine ({str(error).splitlines()[0]})") from error
    return device
