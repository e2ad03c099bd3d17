"""The study as tables: the four ways to draw noise stand side by side."""

from collections.abc import Callable, Sequence
from typing import Any

from diffvl.bench.tables import Table
from tools.variance.study import ExactFigures, SampledFigures, Study

SHORT = {"synchronous": "sync", "independent": "async", "stratified": "strat", "complementary": "compl"}


def tables(study: Study) -> list[Table]:
    """Returns what is printed, in order: the machine, the exact figures, the sampled ones."""
    machine, settings = study.machine, study.settings
    facts = {
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; {machine['date']}",
        "software": f"torch {machine['torch']}, transformers {machine['transformers']}",
        "run": f"answers of {settings['answer_tokens']} tokens, {settings['samples']} gradients for each sampled figure, "
        f"seed {settings['seed']}",
        "sync ... compl": "trace of the covariance over squared norm of the mean; of the gradient, or of the loss if it says so",
        "scale, cosine": "mean gradient against the bound's: length along it, and angle; async, then complementary",
        "masked, empty": "share of the answer masked in a forward, share of blocks without a mask; async",
    }
    keys = ["D", "schedule", "weight", *SHORT.values()]
    exact_headings = [*(f"loss {name}" for name in SHORT.values()), "scale", "cosine", "masked", "empty"]
    return [
        (["", ""], list(facts.items())),
        (["exact", *keys, *exact_headings], _lines(study.exact, _exact_cells)),
        (["sampled", *keys, "scale", "cosine", "masked", "tokens"], _lines(study.sampled, _sampled_cells)),
    ]


def _lines(figures: Sequence[Any], cells_of: Callable[[dict[str, Any]], list[str]]) -> list[tuple[str, ...]]:
    """Joins the ways to draw of each model, block size, schedule and weight to one line."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for one in figures:
        groups.setdefault((one.model, str(one.block_size), one.schedule, one.weight), {})[one.draws] = one
    return [(*keys, *cells_of(group)) for keys, group in groups.items()]


def _exact_cells(by_draws: dict[str, ExactFigures]) -> list[str]:
    alone = by_draws["independent"]
    return [
        *(f"{by_draws[draws].noise_to_signal:.3f}" for draws in SHORT),
        *(f"{by_draws[draws].loss_noise_to_signal:.4f}" for draws in SHORT),
        *_bias_cells(by_draws),
        f"{alone.masked_share:.2f}",
        f"{alone.blocks_without_mask:.3f}",
    ]


def _sampled_cells(by_draws: dict[str, SampledFigures]) -> list[str]:
    alone, two = by_draws["independent"], by_draws["complementary"]
    return [
        *(f"{by_draws[draws].noise_to_signal:.2f} ± {by_draws[draws].standard_error:.2f}" for draws in SHORT),
        *_bias_cells(by_draws),
        f"{alone.masked_share:.2f} {two.masked_share:.2f}",
        f"{alone.tokens_per_forward:.0f} {two.tokens_per_forward:.0f}",
    ]


def _bias_cells(by_draws: dict[str, Any]) -> list[str]:
    pair = (by_draws["independent"], by_draws["complementary"])
    return [" ".join(f"{one.scale:.2f}" for one in pair), " ".join(f"{one.cosine:.3f}" for one in pair)]
