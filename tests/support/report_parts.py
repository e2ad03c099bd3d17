"""What the tests of `make gpu-report` share: parts, the machine that they run on, and what an earlier run left."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from tools.gpu_report.origin import Origin
from tools.gpu_report.parts import Part
from tools.gpu_report.run import Ended, Outcome, Request, run_parts

HERE = Origin("GPU A", "0.1.0", "abc", "2026-11-29")
done = partial(Outcome, state="done", seconds=1.0, origin=HERE)


def part(name: str, seconds: int = 10, missing: str | None = None) -> Part:
    return Part(name, f"about {name}", seconds, lambda quick: [name, *(["--quick"] if quick else [])], lambda quick: missing)


@dataclass
class Machine:
    """Stands for programs and the time that they take. ends: how a part ends; well, unless it is named."""

    takes: float = 10.0
    now: float = 0.0
    ends: dict[str, Ended] = field(default_factory=dict)
    launched: list[tuple[str, float]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def launch(self, words: list[str], limit: float) -> Ended:
        self.launched.append((words[0], limit))
        self.now += min(self.takes, limit)
        return self.ends.get(words[0], Ended(0, f'some line\n{{"name": "{words[0]}"}}\n', ""))

    def run(
        self, parts: list[Part], budget: float = 100.0, quick: bool = False, before: Iterable[Outcome] = ()
    ) -> dict[str, Outcome]:
        """What became of the parts. Every save has all that an earlier run found."""
        request = Request(parts, budget, HERE, quick, list(before))
        saved: list[list[str]] = []

        def save(outcomes: list[Outcome]) -> None:
            saved.append([one.name for one in outcomes])

        found = run_parts(request, self.said.append, save, self.launch, lambda: self.now)
        names, earlier = [one.name for one in parts], {one.name for one in request.before}
        others = [one.name for one in found[len(parts) :]]
        ahead = [[name for name in names[count:] if name in earlier] for count in range(1, len(parts) + 1)]
        assert saved == [names[: count + 1] + ahead[count] + others for count in range(len(parts))]
        return {one.name: one for one in found}
