"""`diffvl bench train`: the time, speed and peak memory of one training step, in four forms, in one process.

In order: a proof that ours and the published form train the same thing (no figure without it), the forms over every shape, and
how the time grows with length and answer.
"""

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from diffvl.bench.comparison import Comparison, TrainRow
from diffvl.bench.equality import prove_same_training
from diffvl.bench.machine import describe_run, load_average, matmul_peak, pick_device
from diffvl.bench.random_model import QUICK_SCALE, SCALES, TrunkSize, build_model, resize
from diffvl.bench.scaling import FULL_PLAN, QUICK_PLAN, measure_scaling
from diffvl.bench.timing import Timer, spread, time_forms, top_kernels
from diffvl.bench.training_forms import FLOPS_FORMULA, FORMS, Shape, make_sample, parse_shapes, step_flops
from diffvl.config.objectives import BlockDiffusionObjective
from diffvl.config.resolve import parse
from diffvl.estimate.meter import memory_meter, release
from diffvl.terminal.bars import spinner_or_line

DEFAULT_SHAPES = "L3000-R300,L1000-R600,L512-R400"  # LLaVA-like, document, text
QUICK_SHAPES = "L64-R16,L48-R24"


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


def compare_training(request: TrainBench, console: Console) -> Comparison[TrainRow]:
    """Runs the whole comparison; progress goes to `console`. more: fits.

    Raises:
        UsageError, ConfigError: on arguments that do not fit together, before any work.
        TrainingError: if ours and the published form do not give the same loss and gradient.
    """
    device = pick_device(request.device)
    scale = QUICK_SCALE if request.quick else SCALES[device.type]
    size = resize(scale.trunk, request.layers, request.hidden)
    default_shapes = QUICK_SHAPES if request.quick else DEFAULT_SHAPES
    shapes = parse_shapes(default_shapes if request.shapes is None else request.shapes)
    settings = {"kind": "block_diffusion", "block_size": request.block_size, "context": request.context}
    objective = parse(BlockDiffusionObjective, settings, "diffvl bench train")
    timer = Timer(request.repeats or scale.rounds, request.seed, memory_meter(device), console)
    load_before = load_average()

    with spinner_or_line(console, "checking that ours and the published form train the same thing"):
        differences = prove_same_training(objective, device, request.seed)
        peak = matmul_peak(device, scale.dtype)
    run = describe_run(device, scale.dtype, load_before) | {
        "matmul_flops_per_second": peak,
        "memory_method": timer.meter.method,
        "model_flops": FLOPS_FORMULA,
        "relative_difference_to_published": differences,
        "trunk": vars(size),
        "settings": vars(request) | {"repeats": timer.rounds},
    }
    with spinner_or_line(console, f"building a trunk of {size.layers} layers of {size.hidden}"):
        model = build_model(size, device, scale.dtype, request.seed)
    rows = []
    for shape in shapes:
        rows += compare_forms(shape, model, size, objective, timer, peak, request.profile)
    del model
    release(device)
    fits: dict[str, Any] = {}
    if request.scaling:
        model = build_model(scale.scaling_trunk, device, scale.dtype, request.seed)
        fits = measure_scaling(model, objective, QUICK_PLAN if request.quick else FULL_PLAN, timer)
    return Comparison(run, rows, {"fits": fits})


def compare_forms(
    shape: Shape,
    model: Any,
    size: TrunkSize,
    objective: BlockDiffusionObjective,
    timer: Timer,
    peak: float,
    profile: bool,
) -> list[TrainRow]:
    """Measures every form at a shape.

    Args:
        peak: FLOPs per second that the machine reaches, of which the MFU is a part.
        profile: also name the kernels of a step of ours.
    """
    sample = make_sample(shape, objective, size.vocabulary, timer.device, timer.seed)
    timings = time_forms(model, sample, list(FORMS), timer, f"timing {shape.name}")
    kernels = top_kernels(model, sample, "ours", timer.device, timer.seed) if profile else None
    rows = []
    for form, timing in timings.items():
        flops = sum(step_flops(form, size, sample, draw) for draw in timer.draws) / timer.rounds
        rows.append(
            TrainRow(
                form=form,
                shape=shape.name,
                step_seconds=timing.median,
                tokens_per_second=shape.length / timing.median,
                peak_bytes=timing.peak_bytes,
                attention=timing.attention,
                bytes_before=timing.start_bytes,
                spread=spread(timing.seconds),
                seconds=timing.seconds,
                loss=timing.loss,
                model_flops=flops,
                mfu=flops / timing.median / peak,
                ratio_to={other: timing.median / timings[other].median for other in FORMS if other != "ours"},
                top_kernels=kernels if form == "ours" else None,
            )
        )
    return rows
