"""The mask token of a trunk that was a diffusion language model already: its own row, under the name that its tokenizer has.

Place in the flow: `assemble.read_parts` asks before it adds tokens. Invariant: the row that the model was trained with is the one
that the tokenizer calls the mask token; nothing is added where it is there, and the row keeps its values.
"""

from typing import Any

from diffvl.config.families import DiffusionSource, Family, MaskToken
from diffvl.errors import CheckpointError


def with_own_mask_token(name: str, tokenizer: Any, family: Family, source: DiffusionSource, table_size: int) -> Family:
    """Makes a diffusion language model's own mask token the one of its tokenizer, under the name that it has there; returns the
    family with the row at which it is to be added where the tokenizer knows no token there.

    Raises:
        CheckpointError: if the table has no such row, or the tokenizer says otherwise.
    """
    row = source.mask_token_id
    if row >= table_size:
        raise CheckpointError(f"{name}: its mask token is row {row} of the embedding, which has {table_size:,} rows")
    if tokenizer.mask_token is not None and tokenizer.mask_token_id != row:
        raise CheckpointError(
            f"{name}: its tokenizer calls {tokenizer.mask_token!r} ({tokenizer.mask_token_id}) the mask token, but the model was "
            f"trained with row {row}; set mask_token in its tokenizer_config.json right"
        )
    token = tokenizer.convert_ids_to_tokens(row)
    if token not in (None, family.mask_token.text, *tokenizer.get_added_vocab()):
        raise CheckpointError(
            f"{name}: row {row}, the mask token, is {token!r} in its tokenizer, a piece of ordinary text; set mask_token_id in "
            "its config.json right"
        )
    if token is None and (len(tokenizer) > row or family.mask_token.text in tokenizer.get_vocab()):
        raise CheckpointError(
            f"{name}: its tokenizer has no token for row {row}, the mask token by its config.json; set mask_token_id right, or "
            "fetch the checkpoint again"
        )
    if token is not None:
        tokenizer.add_special_tokens({"mask_token": token})
    return family.model_copy(update={"mask_token": MaskToken(text=family.mask_token.text, id=row)})
