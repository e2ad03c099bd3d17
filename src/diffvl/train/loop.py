"""The training loop of a stage, over accelerate's `Accelerator`. Read it from `run` downwards, as a step happens:

    batches -> draw -> loss -> backward -> clip -> step -> schedule -> log -> evaluate -> save

What a step does follows from the recipe, the data and the number of the step. So a resume needs weights, optimiser and that
number. What one process could find out alone (a bad record, a loss that is not finite) is agreed on by all before anyone stops.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from diffvl.config.recipe import Stage
from diffvl.data.left_out import LeftOut
from diffvl.data.loader import StageData
from diffvl.data.mixture import Mixture
from diffvl.data.problems import Problem
from diffvl.data.sample_dataset import SampleDataset
from diffvl.data.samples import NO_SAMPLE, PROBLEMS, is_filler, on_device
from diffvl.errors import CheckpointError, TrainingError
from diffvl.objective.losses import Draw, LossOutput, curriculum_state, loss_of, measure, measured_sums, rates, scores
from diffvl.objective.normaliser import divisor
from diffvl.seeding import seed_dropout
from diffvl.store.weights import not_finite
from diffvl.train import checkpoints
from diffvl.train.feed import feed_of
from diffvl.train.launch import agreed, gathered
from diffvl.train.parts import parameter_groups
from diffvl.train.progress import Watchers
from diffvl.train.sharding import is_sharded

SHOWN_RECORDS = 5  # of a step that went wrong


@dataclass
class Counted:
    """What has been counted since the last log line."""

    steps: int = 0
    loss: Any = 0.0
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: int = 0
    since: float = field(default_factory=time.monotonic)

    def add(self, output: LossOutput) -> None:
        for name, value in output.sums.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.tokens += output.tokens


class Loop:
    """A stage's training. `step` counts the optimiser steps that are done, of `steps`; it and `counted` are all that moves,
    beside weights, optimiser and schedule."""

    def __init__(
        self,
        model: Any,
        stage: Stage,
        seed: int,
        data: StageData,
        collate: Callable[..., dict[str, Any]],
        left_out: LeftOut,
        accelerator: Accelerator,
        watchers: Watchers,
    ) -> None:
        self.stage, self.seed, self.data, self.collate, self.left_out = stage, seed, data, collate, left_out
        self.accelerator, self.watchers = accelerator, watchers
        self.feed = feed_of(data.train, stage, seed, collate, accelerator.num_processes, accelerator.process_index)
        self.steps = stage.steps or math.ceil((stage.epochs or 1.0) * self.feed.steps_per_epoch)
        self.model, self.config = model, model.config
        self.wrapped = model if is_sharded(model) else accelerator.prepare(model)
        # Fused: one kernel per tensor, and no temporaries as large as the model.
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, stage), betas=(stage.optim.beta1, stage.optim.beta2), eps=stage.optim.epsilon, fused=True
        )
        name = {"constant": "constant_with_warmup"}.get(stage.optim.schedule, stage.optim.schedule)
        self.schedule = get_scheduler(name, self.optimizer, math.ceil(stage.optim.warmup_ratio * self.steps), self.steps)
        self.step = 0
        self.counted = Counted()
        self.answer: Callable[[], dict[str, float]] | None = None  # figures of answers, at each evaluation

    # --- from the first step to the last ---------------------------------------------------------------------------------

    def run(self, run_dir: Path, last: Path | None, same_data: bool) -> None:
        """Trains to the last step, from a checkpoint if there is one.

        Args:
            run_dir: where checkpoints go. last: the one to go on from. same_data: whether the data is what the run began with.
        Raises:
            TrainingError, DataError, DiskError: in all processes; the last checkpoint stays.
        """
        if last is not None:
            self._resume(last, same_data)
        else:
            self.left_out.begin(self.step)
        self.watchers.begin(self.step, self.steps)
        if last is None and self.stage.eval_every is not None:
            self._log_evaluation()
        batches = self.feed.batches(self.step, self.steps)
        while self.step < self.steps:
            norm = self.train_step([next(batches) for _ in range(self.stage.accumulation)])
            self.step += 1
            is_last = self.step == self.steps
            saves = is_last or self.step % self.stage.save_every == 0
            # A line at every checkpoint, so that no average of a line reaches over one: those of a resumed run stay the same.
            if saves or self.step % self.stage.log_every == 0:
                self._log(norm)
            if self.stage.eval_every is not None and (is_last or self.step % self.stage.eval_every == 0):
                self._log_evaluation()
            if saves:
                state = {**self._curriculum(), "schedule": self.schedule.state_dict(), "feed": self._feed_state()}
                checkpoints.save(run_dir, self.wrapped, self.optimizer, state, self.stage.keep_checkpoints)
            self.watchers.step(self.step)
        self.watchers.end(self.step)

    # --- one step --------------------------------------------------------------------------------------------------------

    def train_step(self, batches: list[dict[str, Any]]) -> float:
        """One optimiser step on this process's micro-batches; returns the norm of the gradient before clipping."""
        divided_by = self._agree_on(batches)
        draw = Draw(self.seed, self.step, self.step / self.steps)
        seed_dropout(self.seed, self.step, self.accelerator.process_index)
        self.wrapped.train()
        losses: list[torch.Tensor] = []
        for number, batch in enumerate(batches, start=1):
            inputs = self._on_device(batch)
            # A sharded model reduces after every micro-step: what waits would be gradients of full size.
            reduces = number == len(batches) or is_sharded(self.wrapped)
            with nullcontext() if reduces else self.accelerator.no_sync(self.wrapped):
                # The wrapped model's forward runs under autocast by itself; here too, so that masks are made in its type.
                with self.accelerator.autocast():
                    output = loss_of(self.wrapped, self.config, inputs, self.stage.objective, draw)  # type: ignore[arg-type]
                if is_filler(inputs):
                    loss = 0.0 * output.loss
                else:
                    loss = output.loss * self.accelerator.num_processes / divided_by
                    self.counted.add(output)
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        norm: Any = self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.stage.optim.max_grad_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._require_finite(losses, torch.as_tensor(norm), [batch["sample"] for batch in batches])
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.counted.steps += 1
        for loss in losses:
            self.counted.loss = self.counted.loss + loss
        return float(norm)

    def _agree_on(self, batches: list[dict[str, Any]]) -> torch.Tensor:
        """What the loss of the step is divided by, over all processes; records that could not be used are noted, by all of them
        alike."""
        problems = [problem for batch in batches for problem in batch.pop(PROBLEMS, ())]
        used = sum(not is_filler(batch) for batch in batches)
        share = sum(divisor(self.stage.objective, batch["labels"]) for batch in batches)
        met = len(problems) + sum(len(batch["sample"]) for batch in batches if not is_filler(batch))
        total, all_problems, all_used, all_met = self._summed([share, len(problems), used, met])
        self.left_out.count(int(all_met))
        if all_problems:
            self.left_out.add(gathered(problems), int(all_used), self.step + 1)
        return torch.tensor(total, dtype=torch.float32, device=self.accelerator.device)

    def _on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        return on_device(batch, self.accelerator.device, non_blocking=True)

    def _summed(self, values: list[float]) -> list[float]:
        """Each value over all processes."""
        if self.accelerator.num_processes == 1:
            return values
        device = self.accelerator.device
        summed: Any = self.accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=device), reduction="sum")
        return summed.tolist()

    def _require_finite(self, losses: list[torch.Tensor], norm: torch.Tensor, samples: list[torch.Tensor]) -> None:
        """Raises TrainingError in all processes before a step that would spoil every weight, and a checkpoint with them."""
        bad = None
        for loss, of_batch in zip(losses, samples, strict=True):
            if bad is None and not torch.isfinite(loss):
                bad = self._not_finite("loss", loss, [of_batch])
        if bad is None and not torch.isfinite(norm):
            bad = self._not_finite("norm of the gradient", norm, samples)
        # Any process's bad loss has reached the norm of all; an infinite one with finite gradients is its own affair.
        if self._summed([float(bad is not None)])[0]:
            agreed(partial(_raise, bad))

    def _not_finite(self, what: str, value: torch.Tensor, samples: list[torch.Tensor]) -> TrainingError:
        """Names the step as metrics.jsonl counts it, and the weight that is to blame; where none is, the samples by their index,
        and some of them by file and line."""
        told = f"step {self.step + 1}: the {what} is {value.item()}"
        if spoilt := not_finite(self.model):
            return TrainingError(
                f"{told}, and so is a weight: {spoilt}. The records are not to blame: begin again from a sound checkpoint under "
                "another --out"
            )
        ids = [index for index in torch.cat(samples).tolist() if index != NO_SAMPLE]
        places = [self.data.train.place_of(index) for index in ids[:SHOWN_RECORDS]]
        return TrainingError(
            f"{told} on samples {ids} ({', '.join(places)}{' ...' if len(ids) > len(places) else ''}); the last good checkpoint "
            "is kept, and --resume goes on from it. If it happens again, look at these records, or begin again with a lower "
            "learning rate under another --out"
        )

    # --- what is told ----------------------------------------------------------------------------------------------------

    def _log(self, norm: float) -> None:
        """A line about the steps since the last one. Where curricula stood: in the last of them."""
        counted, self.counted = self.counted, Counted()
        loss: Any = self.accelerator.gather(torch.as_tensor(counted.loss, device=self.accelerator.device).reshape(1))
        # By the objective's names: a process of which every record was left out has counted nothing.
        names = measured_sums(self.stage.objective)
        *sums, tokens = self._summed([*(float(counted.sums.get(name, 0.0)) for name in names), float(counted.tokens)])
        line = {
            "loss": loss.mean().item() / counted.steps,
            "grad_norm": norm,
            "learning_rate": max(group["lr"] for group in self.optimizer.param_groups),
            **rates(dict(zip(names, sums, strict=True))),
            "tokens_per_second": tokens / max(time.monotonic() - counted.since, 1e-9),
            **curriculum_state(self.stage.objective, (self.step - 1) / self.steps),
        }
        if self.left_out:
            line["left_out"] = len(self.left_out)
        self._tell(line)

    @torch.no_grad()
    def _log_evaluation(self) -> None:
        """A line about the held-out records (`objective.measure`), which the processes share among them."""
        held_out = self.data.held_out
        assert held_out is not None
        problems: list[Problem] = []
        self.model.eval()
        with self.accelerator.autocast():
            batches = map(self._on_device, self._held_out_batches(held_out, problems))
            sums = measure(self.model, self.config, batches, self.stage.objective)
            answered = self.answer() if self.answer is not None and self.accelerator.is_main_process else {}
        if is_sharded(self.model):
            self.model.reshard()  # the root, which a forward without a backward leaves gathered
        if self._summed([len(problems)])[0]:
            self.left_out.add(gathered(problems), 0, self.step)
        # A process without a share of the records adds zeros: all of them must join in the sum.
        names = measured_sums(self.stage.objective)
        totals = self._summed([float(sums.get(name, 0.0)) for name in names])
        figures = scores(dict(zip(names, totals, strict=True))) | answered
        self._tell({f"eval_{key}": value for key, value in figures.items()})

    def _held_out_batches(self, held_out: SampleDataset | Mixture, problems: list[Problem]) -> Iterator[dict[str, Any]]:
        """This process's share of the held-out records, in as many batches as every other process has: fillers at the end. What
        is wrong with records is added to `problems`."""
        count, processes, size = min(len(held_out), self.stage.eval_limit), self.accelerator.num_processes, self.stage.batch_size
        places = list(range(self.accelerator.process_index, count, processes))
        for number in range(math.ceil(math.ceil(count / processes) / size)):
            batch = self.collate([held_out[place] for place in places[number * size : (number + 1) * size]])
            problems += batch.pop(PROBLEMS, ())
            yield batch

    def _tell(self, line: dict[str, float]) -> None:
        self.watchers.log(self.step, {**line, "epoch": self.feed.epoch_after(self.step)})
        self.accelerator.log(line, step=self.step)

    # --- going on --------------------------------------------------------------------------------------------------------

    def _resume(self, last: Path, same_data: bool) -> None:
        """Takes up a checkpoint.

        Raises:
            CheckpointError: the curricula would jump, with another number of steps or other data.
        """
        state = agreed(lambda: checkpoints.load(last, self.wrapped, self.optimizer))
        schedule, feed = state.pop("schedule"), state.pop("feed", {})
        self.step = checkpoints.step_of(last)
        self.left_out.begin(self.step, feed.pop("seen", 0))
        try:
            self.feed.resume(feed)
        except CheckpointError as error:
            raise CheckpointError(f"{last / checkpoints.STATE_FILE}: {error}") from error
        if same_data and state != self._curriculum():
            error = CheckpointError(
                f"{last / checkpoints.STATE_FILE}: the curriculum stood at {state}, this run would go on at "
                f"{self._curriculum()}; resume with the settings and the data that the run began with"
            )
            agreed(partial(_raise, error))
        self.schedule.load_state_dict(schedule)
        for group, rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate

    def _feed_state(self) -> dict[str, Any]:
        state = self.feed.state()
        return {**state, "seen": self.left_out.seen} if state else {}

    def _curriculum(self) -> dict[str, float]:
        stands = {"step": self.step, "steps": self.steps, checkpoints.ROWS: self.feed.rows_per_step}
        return {**stands, **curriculum_state(self.stage.objective, self.step / self.steps)}


def _raise(error: TrainingError | CheckpointError | None) -> None:
    if error is not None:
        raise error
