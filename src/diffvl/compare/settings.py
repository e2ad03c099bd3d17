"""Which ways of decoding a run is measured under: its slowest first, against which the others trade answers for speed."""

from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.settings_diffvl import DecodeSettings

THRESHOLDS = (0.95, 0.9, 0.8, 0.6)
NEW_TOKENS = 128
TOKEN_BY_TOKEN, SPECULATIVE = "token by token", "speculative"

STEPS, THRESHOLD, SINGLE = "denoising steps", "thresholds", ""  # families: points of one line in the picture


def ways_to_decode(config: DiffVLConfig, new_tokens: int) -> dict[str, tuple[str, DecodeSettings]]:
    """Gives name -> (family, settings), the run's own way first.

    An AR run decodes token by token, by transformers' own `generate`; a block-diffusion run in fewer and fewer denoising steps,
    under thresholds, and where its context is causal checked by its own AR logits. A lossless one drafts and checks, or does
    neither.
    """
    if config.decoding == "ar":
        return {TOKEN_BY_TOKEN: (SINGLE, DecodeSettings(mode="ar", max_new_tokens=new_tokens))}
    if config.gated_adapter is not None:
        return {
            SPECULATIVE: (SINGLE, DecodeSettings(mode="speculative", max_new_tokens=new_tokens)),
            TOKEN_BY_TOKEN: (SINGLE, DecodeSettings(mode="ar", max_new_tokens=new_tokens)),
        }
    ways = {}
    steps = config.block_size
    while steps:
        name = f"{steps} step{'s' if steps > 1 else ''} a block"
        ways[name] = (STEPS, DecodeSettings(denoising_steps=steps, max_new_tokens=new_tokens))
        steps //= 2
    for threshold in THRESHOLDS:
        chosen = DecodeSettings(remasking="low_confidence_dynamic", threshold=threshold, max_new_tokens=new_tokens)
        ways[f"threshold {threshold:g}"] = (THRESHOLD, chosen)
    if config.context == "causal":
        ways[SPECULATIVE] = (SINGLE, DecodeSettings(mode="speculative", max_new_tokens=new_tokens))
    return ways
