"""`diffvl bench train`: the time, speed and peak memory of one training step, in four forms, in one process.

In order: the machine, a proof that ours and the published form train the same thing (no figure without it), the forms over
every shape, how the time grows with length and answer, and the ratios that the project holds itself to. Weights are random:
they change no shape and no time.
"""

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from diffvl.bench import machine
from diffvl.bench.bars import Verdict, ratio, verdicts
from diffvl.bench.equality import prove_equal
from diffvl.bench.flops import FORMULA, matmul_peak, step_flops
from diffvl.bench.forms import FORMS, Shape, TrunkSize, build_model, make_work, parse_shapes, resized
from diffvl.bench.measure import Measured, draws, measure_forms, top_kernels
from diffvl.bench.memory import MemoryMeter, meter_of, release
from diffvl.bench.scaling import FULL_PLAN, QUICK_PLAN, measure_scaling
from diffvl.config.recipe import BlockDiffusionObjective
from diffvl.config.resolve import parse
from diffvl.errors import UsageError
from diffvl.terminal.bars import spinner_or_line

DEFAULT_SHAPES = "L3000-R300,L1000-R600,L512-R400"  # LLaVA-like, document, text
QUICK_SHAPES = "L64-R16,L48-R24"


@dataclass(frozen=True)
class Scale:
    """What is run on a kind of device: the trunk, the trunk of the scaling part, its dtype, timed rounds."""

    trunk: TrunkSize
    scaling_trunk: TrunkSize
    dtype: torch.dtype
    rounds: int


# The widths of SmolLM2-135M, with as many of its 30 layers as two cores do in the time.
_CPU_TRUNK = TrunkSize(hidden=576, layers=3, heads=9, kv_heads=3, intermediate=1536, vocabulary=49152)
_CPU_SCALING = TrunkSize(hidden=192, layers=2, heads=3, kv_heads=1, intermediate=512, vocabulary=4096)
# The shape of Qwen2.5-1.5B, whole.
_CUDA_TRUNK = TrunkSize(hidden=1536, layers=28, heads=12, kv_heads=2, intermediate=8960, vocabulary=151936)
_CUDA_SCALING = TrunkSize(hidden=1536, layers=8, heads=12, kv_heads=2, intermediate=8960, vocabulary=4096)
_QUICK_TRUNK = TrunkSize(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128, vocabulary=512)

SCALES = {
    "cpu": Scale(_CPU_TRUNK, _CPU_SCALING, torch.float32, rounds=3),
    "cuda": Scale(_CUDA_TRUNK, _CUDA_SCALING, torch.bfloat16, rounds=10),
}
QUICK_SCALE = Scale(_QUICK_TRUNK, _QUICK_TRUNK, torch.float32, rounds=1)


@dataclass(frozen=True)
class TrainBench:
    """What the command line asks for; None takes the default of the device.

    quick: a tiny trunk and tiny samples, to see that it runs; its figures mean nothing.
    """

    shapes: str | None = None
    repeats: int | None = None
    device: str = "auto"
    layers: int | None = None
    hidden: int | None = None
    block_size: int = 8
    context: str = "block"
    seed: int = 0
    quick: bool = False
    profile: bool = False
    scaling: bool = True


@dataclass(frozen=True)
class Report:
    """machine, rows, fits: what `--json` prints. verdicts: every bar of the device against the rows."""

    machine: dict[str, Any]
    rows: list[dict[str, Any]]
    fits: dict[str, Any]
    verdicts: list[Verdict]

    @property
    def json(self) -> dict[str, Any]:
        return {"machine": self.machine, "rows": self.rows, "fits": self.fits}


def compare(request: TrainBench, console: Console) -> Report:
    """Runs the whole comparison; progress goes to `console`.

    Raises:
        UsageError, ConfigError: on words that do not fit together, before any work.
        TrainingError: if ours and the published form do not give the same loss and gradient.
    """
    device = pick_device(request.device)
    scale = QUICK_SCALE if request.quick else SCALES[device.type]
    size = resized(scale.trunk, request.layers, request.hidden)
    default_shapes = QUICK_SHAPES if request.quick else DEFAULT_SHAPES
    shapes = parse_shapes(default_shapes if request.shapes is None else request.shapes)
    settings = {"kind": "block_diffusion", "block_size": request.block_size, "context": request.context}
    objective = parse(BlockDiffusionObjective, settings, "diffvl bench train")
    rounds = request.repeats or scale.rounds
    meter = meter_of(device)

    with spinner_or_line(console, "checking that ours and the published form train the same thing"):
        differences = prove_equal(objective, device, request.seed)
        peak = matmul_peak(device, scale.dtype)
    described = machine.describe() | {
        "device": device.type,
        "dtype": str(scale.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "load_before": round(machine.load(), 2),
        "matmul_flops_per_second": peak,
        "memory_method": meter.method,
        "model_flops": FORMULA,
        "relative_difference_to_published": differences,
        "trunk": vars(size),
        "settings": vars(request) | {"repeats": rounds},
    }
    rows = measure_shapes(shapes, size, scale, objective, rounds, meter, request, console, peak)
    fits: dict[str, Any] = {}
    if request.scaling:
        model = build_model(scale.scaling_trunk, device, scale.dtype, request.seed)
        plan = QUICK_PLAN if request.quick else FULL_PLAN
        fits = measure_scaling(model, objective, plan, rounds, meter, request.seed, console)
    return Report(described, rows, fits, verdicts(rows, device.type))


def pick_device(name: str) -> torch.device:
    """auto, cpu or cuda -> the device. Raises UsageError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; take --device cpu, or a machine that has one")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def measure_shapes(
    shapes: list[Shape],
    size: TrunkSize,
    scale: Scale,
    objective: BlockDiffusionObjective,
    rounds: int,
    meter: MemoryMeter,
    request: TrainBench,
    console: Console,
    peak: float,
) -> list[dict[str, Any]]:
    """One row for every shape and form."""
    with spinner_or_line(console, f"building a trunk of {size.layers} layers of {size.hidden}"):
        model = build_model(size, meter.device, scale.dtype, request.seed)
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        work = make_work(shape, objective, size.vocabulary, meter.device, request.seed)
        measured = measure_forms(model, work, list(FORMS), rounds, meter, request.seed, console, f"timing {shape.name}")
        for form in FORMS:
            flops = sum(step_flops(form, size, work, draw) for draw in draws(request.seed, rounds)) / rounds
            rows.append(row_of(shape, measured[form], flops, peak))
        if request.profile:
            rows[-1]["top_kernels"] = top_kernels(model, work, "ours", meter.device, request.seed)
    for row in rows:
        others = [form for form in FORMS if form != "ours"]
        row["ratio_to"] = {other: ratio(rows, row["shape"], "step_seconds", row["form"], other) for other in others}
    del model
    release(meter.device)
    return rows


def row_of(shape: Shape, measured: Measured, flops: float, peak: float) -> dict[str, Any]:
    """A row of the report. tokens_per_second counts the L tokens of the sample once, whatever the form makes of them."""
    return {
        "form": measured.form,
        "shape": shape.name,
        "step_seconds": measured.median,
        "tokens_per_second": shape.length / measured.median,
        "peak_bytes": measured.peak_bytes,
        "attention": measured.attention,
        "bytes_before": measured.start_bytes,
        "spread": measured.spread,
        "seconds": measured.seconds,
        "loss": measured.loss,
        "model_flops": flops,
        "mfu": flops / measured.median / peak,
    }
