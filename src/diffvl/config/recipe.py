"""The configuration tree of a run, one frozen `Recipe`. `resolve.py` reads and writes it.

Unknown keys are errors at every level. Settings that only make sense together live in one variant (a noise schedule, an
objective, a connector), so that a setting without effect is an unknown key, never silently ignored.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from diffvl.config.objectives import DraftObjective, Objective
from diffvl.config.section import Section
from diffvl.config.sources import (
    COLUMNS,
    IMAGE_FOLDER,
    SPLIT,
    SUBSET,
    Columns,
    DataSource,
    OneSource,
    Sources,
    check_columns,
    check_weights,
)
from diffvl.config.tiling import NoTiling, Tiling

VERSION = "0.1.0"  # of diffvl; pyproject.toml reads it here


def _as_folder(name: str) -> str:
    """Raises ValueError for a stage's name that cannot be its directory's."""
    if re.fullmatch(r"[a-z][a-z0-9_-]{0,39}", name) is None or name == PREPARED:
        raise ValueError(f"a stage has the name of its directory: small letters, digits, - and _, but not {PREPARED}")
    return name


Part = Literal["tower", "connector", "trunk", "mask_row"]
PREPARED = "prepared"  # the directory that the first stage of a run starts from
StageName = Annotated[str, AfterValidator(_as_folder)]
Tracker = Literal["aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]
MAX_SKIPPED = 0.01  # of a file's records, where data.on_error is skip
CHECK_IMAGES = 5000  # records up to which every image is looked at before training
WINDOW = 512  # records of a stream that are permuted at a time


# --- model ---------------------------------------------------------------------------------------------------------------


class _Fresh(Section):
    """What every connector has."""

    gain: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="factor on the fresh weights of its last layer. Image tokens as small as text embeddings are drowned by what "
        "the first layers of a small trunk add to them; a large gain lets what they show last",
    )


class MlpConnector(_Fresh):
    """Linear, GELU, Linear: the connector of both papers."""

    kind: Literal["mlp2x_gelu"] = "mlp2x_gelu"


class LinearConnector(_Fresh):
    kind: Literal["linear"] = "linear"


class PixelShuffleConnector(_Fresh):
    """Joins `factor` x `factor` neighbouring patches into one image token, then Linear, GELU, Linear."""

    kind: Literal["pixel_shuffle"] = "pixel_shuffle"
    factor: int = Field(default=2, ge=2, le=16)


Connector = Annotated[MlpConnector | LinearConnector | PixelShuffleConnector, Field(discriminator="kind")]


class Video(Section):
    """How a vision-language model that takes videos is shown them, in training and in decoding."""

    enabled: bool = Field(default=True, description="`false` converts a checkpoint without its videos")
    fps: float | None = Field(default=None, gt=0, description="frames of a second that are shown; default: the checkpoint's own")
    num_frames: int | None = Field(default=None, ge=1, description="frames that are shown of each video, in the place of fps")
    min_pixels: int | None = Field(default=None, ge=1, description="as of images, by the checkpoint's video processor")
    max_pixels: int | None = Field(default=None, ge=1, description="likewise; some count those of a frame, some of all frames")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.fps is not None and self.num_frames is not None:
            raise ValueError("fps and num_frames both say how many frames are shown: keep one of them")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels ({self.min_pixels}) must not be above max_pixels ({self.max_pixels})")
        if not self.enabled and any((self.fps, self.num_frames, self.min_pixels, self.max_pixels)):
            raise ValueError("enabled is false, so that no other setting of videos has an effect: leave them out")
        return self


class Prepare(Section):
    """How the AR checkpoint gets its eyes."""

    vision_tower: str | None = Field(
        default=None, description="hub id or directory; default: the named checkpoint's or the family's"
    )
    vision_layer: int = Field(default=-2, description="index into the tower's hidden states, as in LLaVA; -1 is the last layer")
    image_size: int | None = Field(default=None, ge=14, description="pixels per side; default: the tower's own")
    min_pixels: int | None = Field(
        default=None, ge=1, description="of a vision-language model that counts pixels: smaller images are enlarged to this many"
    )
    max_pixels: int | None = Field(
        default=None,
        ge=1,
        description="likewise: larger images are reduced to this many, and with them their tokens",
    )
    tiling: Tiling = Field(default=NoTiling(), description="how images are cut before the tower sees them")
    video: Video = Video()
    connector: Connector = MlpConnector()
    system_turn: Literal["template", "first_question"] = Field(
        default="template",
        description="`first_question` puts a system turn in front of the first question, in training and decoding: for chat "
        "templates that take no system turn",
    )

    @model_validator(mode="after")
    def _pixels_in_order(self) -> Self:
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels ({self.min_pixels}) must not be above max_pixels ({self.max_pixels})")
        return self


# --- training ------------------------------------------------------------------------------------------------------------


class Lora(Section):
    """Low-rank adapters on the trunk (peft); connector and mask row are still trained in full."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | None = Field(default=None, description="regular expression over module names; default: the family's")
    bits: Literal[4] | None = Field(
        default=None,
        description="of the weights in the trunk's layers while adapters train: 4 packs them (NF4, bitsandbytes, on a GPU). "
        "Default: the dtype of the checkpoint",
    )


