"""Other people's programs at the server: OpenAI's own client, curl, and the page in a browser. One that is not there is skipped
with what to do: `make test-clients CLIENTS=FOLDER` looks for an environment `openai` there, which has that package."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import Browser, program
from gated_models import gated_model
from live_server import Live, image_chat, live, text_chat
from shared_fixtures import Loaded

from diffvl.decode.answer import Decoder
from diffvl.serve.limits import Limits
from tools.serve_mistakes import data_url, png

pytestmark = [pytest.mark.client]

FOLDER = Path(os.environ.get("CLIENTS", "clients"))


@pytest.fixture(scope="module")
def server(loaded: Callable[[str], Loaded]) -> Iterator[Live]:
    model, processor = loaded("llama")
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    with live(Decoder(model, processor), Limits(answer_tokens=300), keys=["secret"]) as started:
        yield started


@pytest.fixture(scope="module")
def drafting(prepared: Callable[[str], Path]) -> Iterator[Live]:
    """A lossless checkpoint."""
    with live(Decoder(*gated_model(prepared("qwen2"))), Limits(answer_tokens=300), keys=["secret"]) as started:
        yield started


@pytest.mark.parametrize("kind", ["server", "drafting"])
def test_openai_client(kind: str, request: pytest.FixtureRequest, tmp_path: Path):
    """Whole and streamed, with a picture, 32 at once, and its mistakes as its own exceptions."""
    server: Live = request.getfixturevalue(kind)
    python = FOLDER / "openai" / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"no {python}: make this environment with the package openai in it, or set CLIENTS")
    requests = []
    for number in range(32):
        own = {"denoising_steps": 1 + number % 4} if kind == "server" else {}
        more = {"model": "tiny", "max_tokens": 6 + number % 7, "extra_body": own}
        text = ("Hi", "What is it?", "Name every colour.")[number % 3]
        requests.append(image_chat(text, data_url(png(24 + number)), **more) if number % 2 else text_chat(text, **more))
    file = tmp_path / "requests.json"
    file.write_text(json.dumps(requests), encoding="utf-8")
    client = Path(__file__).with_name("openai_client.py")
    words = [str(python), "-I", str(client), f"http://127.0.0.1:{server.port}/v1", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    plain = [{**{key: value for key, value in one.items() if key != "extra_body"}, **one["extra_body"]} for one in requests]
    expected = [server.ask(one, Authorization="Bearer secret").text for one in plain]
    assert found["at_once"] == expected and len(set(expected)) > 8
    assert found["whole"] == [stream["text"] for stream in found["streamed"]] == expected[:4]
    assert {stream["ended"] for stream in found["streamed"]} <= ({"length"} if kind == "server" else {"length", "stop"})
    assert all(stream["pieces"] > 1 for stream in found["streamed"] if len(stream["text"]) > 1), found["streamed"]
    assert [stream["usage"] for stream in found["streamed"]] == found["usage"]
    assert found["models"] == ["tiny"] and found["model"] == "tiny"
    kinds = {name: told[:3] for name, told in found["refused"].items()}
    assert kinds == {
        "n": ["BadRequestError", 400, "n"],
        "model": ["NotFoundError", 404, "model"],
        "tools": ["BadRequestError", 400, "tools"],
        "key": ["AuthenticationError", 401, "invalid_api_key"],
    }
    assert "one answer is given" in found["refused"]["n"][3]


def test_curl(server: Live, tmp_path: Path):
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    file = tmp_path / "request.json"
    request = image_chat("What is it?", data_url(png()), max_tokens=12)
    words = ["curl", "-sN", f"http://127.0.0.1:{server.port}/v1/chat/completions", "--data", f"@{file}"]
    words += ["-H", "Content-Type: application/json", "-H", "Authorization: Bearer secret"]
    answers = []
    for streams in (False, True):
        file.write_text(json.dumps({**request, "stream": streams}), encoding="utf-8")
        answers.append(subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout)
    whole = json.loads(answers[0])["choices"][0]["message"]["content"]
    events = [json.loads(line[6:]) for line in answers[1].splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == whole
    assert answers[1].endswith("data: [DONE]\n\n")
    missing = subprocess.run(words[:-2], capture_output=True, text=True, check=True, timeout=60).stdout
    assert json.loads(missing)["error"]["code"] == "invalid_api_key"


DROP = """
(() => {
  const bytes = Uint8Array.from(atob("BYTES"), letter => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "<img src=x onerror=alert(1)>.png", {type: "image/png"}));
  document.dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true}));
})()
"""
ASK = """
(() => {
  document.getElementById("prompt").value = TEXT;
  document.getElementById("form").requestSubmit();
})()
"""


def test_the_page_in_a_browser(server: Live, tmp_path: Path):
    """An image is dropped, a question asked, blocks settle, the answer is that of the API; what is typed is text, not markup."""
    if program() is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    attack = "<img src=x onerror='window.hurt = 1'><script>window.hurt = 1</script>"
    with Browser(tmp_path / "profile") as browser:
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.wait("document.getElementById('model').textContent.includes('API key')")
        browser.run("document.getElementById('key').value = 'secret'; document.getElementById('key').onchange()")
        browser.wait("document.getElementById('model').textContent === 'tiny, blocks of 4'")
        browser.faults.clear()  # the answer 401 to the question for models
        browser.run("document.getElementById('max_tokens').value = 40; document.getElementById('denoising_steps').value = 4")
        browser.run(DROP.replace("BYTES", data_url(png()).partition(",")[2]))
        browser.wait("document.querySelectorAll('#thumbs img').length === 1")
        browser.run("window.seen = 0; setInterval(() => { window.seen += document.querySelectorAll('.cell.open').length; }, 1)")
        browser.run(ASK.replace("TEXT", json.dumps(attack)))
        browser.wait("document.getElementById('talk').textContent.includes('ended: ')")
        said = browser.run("document.querySelector('.turn.assistant p').textContent")
        request = image_chat(attack, data_url(png()), max_tokens=40, denoising_steps=4)
        assert said == server.ask(request, Authorization="Bearer secret").text
        assert browser.run("window.seen") > 0, "nobody saw a block settle"
        assert browser.run("document.querySelector('.turn.user p').textContent") == attack
        assert browser.run("document.querySelectorAll('#talk img').length") == 1 and not browser.run("window.hurt")
        # The conversation goes on; a mistake is told where the answer would stand, and forgotten.
        browser.run("document.getElementById('max_tokens').value = 100000")
        browser.run(ASK.replace("TEXT", '"And now?"'))
        browser.wait("document.querySelector('.turn.assistant:last-child .error')")
        assert "max_tokens is 100000" in browser.run("document.querySelector('.error').textContent")
        browser.faults.clear()
        browser.run("document.getElementById('max_tokens').value = 300")
        browser.run(ASK.replace("TEXT", '"And now?"'))
        browser.wait("document.querySelector('.turn.assistant:last-child small').textContent.includes('blocks')")
        browser.run("document.getElementById('stop').click()")
        browser.wait("document.querySelector('.turn.assistant:last-child .error')?.textContent === 'stopped'")
        server.wait_until(server.is_empty)
        browser.choose_file("#file", written(tmp_path / "b.png"))
        browser.wait("document.querySelectorAll('#thumbs img').length === 1")
        browser.photograph(tmp_path / "page.png")
        assert not browser.faults, browser.faults


def test_the_page_of_a_model_that_drafts(drafting: Live, tmp_path: Path):
    """Without settings that would have no effect, and with what became of the drafts."""
    if program() is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with Browser(tmp_path / "profile") as browser:
        browser.open(f"http://127.0.0.1:{drafting.port}/")
        browser.wait("document.getElementById('model').textContent.includes('API key')")
        browser.run("document.getElementById('key').value = 'secret'; document.getElementById('key').onchange()")
        browser.wait("document.getElementById('model').textContent === 'tiny, drafts of up to 4 tokens'")
        browser.faults.clear()  # the answer 401 to the question for models
        browser.run("document.querySelector('details').open = true; document.getElementById('max_tokens').value = 20")
        assert browser.run("document.getElementById('remasking').offsetParent === null")
        browser.run(ASK.replace("TEXT", '"What is it?"'))
        browser.wait("document.getElementById('talk').textContent.includes('ended: ')")
        said = browser.run("document.querySelector('.turn.assistant p').textContent")
        assert said == drafting.ask(text_chat("What is it?", max_tokens=20), Authorization="Bearer secret").text
        told = browser.run("document.querySelector('.turn.assistant small').textContent")
        assert "forwards" in told and "tokens per forward" in told and "block" not in told
        assert not browser.faults, browser.faults


def written(file: Path) -> Path:
    file.write_bytes(png(60, 40))
    return file
