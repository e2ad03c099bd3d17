"""A vision-language configuration -> Verdict.

Place in the flow: `doctor.judge` comes here with what `supported.is_vlm` calls a vision-language model, and the survey with every
type. Order: what the static rule refuses, a tiny copy with a vision part, what `vlm_checks` measures on it.
"""

from dataclasses import replace

from transformers import PretrainedConfig, PreTrainedModel

from diffvl.config.supported import vlm_refusal
from diffvl.doctor.checks import MODEL_FAULTS, Check, describe_fault
from diffvl.doctor.timm_tower import has_timm_tower
from diffvl.doctor.tiny_copy import describe
from diffvl.doctor.tiny_vlm import build_vlm
from diffvl.doctor.verdict import Verdict, with_limit
from diffvl.doctor.vlm_checks import run_vlm_checks
from diffvl.doctor.vlm_pixels import images_of
from diffvl.errors import UnsupportedModelError

SPARE_TOKEN = "no row can be added to its tables, so its mask token must be an id below that its tokenizer leaves free"
OWN_FORWARD = "own forward"
MEANING = {
    OWN_FORWARD: "its tiny copy does not run",
    "AR parity": "under no rule of attention among image tokens do explicit masks give its own logits",
    "layout": "images and text cannot be laid out with noisy blocks behind them",
    "position ids": "its position ids are not those that it gives itself",
    "images show": "other images change nothing in its answers",
    "no leak": "a noisy block sees its own clean copy, later tokens or later images",
    "a leak is caught": "a wrong mask changes nothing, so its masks prove nothing",
    "block sees itself": "tokens of a noisy block do not see each other",
    "clean stream untouched": "clean tokens see noisy ones",
    "direct forward": "a noisy block is not what it is after its clean text alone",
    "train = decode": "decoding over a cache of keys and values gives other logits than training",
    "image cut in two": "an image that goes in with two forwards is not what it is in one",
    "packed in one row": "a sample is not alone what it is beside another one",
    "head on some rows": "its head cannot be asked for single positions",
    "head in chunks": "its head cannot be asked apart from the rest of the model, as the loss asks it",
    "gradients": "its gradients cannot be used",
    "new token": "its table of embeddings cannot grow",
}


def judge_vlm(model: str, config: PretrainedConfig) -> Verdict:
    """Judges the configuration of a vision-language model."""
    kind = config.model_type
    if refused := vlm_refusal(config):
        return Verdict(model, kind, "not supported", refused.kind, refused.message)
    verdict = Verdict(model, kind, "supported")
    try:
        source = build_vlm(config)
        pixels = images_of(source)
        verdict = replace(verdict, copy=_describe(source), image_inputs=tuple(pixels))
        findings = run_vlm_checks(source, pixels)
    except (UnsupportedModelError, *MODEL_FAULTS) as error:
        message = f"{kind}: no tiny copy of it could be built and shown an image ({describe_fault(error)})"
        return replace(verdict, answer="unknown", kind="no tiny copy", reason=message)
    verdict = replace(verdict, checks=tuple(findings.checks), image_attention=findings.rule)
    return with_limit(_answered(verdict), config)


def _answered(verdict: Verdict) -> Verdict:
    """Says what the checks mean."""
    failed = {check.name: check for check in verdict.checks if not check.passed}
    if not failed:
        return verdict
    if failed.keys() == {"new token"}:
        return replace(verdict, reason=SPARE_TOKEN)
    name, check = next(iter(failed.items()))
    reason = f"{verdict.model_type}: {MEANING[name]} ({_size(check)})"
    if name == OWN_FORWARD:
        return replace(verdict, answer="unknown", kind="no tiny copy", reason=reason)
    return replace(verdict, answer="not supported", kind=MEANING[name], reason=reason)


def _size(check: Check) -> str:
    return check.fault if check.error is None else f"{check.error:.2g} std of the logits"


def _describe(source: PreTrainedModel) -> str:
    words = describe(source)
    return f"{words}; its tower, of the library timm, replaced by a stand-in" if has_timm_tower(source.config) else words