class Optim(Section):
    weight_decay: float = Field(default=0.0, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)


class Data(Section):
    train: Sources | None = Field(
        default=None, description="file, folder, pattern, hub id or URL, or a list of sources to mix; `--data` sets it"
    )
    records: int | None = Field(
        default=None, ge=1, description="that `train` is said to have: what `--dry-run` counts with while the data is not here"
    )
    split: str | None = Field(default=None, description=f"{SPLIT}. Of `train`")
    subset: str | None = Field(default=None, description=f"{SUBSET}. Of `train`")
    columns: Columns | None = Field(default=None, description=f"{COLUMNS}. Of sources that have none of their own")
    image_folder: str | None = Field(default=None, description=IMAGE_FOLDER)
    streaming: bool = Field(
        default=False,
        description="read `train` from front to back, for tars and remote data: nothing loads or measures the whole set",
    )
    window: int = Field(
        default=WINDOW, ge=1, description="streaming: records of a loader process that are permuted, and packed, at a time"
    )
    eval: OneSource | None = Field(default=None, description="held-out file (folder, hub id), never streamed")
    holdout: int = Field(default=0, ge=0, description="without `eval`: this many records are set apart from `train`")
    max_length: int = Field(default=2048, ge=8, description="tokens per sample, images included; a longer record is an error")
    row_length: int | None = Field(
        default=None, ge=8, description="pack samples into rows of up to this many clean tokens; default: one sample a row"
    )
    unpaired_turns: Literal["error", "drop"] = Field(
        default="error",
        description="answers before the first question and questions after the last answer; `drop` leaves them out",
    )
    too_long: Literal["error", "drop"] = Field(default="error", description="`drop` leaves longer records out and says how many")
    on_error: Literal["stop", "skip"] = Field(
        default="stop", description="`skip` leaves records out that are wrong or whose images cannot be read, and lists them"
    )
    max_skipped: float = Field(
        default=MAX_SKIPPED,
        ge=0,
        le=1,
        description="share of a file's records that on_error: skip may leave out; more stop the run",
    )
    workers: int | None = Field(
        default=None, ge=0, description="loader processes; default: none for small sets, else as many as the cores allow, up to 4"
    )
    check_lengths: bool = Field(
        default=False,
        description="tokenise every record before training, to find those that are too long; packing does so anyway",
    )
    check_images: int = Field(
        default=CHECK_IMAGES, ge=0, description="every image of a set of up to this many records is decoded once before training"
    )

    @model_validator(mode="after")
    def _one_holdout(self) -> "Data":
        if self.eval is not None and self.holdout:
            raise ValueError("holdout has no effect when eval names a file: remove one of them")
        return self

    @model_validator(mode="after")
    def _sources_fit(self) -> Self:
        check_columns(self.columns)
        if isinstance(self.eval, DataSource) and self.eval.weight is not None:
            raise ValueError("eval.weight has no effect: nothing is mixed into held-out records")
        if self.train is None or isinstance(self.train, str):
            return self
        sources = [self.train] if isinstance(self.train, DataSource) else self.train
        check_weights(sources)
        for name in ("split", "subset"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect when the sources of train are sections: set it in these")
        others = [self.eval] if isinstance(self.eval, DataSource) else []
        for name in ("columns", "image_folder"):
            own = all(getattr(source, name) is not None for source in [*sources, *others])
            if getattr(self, name) is not None and own and not isinstance(self.eval, str):
                raise ValueError(f"{name} has no effect: every source has its own")
        return self

    @model_validator(mode="after")
    def _streaming_fits(self) -> Self:
        if not self.streaming:
            if self.window != WINDOW:
                raise ValueError("window has no effect without streaming: true")
            return self
        if isinstance(self.train, list) and len(self.train) > 1 and self.train[0].weight is None:
            raise ValueError(
                "nobody knows how large streams are, so their shares cannot follow: give each entry of train a weight"
            )
        if self.holdout:
            raise ValueError("holdout needs all records of the set, which streaming does not look at: name a file with eval")
        if self.check_lengths:
            raise ValueError("check_lengths needs all records of the set, which streaming does not look at: remove it")
        if self.check_images != CHECK_IMAGES:
            raise ValueError("check_images has no effect with streaming: images are looked at when their turn comes")
        return self

    @model_validator(mode="after")
    def _checks_have_effect(self) -> Self:
        if self.on_error == "stop" and self.max_skipped != MAX_SKIPPED:
            raise ValueError("max_skipped has no effect with on_error: stop, which lets no wrong record pass: set on_error: skip")
        if self.check_lengths and self.row_length is not None:
            raise ValueError("check_lengths has no effect with row_length: packing measures every record anyway")
        return self

    @model_validator(mode="after")
    def _rows_hold_samples(self) -> Self:
        if self.row_length is not None and self.row_length < self.max_length:
            raise ValueError(f"row_length ({self.row_length}) must be at least max_length ({self.max_length})")
        return self


class Stage(Section):
    """One run of the trainer. No code asks which stage it is in: stages differ by these values alone."""

    objective: Objective
    trainable: dict[Part, Annotated[float, Field(gt=0, lt=1)]] = Field(description="part -> learning rate; others are frozen")
    lora: Lora | None = None
    tiling: Tiling | None = Field(default=None, description="default: as in the checkpoint that the stage goes on from")
    data: Data = Data()
    optim: Optim = Optim()
    steps: int | None = Field(default=None, ge=1, description="optimiser steps")
    epochs: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=1, ge=1, description="rows (samples, where they are not packed) per device and micro-step")
    accumulation: int = Field(default=1, ge=1)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    gradient_checkpointing: bool = False
    sharding: Literal["auto", "none", "full", "full_bf16"] = Field(
        default="auto",
        description="over the processes of a run: `full` gives each a part of every tensor and of the optimiser, `none` all of "
        "them. auto: full on several GPUs, none on a CPU. full_bf16: the weights are gathered in bf16, half the traffic, and the "
        "residual stream and the norms are bf16 too, which is other arithmetic than under bf16 autocast",
    )
    attention: Literal["auto", "sdpa", "eager", "tiled", "flex_attention"] = Field(
        default="auto", description="auto: flex_attention on a GPU, tiled on a CPU, where the architecture takes them"
    )
    log_every: int = Field(default=1, ge=1)
    save_every: int = Field(default=500, ge=1, description="optimiser steps between checkpoints")
    keep_checkpoints: int = Field(default=2, ge=1)
    eval_every: int | None = Field(default=None, ge=1)
    eval_limit: int = Field(default=64, ge=1, description="held-out records used in an evaluation during training")
    eval_answers: int = Field(
        default=0, ge=0, description="held-out records whose first question is also answered in each evaluation: eval_exact_match"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Stage":
        if not self.trainable:
            raise ValueError("trainable is empty: name at least one part, e.g. {connector: 1.0e-3}")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.lora is not None and "trunk" not in self.trainable:
            raise ValueError("lora has no effect unless trunk is in trainable")
        if isinstance(self.objective, DraftObjective):
            self._require_lossless(self.objective)
        if "mask_row" in self.trainable and self.objective.kind == "ar":
            raise ValueError("mask_row has no effect under the ar objective: no token is masked")
        if self.data.streaming and self.steps is None:
            raise ValueError("a stream has no known end: give steps in place of epochs, or leave out data.streaming")
        if self.eval_every is not None and self.data.eval is None and self.data.holdout == 0:
            raise ValueError("eval_every has no effect without data.eval or data.holdout")
        if self.eval_answers and self.eval_every is None:
            raise ValueError("eval_answers has no effect without eval_every")
        if self.eval_answers and self.sharding in ("full", "full_bf16"):
            raise ValueError(f"eval_answers asks a whole model, which no process has with sharding: {self.sharding}")
        return self

    def _require_lossless(self, objective: DraftObjective) -> None:
        """Raises ValueError where a stage of drafts would change what they are checked by."""
        rule = "objective draft (lossless) changes no weight of its parent, which checks the drafts"
        if self.lora is None:
            raise ValueError(f"{rule}: without lora the trunk itself would train. Add lora, e.g. {{rank: 32, alpha: 32}}")
        if odd := sorted(self.trainable.keys() ^ {"trunk", "mask_row"}):
            given = f"{odd[0]} cannot be in it" if odd[0] in self.trainable else f"{odd[0]} is missing"
            raise ValueError(f"{rule}: trainable names trunk (the adapters on it) and mask_row, and nothing else; {given}")
        if self.eval_answers:
            raise ValueError(f"{rule}: its answers are the parent's all along, so eval_answers has no effect. Leave it out")
        if self.tiling is not None:
            raise ValueError(f"{rule}: tiling would show it other images. Leave it out")
        if objective.forwards == "two" and self.attention not in ("auto", "sdpa", "eager"):
            raise ValueError(
                f"attention: {self.attention} is for a whole row in one forward: leave it at auto, or set forwards: one in the "
                "objective"
            )


class Recipe(Section):
    """A whole run. `run.yaml` beside every output is one of these, resolved."""

    model: str | None = Field(default=None, description="a name from `diffvl models`, a hub id, a directory or a .gguf file")
    seed: int = Field(default=0, ge=0, lt=2**31)
    trackers: list[Tracker] | None = Field(
        default=None, description="where figures go besides metrics.jsonl; default: tensorboard if it is installed"
    )
    prepare: Prepare = Prepare()
    stages: dict[StageName, Stage] = Field(description="by name, in the order in which they run")

    @model_validator(mode="after")
    def _has_stage(self) -> "Recipe":
        if not self.stages:
            raise ValueError("a recipe needs at least one stage, as align or diffuse")
        return self
