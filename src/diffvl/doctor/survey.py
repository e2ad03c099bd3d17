"""Every causal-LM model type of the installed transformers -> its verdict -> docs/architectures.md.

Place in the flow: `diffvl doctor --all`. Each type is judged by `doctor` on its default configuration. Invariant: no model can
spoil the survey. They run in a child process, one after the other; a model that ends the process or takes too long costs its own
verdict ("unknown", with what happened), and a new child goes on with the next.
"""

import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from diffvl.doctor.checks import MODEL_FAULTS, describe_fault
from diffvl.doctor.doctor import Verdict, judge
from diffvl.machine import versions
from diffvl.store.files import replace_text
from diffvl.terminal.bars import track

SECONDS_PER_MODEL = 120.0  # measured: less than a second each
SECONDS_TO_START = 300.0  # of a child, which imports torch and transformers

# What default configurations leave open although the class needs it, or leave out although its checkpoints have it.
_ROPE = {"rope_type": "default", "rope_theta": 50_000.0}
COMPLETIONS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 500_000.0, "kv_n_heads": 8, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 30},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
}


def model_types() -> list[str]:
    """Lists every causal-LM model type that the installed transformers knows, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def default_config(model_type: str) -> transformers.PretrainedConfig:
    """Gives the default configuration, as a decoder where the type can be an encoder too."""
    config = transformers.CONFIG_MAPPING[model_type](**COMPLETIONS.get(model_type, {}))
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def judge_type(model_type: str) -> Verdict:
    """Judges a model type's default configuration."""
    start = time.perf_counter()
    try:
        config = default_config(model_type)
    except MODEL_FAULTS as error:
        message = f"{model_type}: its default configuration cannot be made ({describe_fault(error)})"
        return Verdict(model_type, model_type, "unknown", "no configuration", message)
    found = judge(model_type, config)
    return Verdict(**{**vars(found), "model_type": model_type, "seconds": time.perf_counter() - start})


# --- the survey ----------------------------------------------------------------------------------------------------------


Judge = Callable[[str], Verdict]


def survey(
    types: Sequence[str], console: Console, seconds: float = SECONDS_PER_MODEL, judged_by: Judge = judge_type
) -> list[Verdict]:
    """Judges each type, whatever it does to the process that judges it; `judged_by` must be importable there."""
    with _children(judged_by) as ask:
        return [ask(model_type, seconds) for model_type in track(console, types, len(types), "probing")]


@contextmanager
def _children(judged_by: Judge) -> Iterator[Callable[[str, float], Verdict]]:
    """Yields `ask(model_type, seconds)`; a child process is there when it is needed, and gone at the end."""
    child: Child | None = None

    def ask(model_type: str, seconds: float) -> Verdict:
        nonlocal child
        child = child or Child(judged_by)
        answer = child.ask(model_type, seconds)
        if isinstance(answer, Verdict):
            return answer
        child.end()
        child = None
        return Verdict(model_type, model_type, "unknown", "no answer", f"{model_type}: {answer}")

    try:
        yield ask
    finally:
        if child is not None:
            child.end()


