"""Verdicts of a survey -> docs/architectures.md: a chapter on language models and one on vision-language models.

Invariant: no type is called supported that was not probed, and every type stands in one section of its chapter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from diffvl.doctor.verdict import Verdict
from diffvl.machine import versions
from diffvl.store.files import replace_text

INTRODUCTION = """\
Written by `diffvl doctor --all --out {out}` on {date} with transformers {transformers}, torch {torch}, Python {python};
do not edit.

Each type is probed as a tiny random fp32 copy of its *default* configuration, with every kind of layer, window, rope, head and
expert that it has. Errors are in standard deviations of the logits, and must lie below 0.001. A checkpoint's own configuration
may differ from the default one: `diffvl doctor MODEL` reads it.
"""
LANGUAGE_MODELS = """\
One row for each model type that `AutoModelForCausalLM` knows and that is no vision-language model. Probed are an explicit causal
mask against the model's own forward; no leak, and a leaking mask that must be noticed; noisy blocks against a direct forward and
against the doubled layout; training against decoding over the block cache; embeddings, the head on some rows and in chunks,
gradients, a new token. Types that can be encoders too are taken as decoders (`is_decoder: true`).
"""
VISION_LANGUAGE_MODELS = """\
One row for each model type that `AutoModelForImageTextToText` knows. Probed as above, in the form in which it is exported, with
two images in the prompts, which go through the vision part of the copy: explicit masks and the model's own position ids against
its own forward, which also tells how its image tokens see each other; images before an answer and after one, cut inside a block,
cut into two forwards; several samples in one row; frozen vision. Where image tokens see each other both ways, the images are
longer than the window, since shorter ones would not show how span and window meet.

`causal`: image tokens see each other as any tokens do. `runs`: both ways inside a run of image tokens, as far as the window
reaches; `runs_beyond_window`: whatever the window; `runs_sliding`: in layers with a window only. `images`: all image tokens
between two answers are one such run. `prompt`: so is everything between two answers, whatever the window.
"""
Column = tuple[str, Callable[[Verdict], str]]


@dataclass(frozen=True)
class Chapter:
    """classes: model type -> name of its class in transformers. more: columns about supported types."""

    title: str
    introduction: str
    verdicts: Sequence[Verdict]
    classes: Mapping[str, object]
    more: tuple[Column, ...] = ()

    def where(self, answer: str) -> list[Verdict]:
        """Lists the verdicts with an answer."""
        return [verdict for verdict in self.verdicts if verdict.answer == answer]

    def named(self, verdict: Verdict) -> tuple[str, str]:
        """Gives the first cells of a row: type and class."""
        return f"`{verdict.model_type}`", str(self.classes[verdict.model_type])


IMAGE_COLUMNS: tuple[Column, ...] = (
    ("images as", lambda verdict: ", ".join(verdict.image_inputs)),
    ("image tokens", lambda verdict: verdict.image_attention),
)


def write_page(verdicts: Sequence[Verdict], vlm_verdicts: Sequence[Verdict], file: Path) -> None:
    """Writes the page whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, page(verdicts, vlm_verdicts, file))


def page(verdicts: Sequence[Verdict], vlm_verdicts: Sequence[Verdict], file: Path) -> str:
    """Writes the survey as markdown."""
    facts = {
        "out": file.as_posix() if not file.is_absolute() else file.name,
        "date": datetime.now(UTC).date().isoformat(),
        **versions(),
    }
    chapters = [
        Chapter("Language models", LANGUAGE_MODELS, verdicts, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        Chapter(
            "Vision-language models",
            VISION_LANGUAGE_MODELS,
            vlm_verdicts,
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
            IMAGE_COLUMNS,
        ),
    ]
    parts = ["# Which architectures take block diffusion\n", INTRODUCTION.format(**facts)]
    for chapter in chapters:
        parts += [f"# {chapter.title}\n", chapter.introduction, _counts(chapter), _supported(chapter), _almost(chapter)]
        parts += [_refused(chapter), _unknown(chapter)]
    return "\n".join(part for part in parts if part)


def _counts(chapter: Chapter) -> str:
    good, bad = chapter.where("supported"), chapter.where("not supported")
    errors = [verdict.worst_error for verdict in good if verdict.worst_error is not None]
    smallest = [largest for verdict in bad if not verdict.attention_holds and (largest := verdict.worst_error) is not None]
    rows = [
        ("model types", str(len(chapter.verdicts))),
        ("supported", str(len(good))),
        ("not supported", str(len(bad))),
        ("of these, attention passes", str(sum(verdict.attention_holds for verdict in bad))),
        ("unknown", str(len(chapter.where("unknown")))),
        ("largest error of a supported one", f"{max(errors, default=0.0):.1e}"),
    ]
    rows += [("smallest error of one whose attention fails", f"{min(smallest):.2g}")] if smallest else []
    return _table(("figure", "value"), rows)


def _supported(chapter: Chapter) -> str:
    rows = [
        (
            *chapter.named(verdict),
            verdict.copy,
            *(cell(verdict) for _, cell in chapter.more),
            f"{verdict.worst_error:.1e}",
            verdict.reason,
        )
        for verdict in chapter.where("supported")
    ]
    headings = ("model type", "class", "probed as", *(heading for heading, _ in chapter.more), "worst error", "limit")
    return "## Supported\n\n" + _table(headings, rows)


def _almost(chapter: Chapter) -> str:
    rows = [
        (*chapter.named(verdict), verdict.copy, verdict.kind)
        for verdict in chapter.where("not supported")
        if verdict.attention_holds
    ]
    introduction = "Masks and positions steer these as they should; something else stands in the way (next section).\n\n"
    title = "## Attention passes, refused for another reason\n\n"
    return title + introduction + _table(("model type", "class", "probed as", "why"), rows) if rows else ""


def _refused(chapter: Chapter) -> str:
    refused = chapter.where("not supported")
    parts = ["## Not supported\n"]
    for kind in sorted({verdict.kind for verdict in refused}):
        rows = [(*chapter.named(verdict), _error(verdict), verdict.reason) for verdict in refused if verdict.kind == kind]
        parts.append(
            f"### {kind[0].upper()}{kind[1:]} ({len(rows)})\n\n{_table(('model type', 'class', 'worst error', 'why'), rows)}"
        )
    return "\n".join(parts)


def _unknown(chapter: Chapter) -> str:
    rows = [(*chapter.named(verdict), verdict.reason) for verdict in chapter.where("unknown")]
    introduction = (
        "The tiny copy could not be made or run, so nothing is claimed; `diffvl doctor` on a real checkpoint may do better.\n\n"
    )
    return "## Unknown\n\n" + introduction + _table(("model type", "class", "what happened"), rows)


def _error(verdict: Verdict) -> str:
    return "-" if verdict.worst_error is None else f"{verdict.worst_error:.2g}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *([cell.replace("|", "\\|") or "-" for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n" if rows else "None.\n"
