"""`diffvl serve` as a command: what it needs, what ends it in one message, and how it is stopped."""

import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from block_checkpoints import block_checkpoint
from live_server import Reply, text_chat
from tiny_runs import command

from diffvl.cli import main as cli
from diffvl.errors import UsageError
from diffvl.serve import run


def test_without_its_extra_one_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    find = importlib.util.find_spec
    absent = ("fastapi", "uvicorn")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in absent else find(name, *more))
    ended = command("serve", tmp_path)
    assert (ended.code, ended.out) == (2, "") and "Traceback" not in ended.err
    assert "or fastapi uvicorn alone" in ended.err and "pip install 'diffvl[serve]'" in ended.err


def test_what_cannot_be_served_ends_in_one_message(tmp_path: Path):
    nothing = command("serve", tmp_path / "nothing", "--port", 0)
    assert nothing.code == 2 and "no such directory" in nothing.err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = command("serve", tmp_path, "--port", port)
    assert ended.code == 2 and f"127.0.0.1:{port} cannot be had (Address already in use)" in ended.err and "--port" in ended.err
    unknown = command("serve", tmp_path, "--host", "no-such-host.invalid")
    assert unknown.code == 2 and "--host" in unknown.err
    for key in ("", "two words", "schlüssel"):
        wrong = command("serve", tmp_path, "--api-key", key)
        assert wrong.code == 2 and "--api-key" in wrong.err


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_variable_for_the_key_locks_nothing_and_is_refused(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As of a file of variables in which the key is not set."""
    monkeypatch.setenv("DIFFVL_API_KEY", value)
    ended = command("serve", tmp_path, "--port", 0)
    assert ended.code == 2 and "DIFFVL_API_KEY is set and holds no key" in ended.err
    assert "no such directory" in command("serve", tmp_path / "nothing", "--port", 0, "--api-key", "key").err


def test_a_second_server_is_refused_while_the_first_reads_its_weights():
    with run._bound("127.0.0.1", 0) as taken, pytest.raises(UsageError, match="Address already in use"):
        run._bound(*taken.getsockname())


@pytest.mark.slow
def test_the_command_serves_until_it_is_stopped(prepared: Callable[[str], Path], tmp_path: Path):
    directory = block_checkpoint(prepared("llama"), tmp_path / "tiny")
    program = [sys.executable, "-c", "from diffvl.cli.main import main; main()", "serve", str(directory), "--port", "0"]
    variables = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2]), "DIFFVL_API_KEY": "secret"}
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=variables) as running:
        assert running.stderr is not None
        told = running.stderr.readline()
        found = re.search(r"'tiny' at http://127\.0\.0\.1:(\d+)", told)
        assert found is not None, told
        reply = asked(int(found[1]))
        assert reply.status == 200 and reply.text
        running.send_signal(signal.SIGINT)
        rest = running.stderr.read()
        assert running.wait(30) == 0 and "Traceback" not in rest and "200 in" in rest and "secret" not in told + rest


def asked(port: int) -> Reply:
    """One question, as soon as the server listens."""
    for _ in range(200):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
            connection.request("POST", "/v1/chat/completions", json.dumps(text_chat("Hi", max_tokens=4)), headers)
            response = connection.getresponse()
            return Reply(response.status, {}, response.read())
        except ConnectionRefusedError:
            time.sleep(0.05)
        finally:
            connection.close()
    raise AssertionError("it never listened")
