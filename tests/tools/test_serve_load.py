"""The load program measures what it says, and notices a server that loses, mixes up or keeps silent."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from live_server import Live, live
from shared_fixtures import Loaded

from diffvl.decode.answer import Decoder
from diffvl.serve import app
from diffvl.serve.limits import Limits
from diffvl.serve.refusals import Refusal
from tools import serve_load
from tools.serve_load import Client, main, measured, one_by_one, questions, together


@pytest.fixture(scope="module")
def server(loaded: Callable[[str], Loaded]) -> Iterator[Live]:
    model, processor = loaded("llama")
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    with live(Decoder(model, processor), Limits(samples=16)) as started:
        yield started


def test_a_whole_run(server: Live, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve_load, "GOES_AWAY", 0.2)
    monkeypatch.setattr(serve_load, "mistakes", lambda: all_mistakes[::12])
    report, wrong = measured("127.0.0.1", server.port, clients=6, seconds=1.5, tokens=6, count=4)
    assert not wrong and report.lost == report.different == 0 and report.answers > 0 and report.left_on_purpose > 0
    assert report.mistakes == report.mistakes_told == len(all_mistakes[::12])
    assert report.together_tokens_per_second > 0 and len(report.megabytes) == 3 and min(report.megabytes) > 50
    server.wait_until(server.is_empty)


all_mistakes = serve_load.mistakes()


def test_answers_that_are_others_than_one_by_one_are_noticed(server: Live):
    client = Client("127.0.0.1", server.port)
    known, _ = one_by_one(client, questions(2, 4))
    client.close()
    mixed_up = [replace(known[0], answer=known[1].answer), known[1]]
    tally, _ = together("127.0.0.1", server.port, mixed_up, 2, 0.2)
    assert tally.different and not tally.lost and tally.answers >= len(tally.different)


def test_a_mistake_that_is_not_named_is_noticed(server: Live, monkeypatch: pytest.MonkeyPatch):
    def silent(*_: Any) -> Any:
        raise Refusal(400, "bad request")

    monkeypatch.setattr(app, "_body", silent)
    monkeypatch.setattr(serve_load, "mistakes", lambda: all_mistakes[:3])
    assert len(serve_load.tell_mistakes("127.0.0.1", server.port)[1]) == 3


def test_only_this_machine_is_loaded():
    with pytest.raises(SystemExit):
        main(["--url", "http://192.0.2.1:8000"])
