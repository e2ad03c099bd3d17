"""What `diffvl generate` answers, prints and refuses, through the command's own entry point, on tiny stand-ins."""

import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from block_checkpoints import BLOCK, block_checkpoint, fed, ids_of, tokenizer
from helpers import random_image
from shared_fixtures import Loaded
from tiny_runs import refused, succeed
from transformers import CompileConfig

from diffvl.cli import main as cli
from diffvl.decode import answer as decode
from diffvl.decode.answer import Decoder, TextPieces, answer_chats, answer_within_context, encode, text_of
from diffvl.errors import UsageError
from diffvl.hub.settings_diffvl import MODES, DecodeSettings

MODE_WORDS = [("--mode", mode) for mode in MODES]
PROMPTS = ["Now?", "A longer question, with nothing to see. " * 2, "Hi", "What is it?", "Why?"]


@pytest.fixture(scope="module")
def checkpoint(prepared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Context causal: every mode works."""
    return block_checkpoint(prepared("llama"), tmp_path_factory.mktemp("causal") / "llama", context="causal")


@pytest.fixture(scope="module")
def other_context(prepared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return block_checkpoint(prepared("llama"), tmp_path_factory.mktemp("block") / "llama", context="block")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    random_image(3).save(tmp_path / "seen.png")
    return tmp_path / "seen.png"


def asked(directory: Path, *words: object) -> dict[str, Any]:
    """`--json`, 12 tokens unless said otherwise."""
    return json.loads(succeed("generate", directory, "--max-new-tokens", 12, *words, "--json").out)


# --- the text of tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "",
    "One line.",
    "  white space around and  inside \n\n a second paragraph \n ",
    "é 漢字仮名 한국어 👩‍👩‍👧 and the end",
    "\n\n",
])  # fmt: skip
@pytest.mark.parametrize("size", [1, 3, 100])
def test_streamed_pieces_are_the_text(text: str, size: int):
    """However the tokens come, and with bytes of one character on both sides of a block's end."""
    words = tokenizer()
    ids = ids_of(words, text)
    pieces: list[str] = []
    streamer = TextPieces(words, (), pieces.append)
    fed(streamer, ids, size)
    assert "".join(pieces) == streamer.text == text_of(words, ids, ()) == text.strip()
    assert all(pieces) and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_pieces_come_with_the_blocks_and_not_with_the_words():
    words = tokenizer()
    seen: list[str] = []
    streamer = TextPieces(words, (), seen.append)
    ids = ids_of(words, "unbreakable, so")
    streamer.put(torch.tensor([[1, 2]]))
    grown = []
    for start in range(0, len(ids), 4):
        streamer.put(torch.tensor(ids[start : start + 4]))
        grown.append("".join(seen))
    assert grown == [str(words.decode(ids[: start + 4])).rstrip() for start in range(0, len(ids), 4)] and len(set(grown)) == len(
        grown
    )


def test_broken_characters_at_the_end_are_shown_in_the_end():
    words = tokenizer()
    ids = ids_of(words, "so 漢")[:-1]  # two of its three bytes
    pieces: list[str] = []
    fed(TextPieces(words, (), pieces.append), ids, 1)
    assert "".join(pieces) == text_of(words, ids, ()) == "so \N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(("stops", "kept"), [
    ((), "at the end, then"),
    (("th",), "at th"),  # inside the token " the"
    (("end", "t the"), "at the"),
    (("nowhere", "then"), "at the end, then"),
    ((", ",), "at the end,"),  # white space at the end of an answer is never shown
])  # fmt: skip
@pytest.mark.parametrize("size", [1, 4])
def test_text_after_a_stop_text_is_trimmed(stops: tuple[str, ...], kept: str, size: int):
    words = tokenizer()
    ids = ids_of(words, "at the end, then")
    pieces: list[str] = []
    fed(TextPieces(words, stops, pieces.append), ids, size)
    assert text_of(words, ids, stops) == "".join(pieces) == kept


