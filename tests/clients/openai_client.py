"""What a program with OpenAI's own client does, run in an environment that has it: URL REQUESTS; prints one JSON object.

REQUESTS is a file with a list of requests. Each is asked whole and as a stream; then all at once.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import openai  # pyright: ignore[reportMissingImports]  # a package of its own environment


def streamed(client: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The text of a stream, its pieces and what it says at its end."""
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    ended = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    return {"text": "".join(pieces), "pieces": sum(map(bool, pieces)), "ended": ended[-1], "usage": chunks[-1].usage.model_dump()}


async def at_once(url: str, requests: list[dict[str, Any]]) -> list[str]:
    async with openai.AsyncOpenAI(base_url=url, api_key="secret") as client:
        replies = await asyncio.gather(*(client.chat.completions.create(**request) for request in requests))
    return [reply.choices[0].message.content for reply in replies]


def refused(client: Any) -> dict[str, list[Any]]:
    """What the client makes of mistakes."""
    found = {}
    message = [{"role": "user", "content": "Hi"}]
    wrong = {"n": {"n": 2}, "model": {"model": "gpt-4o"}, "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]}}
    for name, more in wrong.items():
        try:
            client.chat.completions.create(**{"model": "tiny", "messages": message, **more})
        except openai.APIStatusError as error:
            found[name] = [type(error).__name__, error.status_code, error.param, error.message]
    try:
        openai.OpenAI(base_url=client.base_url, api_key="wrong").models.list()
    except openai.AuthenticationError as error:
        found["key"] = [type(error).__name__, error.status_code, error.code]
    return found


def main(url: str, file: str) -> None:
    requests = json.loads(Path(file).read_text(encoding="utf-8"))
    with openai.OpenAI(base_url=url, api_key="secret") as client:
        whole = [client.chat.completions.create(**request) for request in requests[:4]]
        found = {
            "version": openai.__version__,
            "models": [model.id for model in client.models.list()],
            "model": client.models.retrieve("tiny").id,
            "whole": [reply.choices[0].message.content for reply in whole],
            "usage": [reply.usage.model_dump() for reply in whole],
            "streamed": [streamed(client, request) for request in requests[:4]],
            "refused": refused(client),
            "at_once": asyncio.run(at_once(url, requests)),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
