"""Where records come from, as a recipe says it: one data set, or several that are mixed by weight."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from diffvl.config.section import Section

# What a record is read from. `question` and `answer` together are one turn each.
RecordKey = Literal["conversations", "messages", "question", "answer", "image", "images", "video", "videos", "system", "id"]
Columns = Annotated[dict[RecordKey, str], Field(min_length=1)]

SPLIT = "of a data set in several parts (a folder, a hub id): the one that is read; default: train, or the only one"
SUBSET = "of a data set on the hub or in a folder: which of its configurations; default: the only one"
COLUMNS = (
    "what a record is read from: key of the record -> name of the column (of the key, in JSON; of the extension, in a tar). "
    "Columns that are not named are left alone. Default: all columns, by their own names"
)
IMAGE_FOLDER = "where relative paths of images start, a folder or a .zip; default: the folder of the data file"


class DataSource(Section):
    """One data set of a run."""

    path: str = Field(min_length=1, description="file, folder, pattern with *, hub id or (streaming) URL")
    weight: float | None = Field(
        default=None, gt=0, le=1e6, description="share of the rows that are drawn from it; default: each record once an epoch"
    )
    split: str | None = Field(default=None, description=SPLIT)
    subset: str | None = Field(default=None, description=SUBSET)
    columns: Columns | None = Field(default=None, description=COLUMNS)
    image_folder: str | None = Field(default=None, description=IMAGE_FOLDER)

    @model_validator(mode="after")
    def _columns_fit(self) -> Self:
        check_columns(self.columns)
        return self


def _form(value: Any) -> str:
    """Names the form in which sources are given, so that a mistake is told of that form only (see `resolve._key_path`)."""
    if isinstance(value, list):
        return "(list)"
    return "(source)" if isinstance(value, dict | DataSource) else "(text)"


# One source by its path alone, with all that it has, and several.
OneSource = Annotated[Annotated[str, Tag("(text)")] | Annotated[DataSource, Tag("(source)")], Discriminator(_form)]
Sources = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[DataSource, Tag("(source)")] | Annotated[list[DataSource], Tag("(list)")],
    Discriminator(_form),
]


def check_columns(columns: dict[RecordKey, str] | None) -> None:
    """Raises ValueError for columns that contradict each other, or from which no record can be read."""
    if columns is None:
        return
    for one, other in (("image", "images"), ("video", "videos"), ("conversations", "messages")):
        if one in columns and other in columns:
            raise ValueError(f"columns names both {one} and {other}: keep one of them")
    turns = [key for key in ("conversations", "messages", "answer") if key in columns]
    if len(turns) != 1:
        raise ValueError("columns must name where the turns are: one of conversations, messages, answer (with question)")
    if "question" in columns and "answer" not in columns:
        raise ValueError("columns.question has no effect without columns.answer")


def check_weights(sources: list[DataSource]) -> None:
    """Raises ValueError where some sources have a weight and some have none, or nothing is mixed."""
    if not sources:
        raise ValueError("train is an empty list: name at least one source")
    weighed = [source.weight is not None for source in sources]
    if any(weighed) and not all(weighed):
        raise ValueError("some entries of train have a weight and some have none: give one to all of them or to none")
    if weighed == [True]:
        raise ValueError("weight has no effect on a single entry of train: remove it")
