"""What `doctor` says of a model: `Verdict`, in a user's words and in figures."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from transformers import PretrainedConfig

from diffvl.doctor.checks import Check
from diffvl.prepare.attention_proof import largest

Support = Literal["supported", "not supported", "unknown"]
NOT_ATTENTION = {"embeddings given", "head on some rows", "head in chunks", "new token"}


@dataclass(frozen=True)
class Verdict:
    """kind: the reason in a few words, the same for all models that it applies to. reason: in full. limit: tokens, clean and
    noisy together, beyond which it no longer holds. copy: what was probed. seconds: for everything. template: what else there is
    to know about the chat template. image_inputs: of a vision-language model, the tensors that say what its images are.
    image_attention: how its image tokens see each other, one of the hub's IMAGE_ATTENTION."""

    model: str
    model_type: str
    answer: Support
    kind: str = ""
    reason: str = ""
    limit: int | None = None
    copy: str = ""
    checks: tuple[Check, ...] = ()
    seconds: float = 0.0
    template: str = ""
    image_inputs: tuple[str, ...] = ()
    image_attention: str = ""

    @property
    def attention_holds(self) -> bool:
        """Whether every check of attention was made and passed, whatever else stands against the model."""
        made = [check for check in self.checks if check.name not in NOT_ATTENTION]
        return bool(made) and all(check.passed for check in made)

    @property
    def worst_error(self) -> float | None:
        """The largest of the errors that must vanish; None where none was measured."""
        errors = [check.error for check in self.checks if check.error is not None and check.wanted.startswith("<")]
        return largest(errors) if errors else None

    def as_json(self) -> dict[str, Any]:
        """Gives all figures, without infinities, which JSON does not know."""
        figures = asdict(self) | {"attention_holds": self.attention_holds, "worst_error": self.worst_error}
        figures["seconds"] = round(self.seconds, 3)
        return _finite(figures)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_limit(verdict: Verdict, config: PretrainedConfig) -> Verdict:
    """Tells of a supported model how long what was proven holds."""
    if found := exact_up_to(config):
        message = f"exact while clean and noisy tokens together are at most {found[1]:,} ({found[0]} in its config.json)"
        return replace(verdict, limit=found[1], reason="; ".join(filter(None, [message, verdict.reason])))
    return verdict


def exact_up_to(config: PretrainedConfig) -> tuple[str, int] | None:
    """Gives (setting, tokens) of an architecture that counts tokens by their place in the row, from which on noisy tokens, which
    stand after the clean ones, are taken for later ones than they are."""
    settings = config.get_text_config(decoder=True)
    step = getattr(settings, "floor_scale", None)  # of Llama 4: layers without rope sharpen with the index
    if step and getattr(settings, "attn_temperature_tuning", False) and not all(settings.no_rope_layers):
        return "floor_scale", int(step) - 1
    return None
