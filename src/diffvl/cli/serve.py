"""`diffvl serve`: the words of the command that answers over HTTP."""

import os
from pathlib import Path
from typing import Annotated

import typer

from diffvl.errors import UsageError
from diffvl.serve.limits import Limits

API_KEY = "DIFFVL_API_KEY"  # the variable


def serve(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint that `diffvl convert` wrote.")],
    host: Annotated[str, typer.Option(help="Address to listen on.", metavar="ADDRESS")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            envvar=API_KEY,
            show_envvar=True,
            metavar="KEY",
            help="A key that requests must name; repeatable.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in the API. Default: DIR's.", metavar="NAME")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests that are decoded together.")] = Limits.samples,
    queue: Annotated[int, typer.Option(min=0, help="Further requests that may wait; more get 429.")] = Limits.waiting,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may take.")] = Limits.seconds,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = Limits.answer_tokens,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Longest prompt, images included.")] = Limits.prompt_tokens,
    max_images: Annotated[int, typer.Option(min=0, help="Images in a request.")] = Limits.images,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of a request's images together.")] = Limits.pixels,
    max_body: Annotated[
        int, typer.Option(min=1, help="Bytes of a request, and of all images fetched for it.")
    ] = Limits.body_bytes,
    fetch_images: Annotated[
        bool, typer.Option("--fetch-images", help="Allow images by public http(s) addresses; else only data URLs.")
    ] = Limits.fetches_images,
) -> None:
    """Answer over HTTP as OpenAI's chat completions do, and show a page to try it. Needs `pip install 'diffvl\\[serve]'`."""
    if not api_key and os.environ.get(API_KEY) is not None:
        raise UsageError(f"{API_KEY} is set and holds no key, so that anybody might ask: put a key into it, or unset it")
    limits = Limits(
        samples=batch_size,
        waiting=queue,
        images=max_images,
        pixels=max_pixels,
        prompt_tokens=max_prompt_tokens,
        answer_tokens=max_tokens,
        body_bytes=max_body,
        seconds=timeout,
        fetches_images=fetch_images,
    )
    from diffvl.serve.extra import require_extra

    require_extra()
    from diffvl.serve.run import serve as run_server
    from diffvl.terminal.bars import quiet_libraries

    quiet_libraries()
    run_server(directory, host, port, api_key or [], name, limits)
