"""MODEL -> Verdict: whether block diffusion can be put on it, and why not, in a user's words.

Place in the flow: a question before `convert`. Read are configuration, tokenizer and the headers of the weight files; what is
probed is a tiny random copy of the configuration, so the answer takes a second and no weights. Order: what `published` and
`supported` refuse, what is wrong with the files, what `checks` measures and, where one of them fails, a few experiments that tell
why; then the chat template.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from diffvl.config.families import diffusion_source, family_of_trunk, named_checkpoint, require_known
from diffvl.config.supported import OWN_CODE, Refusal, is_vlm, refusal
from diffvl.doctor.checks import MODEL_FAULTS, Check, describe_fault, run_checks
from diffvl.doctor.plain_forward import Token, plain_forward, tokens_of
from diffvl.doctor.tiny_copy import FIRST_ORDINARY, build, describe, ordinary_tokens, probe_text
from diffvl.doctor.verdict import Support, Verdict, with_limit
from diffvl.doctor.vlm_verdict import judge_vlm
from diffvl.errors import CheckpointError, UnsupportedModelError
from diffvl.prepare.attention_proof import TOLERANCE, conversations, native_logits, spread
from diffvl.prepare.processor import read_native_processor
from diffvl.prepare.released import read_released_parts, released_settings
from diffvl.prepare.source import Source
from diffvl.prepare.templates import TOKENIZER_FILES, look_at_template
from diffvl.store import weights
from diffvl.store.checkpoint import DiffVLConfig  # importing it makes DiffVL directories known to transformers
from diffvl.store.published import load_config
from diffvl.store.tensorfiles import has_weights

ONLY_CONFIGURATION = "there are no weights beside config.json: only the architecture was judged"

# Refused for what the rest of diffvl cannot do yet: whether their attention follows masks is worth measuring all the same.
MEASURED_ANYWAY = {
    "vision-language model of another kind",
    "per-layer embeddings: not in yet",
    "audio model",
    "no position_ids",
    OWN_CODE,
}
FILES = "its files"


# --- one model -----------------------------------------------------------------------------------------------------------


def examine(model: str, trust_remote_code: bool = False) -> Verdict:
    """Judges a name of `diffvl models`, a hub id, a directory (a DiffVL one: on its trunk) or a .gguf file.

    Raises:
        UsageError: for a name that is none of these.
        CheckpointError: if its configuration is missing, damaged or cannot be fetched.
    """
    start = time.perf_counter()
    require_known(model)
    named = named_checkpoint(model)
    repo, revision = (named[1].repo, named[1].revision) if named else (model, None)
    try:
        config = load_config(repo, trust_remote_code, revision)
    except UnsupportedModelError as error:
        verdict = Verdict(model, "", "not supported", error.kind or "unknown to transformers", str(error))
    except MODEL_FAULTS as error:
        verdict = Verdict(model, "", "unknown", "no configuration", f"its configuration cannot be read: {describe_fault(error)}")
    else:
        against = _against_files(repo, config, revision)
        if isinstance(against, Refusal):
            kind = family_of_trunk(config).model_type
            verdict = Verdict(model, kind, "not supported", against.kind, against.message)
        else:
            verdict = judge(model, config, trust_remote_code)
            verdict = replace(verdict, reason="; ".join(filter(None, [verdict.reason, against])))
            if verdict.answer == "supported" and against != ONLY_CONFIGURATION:
                if is_vlm(config):
                    verdict = _with_template(verdict, repo, lambda: _look_at_processor(repo, config, trust_remote_code, revision))
                else:
                    given = (repo, verdict.model_type, trust_remote_code, revision)
                    verdict = _with_template(verdict, repo, lambda: look_at_template(*given))
    return replace(verdict, seconds=time.perf_counter() - start)


def _against_files(repo: str, config: PretrainedConfig, revision: str | None) -> Refusal | str:
    """Tells what stands against the files of a checkpoint whose configuration is not refused, or a remark, or nothing."""
    if isinstance(config, DiffVLConfig) or refusal(config) is not None:
        return ""
    if Path(repo).is_dir() and not has_weights(Path(repo)):
        return ONLY_CONFIGURATION
    try:
        source = Source(repo, revision)
        if (settings := released_settings(source)) is not None:
            read_released_parts(source, config, settings)
        else:
            check = weights.check_vlm if is_vlm(config) else weights.check_trunk
            check(repo, config, revision)
    except (CheckpointError, UnsupportedModelError) as error:
        return Refusal(getattr(error, "kind", FILES), str(error))
    return ""


def _with_template(verdict: Verdict, repo: str, look: Callable[[], str]) -> Verdict:
    """Judges the chat template or the processor of a model whose architecture is supported; `look` tells what there is to
    know."""
    try:
        return replace(verdict, template=look())
    except (CheckpointError, UnsupportedModelError) as error:
        fetched = isinstance(error, UnsupportedModelError) or Path(repo).exists()
        kind = getattr(error, "kind", "") or "chat template"
        return replace(verdict, answer="not supported" if fetched else "unknown", kind=kind, reason=str(error))


def _look_at_processor(repo: str, config: PretrainedConfig, trust_remote_code: bool, revision: str | None) -> str:
    """Gives for a vision-language model what `look_at_template` gives for a language model."""
    if Path(repo).is_dir() and not any((Path(repo) / name).is_file() for name in TOKENIZER_FILES):
        return "no tokenizer beside it, so its processor was not looked at"
    _, facts = read_native_processor(repo, revision, trust_remote_code, config=config)
    return "; ".join(facts.advice)


def judge(model: str, config: PretrainedConfig, trust_remote_code: bool = False) -> Verdict:
    """Judges a configuration."""
    if isinstance(config, DiffVLConfig):
        config = config.source_config or config.text_config
    if is_vlm(config):
        return judge_vlm(model, config)
    kind = family_of_trunk(config).model_type
    refused = refusal(config)
    verdict = Verdict(model, kind, "supported", reason=_translated(config))
    if refused is not None:
        verdict = replace(verdict, answer="not supported", kind=refused.kind, reason=refused.message)
        if refused.kind not in MEASURED_ANYWAY:
            return verdict
    try:
        trunk = build(config, trust_remote_code)
        verdict = replace(verdict, copy=describe(trunk), checks=tuple(run_checks(trunk)))
    except (UnsupportedModelError, *MODEL_FAULTS) as error:
        if refused is not None:
            return verdict
        message = f"{kind}: no tiny copy of it could be built ({describe_fault(error)})"
        return replace(verdict, answer="unknown", kind="no tiny copy", reason=message)
    if refused is not None:
        return verdict
    if not all(check.passed for check in verdict.checks):
        # A new copy: the probe has grown the table of the first.
        answer, found = diagnose(build(config, trust_remote_code), verdict.checks)
        return replace(verdict, answer=answer, kind=found.kind, reason=f"{kind}: {found.message}")
    return with_limit(verdict, config)


def _translated(config: PretrainedConfig) -> str:
    """Tells as what a diffusion language model is read; empty for others."""
    source = diffusion_source(config)
    if source is None:
        return ""
    sight = "all tokens see each other" if source.block_size is None else f"blocks of {source.block_size}"
    return (
        f"a diffusion language model, read as a stock {config.model_type}: target {source.target}, mask token "
        f"{source.mask_token_id}, {sight}"
    )


# --- why not -------------------------------------------------------------------------------------------------------------


def diagnose(trunk: PreTrainedModel, checks: tuple[Check, ...]) -> tuple[Support, Refusal]:
    """Finds the reason for failed checks, by experiments on the copy."""
    failed = {check.name: check for check in checks if not check.passed}
    try:
        if not bool(native_logits(trunk, conversations(ordinary_tokens(trunk))[0]).isfinite().all()):
            return "unknown", Refusal("no tiny copy", "its tiny copy gives logits that are no finite numbers")
    except MODEL_FAULTS as error:
        return "unknown", Refusal("no tiny copy", f"its tiny copy does not run ({describe_fault(error)})")
    if all(check.fault for check in failed.values()) and "AR parity" in failed:
        fault = failed["AR parity"].fault
        message = f"its code takes no mask with an entry for every two tokens (it said: {fault})"
        return "not supported", Refusal("takes no 4-D mask", message)
    for experiment in EXPERIMENTS:
        if found := experiment(trunk, failed):
            return "not supported", found
    return "not supported", _by_name(failed)


def _by_name(failed: dict[str, Check]) -> Refusal:
    """Puts the first failed check in words, where no experiment knows better."""
    meaning = {
        "AR parity": "with an explicit causal mask its logits are not its own",
        "no leak": "a noisy block sees its own clean copy or later tokens",
        "a leak is caught": "a wrong mask changes nothing, so its masks prove nothing",
        "block sees itself": "tokens of a noisy block do not see each other",
        "clean stream untouched": "clean tokens see noisy ones",
        "direct forward": "a noisy block is not what it is after its clean text alone",
        "doubled layout": "the short layout is not the doubled one",
        "train = decode": "decoding over a cache of keys and values gives other logits than training",
        "embeddings given": "it does not take embeddings in the place of tokens, so images cannot be shown to it",
        "head on some rows": "its head cannot be asked for single positions",
        "head in chunks": "its head cannot be asked apart from the rest of the model, as the loss asks it",
        "gradients": "its gradients cannot be used",
        "new token": "its table of embeddings cannot grow, so it can have no mask token",
    }
    name, check = next(iter(failed.items()))
    size = f"by {check.error:.2g} std of the logits" if check.error is not None else check.fault
    return Refusal(meaning[name], f"{meaning[name]} ({size})")


def _line(trunk: PreTrainedModel) -> list[Token]:
    """Gives the clean text of the first sample."""
    return [token for token in tokens_of(probe_text(trunk, "causal")) if not token.noisy]


def _causal(q: Token, k: Token) -> bool:
    return k.position <= q.position


@torch.no_grad()
def _looks_ahead(trunk: PreTrainedModel, failed: dict[str, Check]) -> Refusal | None:
    ids = conversations(ordinary_tokens(trunk))[0][:1]
    other = ids.clone()
    other[0, -1] = FIRST_ORDINARY + (other[0, -1] == FIRST_ORDINARY)
    before = native_logits(trunk, ids)
    moved = spread((native_logits(trunk, other) - before)[:, :-1], before)
    if not moved > TOLERANCE:
        return None
    hint = "; as a decoder it needs is_decoder: true" if getattr(trunk.config, "is_decoder", True) is False else ""
    message = f"it is not autoregressive: its own tokens see later ones (they move by {moved:.2g} std){hint}"
    return Refusal("not autoregressive", message)


@torch.no_grad()
def _ignores_masks(trunk: PreTrainedModel, failed: dict[str, Check]) -> Refusal | None:
    causal = plain_forward(trunk, _line(trunk), _causal)
    alone = plain_forward(trunk, _line(trunk), lambda q, k: q.position == k.position)
    if not spread(causal - alone, causal) <= TOLERANCE:
        return None
    return Refusal("ignores the mask", "it ignores the attention mask that it is given")


@torch.no_grad()
def _keeps_causal(trunk: PreTrainedModel, failed: dict[str, Check]) -> Refusal | None:
    tokens = _line(trunk)[-4:]
    tokens = [replace(token, position=number) for number, token in enumerate(tokens)]
    other = [*tokens[:-1], replace(tokens[-1], id=FIRST_ORDINARY + (tokens[-1].id == FIRST_ORDINARY))]
    before, after = (plain_forward(trunk, line, lambda q, k: True) for line in (tokens, other))
    if not spread((after - before)[0], before) <= TOLERANCE:
        return None
    message = "it keeps a causal mask of its own, whatever mask it is given: the tokens of a noisy block cannot see each other"
    return Refusal("causal mask of its own", message)


@torch.no_grad()
def _other_positions(trunk: PreTrainedModel, failed: dict[str, Check]) -> Refusal | None:
    tokens = _line(trunk)
    spaced = [replace(token, position=3 * token.position) for token in tokens]
    causal = plain_forward(trunk, tokens, _causal)
    if "direct forward" in failed and spread(plain_forward(trunk, spaced, _causal) - causal, causal) < TOLERANCE:
        message = "it ignores position_ids, but a noised block must stand at the positions of its clean copy"
        return Refusal("ignores position_ids", message)
    if "AR parity" not in failed:
        return None
    native = native_logits(trunk, torch.tensor([[token.id for token in tokens]]))[0]
    if spread(causal - native, native) < TOLERANCE:
        return None
    first = (getattr(trunk.config, "pad_token_id", None) or 0) + 1
    shifted = plain_forward(trunk, [replace(token, position=token.position + first) for token in tokens], _causal)
    if not spread(shifted - native, native) <= TOLERANCE:
        return None
    message = "its positions do not start at 0 but one after pad_token_id, as in RoBERTa; diffvl gives positions from 0"
    return Refusal("positions that do not start at 0", message)


EXPERIMENTS: tuple[Callable[[PreTrainedModel, dict[str, Check]], Refusal | None], ...] = (
    _looks_ahead,
    _ignores_masks,
    _keeps_causal,
    _other_positions,
)