class Child:
    """A process that judges one model type after the other."""

    def __init__(self, judged_by: Judge) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share torch's threads
        self.connection, child_end = context.Pipe()
        self.process = context.Process(target=serve, args=(child_end, judged_by), daemon=True)
        self.process.start()
        child_end.close()
        if not self.connection.poll(SECONDS_TO_START) or self._received() != "ready":
            self.end()
            raise RuntimeError("the process that probes models did not start")

    def ask(self, model_type: str, seconds: float) -> Verdict | str:
        """Gives the verdict, or what happened instead."""
        self.connection.send(model_type)
        if not self.connection.poll(seconds):
            return f"no answer within {seconds:g} s"
        answer = self._received()
        if isinstance(answer, Verdict):
            return answer
        self.process.join()
        return f"it ended the process that probed it (exit code {self.process.exitcode})"

    def _received(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            return None

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def serve(connection: Connection, judged_by: Judge) -> None:
    """Works as the child: model types in, verdicts out, in silence, until the other end is closed."""
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(silence, stream.fileno())
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    connection.send("ready")
    while True:
        try:
            model_type = connection.recv()
        except EOFError:
            return
        connection.send(judged_by(model_type))


# --- the page ------------------------------------------------------------------------------------------------------------

INTRODUCTION = """\
# Which architectures take block diffusion

Written by `diffvl doctor --all --out {out}` on {date} with transformers {transformers}, torch {torch}, Python {python};
do not edit.

One row for each model type that `AutoModelForCausalLM` knows. Each is probed as a tiny random fp32 copy of its *default*
configuration, with every kind of layer, window, rope, head and expert that it has: an explicit causal mask against the model's
own forward; no leak, and a leaking mask that must be noticed; noisy blocks against a direct forward and against the doubled
layout; training against decoding over the block cache; embeddings, the head on some rows and in chunks, gradients, a new token.
Errors are in standard deviations of the logits, and must lie below 0.001. Types that can be encoders too are taken as decoders
(`is_decoder: true`). A checkpoint's own configuration may differ from the default one: `diffvl doctor MODEL` reads it.
"""


def write_page(verdicts: Sequence[Verdict], file: Path) -> None:
    """Writes the page whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, page(verdicts, file))


def page(verdicts: Sequence[Verdict], file: Path) -> str:
    """Writes the survey as markdown."""
    facts = {
        "out": file.as_posix() if not file.is_absolute() else file.name,
        "date": datetime.now(UTC).date().isoformat(),
        **versions(),
    }
    parts = [INTRODUCTION.format(**facts), _counts(verdicts), _supported(verdicts), _almost(verdicts)]
    parts += [_refused(verdicts), _unknown(verdicts)]
    return "\n".join(parts)


def _with_answer(verdicts: Sequence[Verdict], answer: str) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.answer == answer]


def _counts(verdicts: Sequence[Verdict]) -> str:
    good, bad = _with_answer(verdicts, "supported"), _with_answer(verdicts, "not supported")
    errors = [verdict.worst_error for verdict in good if verdict.worst_error is not None]
    smallest = [largest for verdict in bad if not verdict.attention_holds and (largest := verdict.worst_error) is not None]
    rows = [
        ("model types", len(verdicts)),
        ("supported", len(good)),
        ("not supported", len(bad)),
        ("of these, attention passes", sum(verdict.attention_holds for verdict in bad)),
        ("unknown", len(_with_answer(verdicts, "unknown"))),
        ("largest error of a supported one", f"{max(errors, default=0.0):.1e}"),
        ("smallest error of one whose attention fails", f"{min(smallest, default=0.0):.2g}"),
    ]
    return _table(("figure", "value"), [(name, str(value)) for name, value in rows])


def _supported(verdicts: Sequence[Verdict]) -> str:
    rows = [
        (f"`{verdict.model_type}`", _class(verdict), verdict.copy, f"{verdict.worst_error:.1e}", verdict.reason)
        for verdict in _with_answer(verdicts, "supported")
    ]
    return "## Supported\n\n" + _table(("model type", "class", "probed as", "worst error", "limit"), rows)


def _almost(verdicts: Sequence[Verdict]) -> str:
    rows = [
        (f"`{verdict.model_type}`", _class(verdict), verdict.copy, verdict.kind)
        for verdict in _with_answer(verdicts, "not supported")
        if verdict.attention_holds
    ]
    introduction = "Masks and positions steer these as they should; something else stands in the way (next section).\n\n"
    return (
        "## Attention passes, refused for another reason\n\n"
        + introduction
        + _table(("model type", "class", "probed as", "why"), rows)
    )


def _refused(verdicts: Sequence[Verdict]) -> str:
    refused = _with_answer(verdicts, "not supported")
    kinds = sorted({verdict.kind for verdict in refused})
    parts = ["## Not supported\n"]
    for kind in kinds:
        of_kind = [verdict for verdict in refused if verdict.kind == kind]
        rows = [(f"`{verdict.model_type}`", _class(verdict), _error(verdict), verdict.reason) for verdict in of_kind]
        parts.append(
            f"### {kind[0].upper()}{kind[1:]} ({len(rows)})\n\n{_table(('model type', 'class', 'worst error', 'why'), rows)}"
        )
    return "\n".join(parts)


def _unknown(verdicts: Sequence[Verdict]) -> str:
    rows = [(f"`{verdict.model_type}`", _class(verdict), verdict.reason) for verdict in _with_answer(verdicts, "unknown")]
    introduction = (
        "The tiny copy could not be made or run, so nothing is claimed; `diffvl doctor` on a real checkpoint may do better.\n\n"
    )
    return "## Unknown\n\n" + introduction + _table(("model type", "class", "what happened"), rows)


def _class(verdict: Verdict) -> str:
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[verdict.model_type])


def _error(verdict: Verdict) -> str:
    return "-" if verdict.worst_error is None else f"{verdict.worst_error:.2g}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *([cell.replace("|", "\\|") or "-" for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n" if rows else "None.\n"
