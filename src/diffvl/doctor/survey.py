"""Every model type of the installed transformers, language models and vision-language models -> its verdict.

Place in the flow: `diffvl doctor --all`; `page` makes docs/architectures.md of the verdicts. Each type is judged by `doctor` on
its default configuration. Invariant: no model can spoil the survey. They run in a child process, one after the other; a model
that ends the process or takes too long costs its own verdict ("unknown", with what happened), and a new child goes on with the
next.
"""

import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from diffvl.config.supported import is_vlm
from diffvl.doctor.checks import MODEL_FAULTS, describe_fault
from diffvl.doctor.doctor import judge
from diffvl.doctor.verdict import Verdict
from diffvl.doctor.vlm_defaults import default_vlm_config
from diffvl.doctor.vlm_verdict import judge_vlm
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
    """Lists every causal-LM model type that the installed transformers knows, in alphabetical order, but for those that are
    vision-language models."""
    both = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(vlm_types())
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - {kind for kind in both if is_vlm(default_config(kind))})


def vlm_types() -> list[str]:
    """Lists every image-text-to-text model type that the installed transformers knows, in alphabetical order."""
    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def default_config(model_type: str) -> transformers.PretrainedConfig:
    """Gives the default configuration, as a decoder where the type can be an encoder too."""
    config = transformers.CONFIG_MAPPING[model_type](**COMPLETIONS.get(model_type, {}))
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def judge_type(model_type: str) -> Verdict:
    """Judges a model type's default configuration."""
    return _judged(model_type, default_config, judge)


def judge_vlm_type(model_type: str) -> Verdict:
    """Judges a vision-language type's default configuration."""
    return _judged(model_type, default_vlm_config, judge_vlm)


def _judged(
    model_type: str,
    make: Callable[[str], transformers.PretrainedConfig],
    judged_by: Callable[[str, transformers.PretrainedConfig], Verdict],
) -> Verdict:
    start = time.perf_counter()
    try:
        config = make(model_type)
    except MODEL_FAULTS as error:
        message = f"{model_type}: its default configuration cannot be made ({describe_fault(error)})"
        return Verdict(model_type, model_type, "unknown", "no configuration", message)
    found = judged_by(model_type, config)
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
