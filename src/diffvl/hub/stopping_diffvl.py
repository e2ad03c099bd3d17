"""Where an answer ends: a stop token, a stop string, a loop of repetitions, or the limit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LONGEST_UNIT = 64  # tokens of a repeated unit that is looked for


@dataclass(frozen=True)
class Stopping:
    """tokens: ids that end an answer and stay in it. strings: texts that end it (with the tokenizer that decodes them). repeats:
    an answer in which any unit stands this many times in a row is cut after the first; None does not look. limit: tokens."""

    tokens: frozenset[int]
    limit: int
    strings: tuple[str, ...] = ()
    tokenizer: Any = None
    repeats: int | None = None

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"max_new_tokens is {self.limit}, expected 1 or more")
        if self.strings and self.tokenizer is None:
            raise ValueError("stop_strings needs the tokenizer: generate(..., stop_strings=[...], tokenizer=processor.tokenizer)")
        if "" in self.strings:
            raise ValueError("stop_strings holds an empty text, which every answer contains")
        if self.repeats is not None and self.repeats < 2:
            raise ValueError(f"repetition_stop is {self.repeats}, expected 2 or more")

    def cut(self, answer: list[int], seen: int) -> bool:
        """Trims an answer in place where it ends; True if it does. `seen` tokens of it were looked at before; in what portions
        they come does not matter."""
        ends = [place + 1 for place in range(seen, len(answer)) if answer[place] in self.tokens][:1]
        if self.strings:
            ends += self._string_end(answer, seen)
        if len(answer) >= self.limit:
            ends.append(self.limit)
        if self.repeats is not None:
            # A loop that would close behind another end is none.
            ends += self._loop_end(answer[: min(ends, default=len(answer))], seen)
        if not ends:
            return False
        del answer[min(ends) :]
        return True

    def certain(self, answer: Sequence[int]) -> int:
        """How many tokens of an answer that goes on nothing can take away any more: a loop that closes later is cut after its
        first round."""
        count = len(answer)
        if self.repeats is None:
            return count
        for unit in range(1, LONGEST_UNIT + 1):
            begin = len(answer) - unit
            while begin > 0 and answer[begin - 1] == answer[begin - 1 + unit]:
                begin -= 1
            if begin + unit < len(answer):
                count = min(count, begin + unit)
        return count

    def _string_end(self, answer: Sequence[int], seen: int) -> list[int]:
        """The first length at which the text holds a stop string."""
        if not self._holds(answer):
            return []
        return [length for length in range(seen + 1, len(answer) + 1) if self._holds(answer[:length])][:1]

    def _holds(self, answer: Sequence[int]) -> bool:
        text = self.tokenizer.decode(answer, skip_special_tokens=False)
        return any(string in text for string in self.strings)

    def _loop_end(self, answer: Sequence[int], seen: int) -> list[int]:
        """The end of the first round of a loop, looked for at every length."""
        assert self.repeats is not None
        for length in range(seen + 1, len(answer) + 1):
            for unit in range(1, min(LONGEST_UNIT, length // self.repeats) + 1):
                tail = list(answer[length - unit * self.repeats : length])
                if tail == tail[:unit] * self.repeats:
                    return [length - unit * (self.repeats - 1)]
        return []