# --- answers and their figures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_tokens_of_an_answer_are_its_own(mode: str, loaded: Callable[[str], Loaded]):
    """In a batch, where the shorter answers are padded: the same text and number of tokens as alone, for every way to end."""
    model, processor = loaded("llama")
    model.config.set_decoding("blocks", BLOCK, "causal", "absolute", "same")
    decoder = Decoder(model, processor)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    free = answer_chats(decoder, chats, DecodeSettings(max_new_tokens=16, mode=mode))
    stop, repeats = ("M", 2) if mode == "blocks" else ("nin", 4)
    settings = DecodeSettings(max_new_tokens=16, mode=mode, stop_strings=(stop,), repetition_stop=repeats)
    together = answer_chats(decoder, chats, settings)
    alone = [answer_chats(decoder, [chat], settings)[0] for chat in chats]
    assert [(one.text, one.tokens) for one in together] == [(one.text, one.tokens) for one in alone]
    assert sum(one.text.endswith(stop) for one in together) == 1
    assert sum(one.tokens < before.tokens for one, before in zip(together, free, strict=True)) >= 3
    for one, before in zip(together, free, strict=True):
        assert before.text.startswith(one.text) and one.tokens_per_forward == one.tokens / one.forwards
        assert one.forwards == together[0].forwards and one.seconds >= one.prefill_seconds + one.decode_seconds > 0


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_ends_where_its_own_context_does(mode: str, loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    """A long question beside a short one leaves the short one's answer as it is alone."""
    model, processor = loaded("llama")
    model.config.set_decoding("blocks", BLOCK, "causal", "absolute", "same")
    decoder, settings = Decoder(model, processor), DecodeSettings(max_new_tokens=16, mode=mode)
    chats = [[{"role": "user", "content": prompt}] for prompt in ("Hi", "Hi " * 9, "Hi", "Hi " * 9)]
    free = [answer_chats(decoder, [chat], settings)[0] for chat in chats]
    short, long = (encode(decoder, [chat])["input_ids"].shape[1] for chat in chats[:2])
    room = min(one.tokens for one in free) - 1
    monkeypatch.setattr("diffvl.decode.answer.context_length", lambda _: long + room)
    assert room >= 1 and short + 16 <= long + room
    answers, batches = answer_within_context(decoder, chats, settings)
    assert [one.tokens for one in answers] == [free[0].tokens, room, free[2].tokens, room]
    assert [answers[0].text, answers[2].text] == [free[0].text, free[2].text] and free[1].text.startswith(answers[1].text)
    assert len(batches) == 2 and {one.forwards for one in batches} == {one.forwards for one in answers}
    with pytest.raises(UsageError, match=f"a prompt of {long} tokens and 16 new ones do not fit the context of {long}"):
        monkeypatch.setattr("diffvl.decode.answer.context_length", lambda _: long)
        answer_within_context(decoder, chats, settings)


@pytest.mark.parametrize("mode", MODES)
def test_times_begin_before_images_are_encoded(mode: str, loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    """Speeds are held against each other: what all must do belongs to each."""
    model, processor = loaded("llama")
    model.config.set_decoding("blocks", BLOCK, "causal", "absolute", "same")
    kind = type(model.images)
    encode = kind.encode
    monkeypatch.setattr(kind, "encode", lambda images, pixels: (time.sleep(0.2), encode(images, pixels))[1])
    chat = [{"role": "user", "content": [{"type": "image", "image": random_image()}, {"type": "text", "text": "What?"}]}]
    (answer,) = answer_chats(Decoder(model, processor), [chat], DecodeSettings(max_new_tokens=4, mode=mode))
    assert answer.prefill_seconds >= 0.2 and answer.decode_seconds > 0


TIMES = ("prefill_seconds", "decode_seconds", "seconds", "accepted_per_round")


def test_json_has_text_and_figures(checkpoint: Path, image: Path):
    reply = asked(checkpoint, "--prompt", "What is it?", "--image", image, "--steps", 2)
    assert list(reply) == ["text", "tokens", "forwards", "tokens_per_forward", *TIMES]
    assert 1 <= reply["tokens"] <= 12 and reply["tokens_per_forward"] == reply["tokens"] / reply["forwards"]
    assert reply["forwards"] < asked(checkpoint, "--prompt", "What is it?", "--image", image)["forwards"]
    plain = succeed("generate", checkpoint, "--prompt", "What is it?", "--image", image, "--steps", 2, "--max-new-tokens", 12)
    assert plain.out == reply["text"] + "\n" and plain.err == ""
    assert asked(checkpoint, "--prompt", "What is it?")["text"] != reply["text"], "the image is looked at"


def test_every_flag_reaches_the_decoder(checkpoint: Path):
    """Each changes the answer or its forwards."""
    base = ("--prompt", "Tell me.", "--max-new-tokens", 24)
    plain = asked(checkpoint, *base)
    warm = asked(checkpoint, *base, "--temperature", 1.5)
    assert warm["text"] != plain["text"]
    assert asked(checkpoint, *base, "--temperature", 1.5, "--seed", 1)["text"] != warm["text"]
    first = asked(checkpoint, *base, "--temperature", 1.5, "--top-k", 1)["text"]
    assert first == asked(checkpoint, *base, "--temperature", 1.5, "--top-p", 0.001, "--seed", 2)["text"] != warm["text"]
    for words in (
        ("--strategy", "low_confidence_dynamic", "--threshold", 0.05),
        ("--strategy", "entropy", "--entropy-budget", 50),
        ("--steps", 1),
    ):
        assert asked(checkpoint, *base, *words)["forwards"] < plain["forwards"], words
    left = asked(checkpoint, *base, "--strategy", "sequential", "--steps", 2)
    assert left["text"] != asked(checkpoint, *base, "--steps", 2)["text"]
    ar, checked = asked(checkpoint, *base, "--mode", "ar"), asked(checkpoint, *base, "--mode", "speculative")
    assert ar["text"] == checked["text"] != plain["text"] and ar["tokens"] == checked["tokens"]
    stop = plain["text"][3:5]
    stopped = asked(checkpoint, *base, "--stop", "nowhere", "--stop", stop)
    assert stopped["text"] == plain["text"][: plain["text"].index(stop) + 2] and stopped["tokens"] < plain["tokens"]


# --- streams --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [(), ("--mode", "speculative"), ("--mode", "ar"), ("--steps", 2), *((*mode, "--repetition-stop", 3) for mode in MODE_WORDS)],
    ids=str,
)
def test_a_stream_prints_the_same_text(words: Sequence[object], checkpoint: Path):
    asks = ("generate", checkpoint, "--prompt", "Tell me.", "--max-new-tokens", 20, *words)
    assert succeed(*asks, "--stream").out == succeed(*asks).out != "\n"


def test_an_output_that_knows_ascii_only_gets_what_it_can_hold(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["generate", str(checkpoint), "--prompt", "Tell me.", "--max-new-tokens", "20"]
    whole = succeed(*words).out
    assert not whole.isascii()
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # Typer replaces it
    for more in ([], ["--stream"]):
        written = io.BytesIO()
        output = io.TextIOWrapper(written, encoding="ascii", write_through=True)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "argv", ["diffvl", *words, *more])
            patch.setattr(sys, "stdout", output)
            cli.main()
        assert stop.value.code == 0 and written.getvalue() == whole.encode("ascii", "replace")


# --- files of prompts -----------------------------------------------------------------------------------------------------


def write_lines(file: Path, *lines: object) -> Path:
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return file


def test_a_batch_answers_every_line_in_order(checkpoint: Path, image: Path, tmp_path: Path):
    (tmp_path / "sub").mkdir()
    file = write_lines(
        tmp_path / "ask.jsonl",
        {"prompt": "What is it?", "image": "seen.png", "id": "first"},
        {"prompt": PROMPTS[1]},
        "",
        {"prompt": "<image> or <image>?", "images": ["seen.png", "./sub/../seen.png"], "id": 7},
        {"prompt": "Hi", "image": "", "id": None},
    )
    ended = succeed("generate", checkpoint, "--batch", file, "--batch-size", 3, "--max-new-tokens", 12, "--steps", 2)
    lines = [json.loads(line) for line in ended.out.splitlines()]
    assert [line["id"] for line in lines] == ["first", 2, 7, 5]
    asks = [["What is it?", image], [PROMPTS[1]], ["<image> or <image>?", image, image], ["Hi"]]
    for line, (prompt, *images) in zip(lines, asks, strict=True):
        words = [word for one in images for word in ("--image", one)]
        alone = asked(checkpoint, "--prompt", prompt, "--steps", 2, *words)
        assert list(line) == ["id", *alone]
        assert (line["text"], line["tokens"]) == (alone["text"], alone["tokens"])
    assert ended.err.startswith("answering in batches: 2/2 done in ")


def test_a_batch_leaves_its_output_alone_when_a_bar_is_drawn(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A bar on the terminal's stderr takes sys.stdout for its own; the answers must still go to the file."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    file = write_lines(tmp_path / "ask.jsonl", {"prompt": "Hi"}, {"prompt": "Ho"})
    ended = succeed("generate", checkpoint, "--batch", file, "--batch-size", 1, "--max-new-tokens", 4)
    assert [json.loads(line)["id"] for line in ended.out.splitlines()] == [1, 2]
    assert "answering in batches" in ended.err and "{" not in ended.err


GOOD = {"prompt": "Hi"}


@pytest.mark.parametrize(("line", "says"), [
    ('{"prompt": "Hi"', "ask.jsonl:2: malformed JSON at column"),
    ("[1]", "ask.jsonl:2: expected an object with `prompt`, got list"),
    ({"promt": "Hi"}, "ask.jsonl:2: unknown key 'promt': expected prompt, image, images, video, videos, id"),
    ({"image": "seen.png"}, "ask.jsonl:2: `prompt` must be a text; it is missing"),
    ({"prompt": 3}, "ask.jsonl:2: `prompt` must be a text"),
    ({"prompt": "Hi", "id": 1.5}, "ask.jsonl:2: `id` must be a string or a whole number, got float"),
    ({"prompt": "Hi", "image": ["seen.png"]}, "ask.jsonl:2: `image` must be a path; a list of paths is named `images`"),
    ({"prompt": "Hi", "images": "seen.png"}, "ask.jsonl:2: `images` must be a list of paths"),
    ({"prompt": "Hi", "images": [""]}, "ask.jsonl:2: an image must be named by its path"),
    ({"prompt": "Hi", "image": "seen.png", "images": []}, "ask.jsonl:2: both `image` and `images`: keep one of them"),
    ({"prompt": "Hi", "image": "https://example.org/a.png"}, "ask.jsonl:2: an image is a file, not a URL: https://example.org/a.png"),
    ({"prompt": "Hi", "image": "none.png"}, "none.png does not exist (relative paths start at the file's folder)"),
    ({"prompt": "Hi", "image": "text.png"}, "text.png cannot be read (cannot identify image file"),
    ({"prompt": "<image>"}, "ask.jsonl:2: the prompt has 1 <image> markers, 0 images were given"),
    ({"prompt": "Hi <|MASK|>"}, "ask.jsonl:2: the text holds '<|MASK|>', which stands for a token not known yet"),
    ('{"prompt": "\\ud800"}', "ask.jsonl:2: the prompt is not valid UTF-8 text (character 1, '\\ud800')"),
    ({"prompt": "Hi " * 400}, "new ones do not fit the context of 512: shorten the prompt or lower --max-new-tokens"),
])  # fmt: skip
def test_a_bad_line_is_told_before_anything_is_decoded(line: object, says: str, checkpoint: Path, image: Path, tmp_path: Path):
    (tmp_path / "text.png").write_text("I am no image", encoding="utf-8")
    file = write_lines(tmp_path / "ask.jsonl", GOOD, line, GOOD)
    ended = tiny_runs.command("generate", checkpoint, "--batch", file)
    assert (ended.code, ended.out) == (2, "")
    message = tiny_runs.the_message(ended.err)
    assert message.startswith(f"{file}:2: ") and says in message and message.count("\n") == 1


def test_several_bad_lines_are_told_at_once(checkpoint: Path, tmp_path: Path):
    file = write_lines(tmp_path / "ask.jsonl", *[{"prompt": number} for number in range(7)], GOOD)
    message = refused("generate", checkpoint, "--batch", file, says=["7 problems, nothing was answered", "and 2 more"])
    assert [line.split(": ")[0] for line in message.splitlines()[1:6]] == [f"  {file}:{number}" for number in range(1, 6)]
    empty = write_lines(tmp_path / "empty.jsonl")
    refused("generate", checkpoint, "--batch", empty, says=[f"{empty}: no prompts in it"])
    refused("generate", checkpoint, "--batch", tmp_path / "no.jsonl", says=["no.jsonl: no such data file"])


# --- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "says"), [
    (("--steps", 5), "--steps is 5, expected 1 to the block size, 4: a block has no more tokens"),
    (("--image", "none.png"), "--image: image none.png does not exist"),
    (("--max-new-tokens", 510), "and 510 new ones do not fit the context of 512: shorten the prompt or lower --max-new-tokens"),
    (("--image", "seen.png", "--prompt", "<image><image>"), "the prompt has 2 <image> markers, 1 images were given"),
    (("--temperature", "inf"), "temperature is inf, expected 0 (the likeliest token) or 0.0001 to 10000"),
    (("--temperature", 1e-40), "temperature is 1e-40, expected 0 (the likeliest token) or 0.0001 to 10000"),
    (("--mode", "speculative", "--compile"), "--compile has no effect with --mode speculative"),
    (("--prompt", "\udcff"), "the prompt is not valid UTF-8 text (character 1, '\\udcff')"),
])  # fmt: skip
def test_generate_refuses(
    words: Sequence[object], says: str, checkpoint: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    refused("generate", checkpoint, "--prompt", "What is it?", *words, says=[says])


def test_what_a_checkpoint_was_not_trained_for(other_context: Path, prepared: Callable[[str], Path]):
    words = ("generate", other_context, "--prompt", "Hi", "--max-new-tokens", 4)
    refused(*words, "--mode", "speculative", says=["--mode speculative needs a checkpoint trained with context: causal"])
    succeed(*words, "--mode", "ar")
    says = ["--steps is 2, expected 1 to the block size, 1, which has seen the next-token objective only"]
    refused("generate", prepared("llama"), "--prompt", "Hi", "--steps", 2, says=says)


@pytest.mark.parametrize(("change", "says"), [
    ({"grid": "foo"}, "grid is 'foo', expected one of absolute, response"),
    ({"decoding": None}, "decoding is None, expected one of blocks, ar"),
    ({"text_config": None}, "config.json: no text_config in it; copy the checkpoint again"),
    ({"vision_config": {}}, "a part of the configuration (text_config, vision_config, source_config) names no model_type"),
])  # fmt: skip
def test_a_damaged_configuration_is_told(change: dict[str, Any], says: str, checkpoint: Path, tmp_path: Path):
    damaged = tiny_runs.copy(checkpoint, tmp_path / "damaged")
    config = json.loads((damaged / "config.json").read_text(encoding="utf-8")) | change
    (damaged / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused("generate", damaged, "--prompt", "Hi", says=[says])


# --- compiled -------------------------------------------------------------------------------------------------------------


def compiled_by(backend: Any) -> dict[str, Any]:
    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode="default")
    return {"cache_implementation": "static", "compile_config": config}


def test_a_compiled_trunk_says_the_same(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    """The graph is run as it is; kernels that are made for it are for tests/hub/test_static.py."""
    plain = {mode: asked(checkpoint, "--prompt", "Tell me.", "--mode", mode) for mode in ("blocks", "ar")}
    monkeypatch.setattr(decode, "COMPILED", compiled_by("eager"))
    torch.compiler.reset()
    for mode, expected in plain.items():
        done = succeed(
            "generate", checkpoint, "--max-new-tokens", 12, "--prompt", "Tell me.", "--mode", mode, "--compile", "--json"
        )
        given = json.loads(done.out)
        assert [given[name] for name in ("text", "tokens", "forwards")] == [
            expected[name] for name in ("text", "tokens", "forwards")
        ]
        assert "the trunk is compiled while the first answer is decoded" in done.err


def test_what_cannot_be_compiled_is_one_message(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler on this machine")

    monkeypatch.setattr(decode, "COMPILED", compiled_by(broken))
    torch.compiler.reset()
    says = ["--compile: this llama trunk cannot be compiled here (", "leave --compile out"]
    refused("generate", checkpoint, "--prompt", "Hi", "--max-new-tokens", 12, "--compile", says=says)


def test_a_trunk_that_cannot_keep_a_shape_is_one_message(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    def odd(trunk: Any) -> None:
        raise ValueError("its forward is odd")

    monkeypatch.setattr(decode, "require_static", odd)
    words = ("generate", checkpoint, "--prompt", "Hi", "--max-new-tokens", 4)
    refused(*words, "--compile", says=["--compile: its forward is odd; leave --compile out"])
    succeed(*words)


@pytest.mark.parametrize("verb", ["generate", "chat"])
@pytest.mark.parametrize(("config", "says"), [
    ({"model_type": "llama"}, "a 'llama' checkpoint; expected one that `diffvl convert` wrote. To convert it: diffvl convert"),
    ({"model_type": "sdar"}, "a block-diffusion checkpoint of another project (model_type 'sdar'), which decodes with its own"),
    ({"model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"]}, "(model_type 'sdar_moe', SDARMoeForCausalLM)"),
    ({"model_type": "llava_onevision", "text_config": {"model_type": "sdar"}}, "project (model_type 'llava_onevision')"),
    ({"model_type": "diffusionvl_qwenvl"}, "Decode it with transformers and trust_remote_code=True"),
    ([], "config.json: expected a JSON object, got list"),
])  # fmt: skip
def test_checkpoints_of_another_kind_are_named(verb: str, config: Any, says: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    words = ("--prompt", "Hi") if verb == "generate" else ()
    assert refused(verb, tmp_path, *words, says=[says]).startswith(str(tmp_path))


def test_an_image_is_looked_at_before_the_weights_are_read(tmp_path: Path):
    refused("generate", tmp_path / "nowhere", "--prompt", "Hi", "--image", tmp_path / "no.png", says=["no.png does not exist"])


def test_watching_needs_a_terminal(checkpoint: Path):
    says = ["--watch draws in a terminal, and this output is none (a file or a pipe): use --stream"]
    refused("generate", checkpoint, "--prompt", "Hi", "--watch", says=says)
