"""`diffvl export` and `diffvl push`: the words of the commands that give a checkpoint away."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from diffvl.terminal import console as terminal

LayoutName = Literal["native", "sdar_v", "sdar"]


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A finished directory of `diffvl convert`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write; new or empty.", metavar="OUT")],
    layout: Annotated[LayoutName, typer.Option(help="Whose checkpoint it is to look like (docs/interop.md).")] = "native",
    keep_adapters: Annotated[
        bool, typer.Option("--keep-adapters", help="LoRA beside the weights instead of merged into them.")
    ] = False,
    licence: Annotated[
        str | None, typer.Option("--license", help="For the card. Default: as the source's card says.", metavar="NAME")
    ] = None,
) -> None:
    """Write a finished checkpoint in a layout that others load; a clean process proves that it is the same model."""
    from diffvl.export.run import export as run_export
    from diffvl.terminal.bars import quiet_libraries

    quiet_libraries()
    run_export(directory, layout, out, terminal.console(), keep_adapters, licence)


def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory that `diffvl export` wrote.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the model hub.")],
    really: Annotated[bool, typer.Option("--yes", help="Upload. Without it, only tell what would be uploaded.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository a private one.")] = False,
) -> None:
    """Upload an exported checkpoint to a model hub; a dry run unless --yes is given, and never without a licence."""
    from diffvl.export.push import push as run_push
    from diffvl.terminal.bars import quiet_libraries

    quiet_libraries()
    run_push(directory, repo, terminal.console(), really, private)
