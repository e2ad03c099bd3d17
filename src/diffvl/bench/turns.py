"""Answers by turns: several models, or one under several settings, answer the same questions one after the other in one process.

Each call begins with another of them, so that a machine that slows down slows all of them alike. Times are those of `generate`
itself, image features included; reading and cutting images is the same work for all and not in it.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console

from diffvl.bench.timing import schedule, spread
from diffvl.decode.answer import Answer, Decoder
from diffvl.evaluation.scored import Question, ScoredAnswer, answer_questions_of, scored
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.terminal.bars import track


@dataclass(frozen=True)
class Player:
    """Who answers, and how."""

    decoder: Decoder
    settings: DecodeSettings


@dataclass(frozen=True)
class Call:
    """A group's answers. batches: one answer of each batch, whose forwards and seconds are the batch's; more than one where the
    context leaves some questions less room than others."""

    scored: list[ScoredAnswer]
    batches: list[Answer]

    @property
    def seconds(self) -> float:
        return sum(one.prefill_seconds + one.decode_seconds for one in self.batches)

    @property
    def forwards(self) -> int:
        return sum(one.forwards for one in self.batches)


Calls = list[Call]


def answer_in_turns(
    players: Mapping[str, Player], groups: Sequence[Sequence[Question]], rounds: int, console: Console, text: str
) -> dict[str, Calls]:
    """Lets every player answer every group of questions, a group together, `rounds` times; the first group once before, to
    warm up. Returns by player the answers of each call: all groups of the first round, then those of the next.

    Raises:
        UsageError, DataError: as `answer_within_context`.
    """
    for player in players.values():
        answer_questions_of(player.decoder, groups[0], player.settings)
    calls: dict[str, Calls] = {name: [] for name in players}
    plan = schedule(list(players), rounds * len(groups))
    for number, name in track(console, plan, len(plan), text):
        group = groups[number % len(groups)]
        answers, batches = answer_questions_of(players[name].decoder, group, players[name].settings)
        calls[name].append(Call([scored(question, given) for question, given in zip(group, answers, strict=True)], batches))
    return calls


@dataclass(frozen=True)
class Speed:
    """What the calls of a player took. tokens_per_second: of a round, the median over rounds; spread: of the rounds' seconds.
    tokens_per_forward: of all samples of a batch together. first_token_seconds: until the first tokens were predicted, the median
    over calls."""

    tokens_per_second: float
    tokens_per_forward: float
    first_token_seconds: float
    spread: float


def speed_of(calls: Calls, rounds: int) -> Speed:
    """Sums the calls of a player up."""
    size = len(calls) // rounds
    of_rounds = [calls[start : start + size] for start in range(0, len(calls), size)]
    seconds = [sum(call.seconds for call in one) for one in of_rounds]
    tokens = sum(one.answer.tokens for call in of_rounds[0] for one in call.scored)
    forwards = sum(call.forwards for call in of_rounds[0])
    first = statistics.median(call.batches[0].prefill_seconds for call in calls)
    return Speed(tokens / statistics.median(seconds), tokens / forwards, first, spread(seconds))
