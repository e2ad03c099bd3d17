"""What a report is made of, in the order of worth: a part is one program, which prints one JSON object.

Only the standard library is imported, here and in whatever the report needs to say what is missing.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHAPES = ("L3000-R300", "L1000-R600", "L512-R400")
QUICK_SHAPES = {"L3000-R300": "L64-R16", "L1000-R600": "L48-R24", "L512-R400": "L40-R32"}
PLAN = "src/diffvl/estimate"  # the room that plans a step's memory


@dataclass(frozen=True)
class Part:
    """A part of the report.

    seconds: what it takes on a data-centre GPU, compiling included, as far as can be told before it was ever run on one.
    words: its command line behind `python`, by `quick`. missing: why it cannot run here, None where it can, by `quick`.
    """

    name: str
    about: str
    seconds: int
    words: Callable[[bool], list[str]]
    missing: Callable[[bool], str | None] = lambda quick: None


def _decode(batch: int) -> Callable[[bool], list[str]]:
    """Ours, with CUDA graphs and without, against AR `generate`, in the same process. Batch 1 has every number of steps, and the
    published loop; a batch of more has one."""

    def words(quick: bool) -> list[str]:
        common = ["-m", "diffvl.cli", "bench", "decode", "--batch", str(batch), "--json"]
        if quick:  # its compiler would take longer than everything else
            return [*common, "--quick", "--device", "cpu", "--no-compile", "--steps", "4"]
        steps = "8,4,2" if batch == 1 else "4"
        return [*common, "--device", "cuda", "--compile-batch", str(batch), "--steps", steps]

    return words


def _train(shape: str) -> Callable[[bool], list[str]]:
    def words(quick: bool) -> list[str]:
        common = ["-m", "diffvl.cli", "bench", "train", "--no-scaling", "--json"]
        if quick:
            return [*common, "--shapes", QUICK_SHAPES[shape], "--quick", "--device", "cpu"]
        return [*common, "--shapes", shape, "--device", "cuda"]

    return words


def _program(name: str) -> Callable[[bool], list[str]]:
    return lambda quick: ["-m", f"tools.gpu_report.{name}", *(["--quick"] if quick else [])]


def _no_gpu_tests(quick: bool) -> str | None:
    if quick:
        return "the tests need a GPU"
    return None if importlib.util.find_spec("pytest") else "pytest is not installed"


def _no_measured_plan(quick: bool) -> str | None:
    return None if (ROOT / PLAN).is_dir() else f"this version plans no memory ({PLAN} is not there)"


PARTS = (
    Part(
        "decode-1",
        "decoding at batch 1: CUDA graphs, AR generate, the published loop, the weight-streaming floor",
        140,
        _decode(1),
    ),
    Part("tests", "the tests that need a GPU", 120, _program("gpu_tests"), _no_gpu_tests),
    Part("train-L3000-R300", "a training step of a LLaVA-like sample, in four forms", 60, _train("L3000-R300")),
    Part("sharding", "FSDP2 in one process against no sharding: losses, seconds, memory", 60, _program("sharding")),
    Part("memory", "the plan of a step's memory against its peak", 45, _program("memory"), _no_measured_plan),
    Part("decode-8", "decoding at batch 8", 80, _decode(8)),
    Part("decode-32", "decoding at batch 32", 90, _decode(32)),
    Part("train-L1000-R600", "a training step of a document", 45, _train("L1000-R600")),
    Part("train-L512-R400", "a training step of a text", 40, _train("L512-R400")),
)


def chosen(only: list[str], skip: list[str]) -> list[Part]:
    """The parts that are asked for, in order; a name also stands for all that begin with it and a dash.

    Raises:
        ValueError: for a name that no part has, or if nothing is left.
    """

    def is_named(part: Part, names: list[str]) -> bool:
        return any(part.name == name or part.name.startswith(f"{name}-") for name in names)

    for name in (*only, *skip):
        if not any(is_named(part, [name]) for part in PARTS):
            raise ValueError(f"no part is called {name!r}; there are {', '.join(part.name for part in PARTS)}")
    found = [part for part in PARTS if (not only or is_named(part, only)) and not is_named(part, skip)]
    if not found:
        raise ValueError("nothing is left to do: --skip leaves out all that --only names")
    return found
