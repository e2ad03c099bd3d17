"""`diffvl bench decode` and `diffvl bench modes`: no figure without a proof, right sums, and what they print. The published loop
itself: test_published_decoder.py.

Nothing here looks at a clock: times enter as made-up numbers, or not at all.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from block_checkpoints import block_checkpoint
from decode_prompts import CPU, TINY, chat, prompts_of, tiny
from helpers import CONTEXTS
from shared_fixtures import TILED, Loaded
from tiny_runs import refused, succeed
from transformers import LlamaConfig, LlamaForCausalLM

from diffvl.bench import decode, published_decoder
from diffvl.bench.answers import THRESHOLDS, ScoredAnswer
from diffvl.bench.answers import make_row as answers_row
from diffvl.bench.comparison import DecodeRow
from diffvl.bench.decode import (
    DecodeBench,
    compiled_batches,
    decode_cases,
    equal_share,
    make_row,
    parse_numbers,
    streamed_bytes,
    with_ratios,
)
from diffvl.bench.decoders import DECODERS, NEVER, Case, Decoded, Prompts, ar_generate, blocks_and_steps, ours
from diffvl.bench.equality import in_fp32, prove_same_tokens
from diffvl.bench.random_model import build_model
from diffvl.bench.timing import DecodeTiming, time_first
from diffvl.decode.answer import Answer
from diffvl.errors import TrainingError, UsageError

KEYS = {
    *("decoder", "steps", "compiled", "block_size", "batch", "forwards_per_token", "tokens_per_second", "first_token_seconds"),
    *("tokens", "forwards", "prefill_forwards", "forward_seconds", "seconds", "spread", "ratio_to_ar", "ratio_to_published"),
}
IN_BLOCKS = {"blocks", "steps_due"}  # keys of decoders that decode in blocks


# --- the proof -------------------------------------------------------------------------------------------------------------


def test_decoders_that_disagree_give_no_figures(monkeypatch: pytest.MonkeyPatch):
    """Here the published loop settles one token in its first step whatever the quota."""
    monkeypatch.setattr(published_decoder, "quota", lambda masks, steps, step: masks if step else 1)
    model, prompts = tiny()
    with pytest.raises(TrainingError, match=r"do not give the same tokens here \(4 steps, greedy, fp32\)"):
        prove_same_tokens(model, [prompts], [4])
    message = "ours and the published loop do not give the same tokens"
    refused("bench", "decode", "--quick", "--json", "--device", "cpu", says=[message])


def test_the_proof_counts_what_it_compared():
    model, prompts = tiny()
    found = prove_same_tokens(model, [prompts, prompts.shortened(8)], [8, 2])
    assert found["equal_tokens"] == 2 * (16 + 8) and found["different_tokens"] > 4


def test_weights_come_back_from_fp32_as_they_were():
    model = build_model(TINY, CPU, torch.bfloat16, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rotary = model.language_model.model.rotary_emb.inv_freq.clone()
    with in_fp32(model):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])
    assert torch.equal(model.language_model.model.rotary_emb.inv_freq, rotary) and rotary.dtype == torch.float32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# --- the other two decoders --------------------------------------------------------------------------------------------------


def test_ar_is_the_trunks_own_generate_without_a_stop():
    model, prompts = tiny(batch=3, tokens=12)
    assert prompts.lengths == [96, 64, 128]
    found = ar_generate(model, prompts, 1)
    assert (found.forwards, found.prefills, found.tokens) == (12, 0, 36)
    for place in range(3):
        alone = prompts.part(place, place + 1)
        assert alone.ids.shape == (1, prompts.lengths[place]) and bool(alone.valid.all())
        ids = alone.ids
        for _ in range(12):
            ids = torch.cat([ids, model.language_model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        assert ids[0, alone.ids.shape[1] :].tolist() == found.answers[place]
    calls: list[None] = []
    assert ar_generate(model, prompts, 1, lambda: calls.append(None)).tokens == 3 and len(calls) == 1


@pytest.mark.parametrize("name", ["llama", TILED])
def test_ar_sees_images_and_its_stops(name: str, loaded: Callable[[str], Loaded]):
    model, _ = both = loaded(name)
    model.config.set_decoding("blocks", 4, "causal", "response", "same")
    prompts = prompts_of(both, [chat("What?", True), chat("A longer question?"), chat("And?", True)], 6, frozenset({NEVER}))
    answers = ar_generate(model, prompts, 1).answers
    other = ar_generate(model, prompts_of(both, [chat("What?", True)], 6, frozenset({NEVER})), 1).answers
    assert answers[0] == other[0]
    last = prompts.part(2, 3)
    assert torch.equal(last.pixels["pixel_values"], prompts.pixels["pixel_values"][1:])
    assert not prompts.part(1, 2).pixels
    assert ar_generate(model, last, 1).answers[0] == answers[2]
    stopping = Prompts(last.ids, last.valid, 6, frozenset({answers[2][1]}), last.images)
    assert ar_generate(model, stopping, 1).answers == [answers[2][: answers[2].index(answers[2][1]) + 1]]


@pytest.mark.parametrize("context", CONTEXTS)
def test_ours_makes_d_forwards_a_block_in_a_batch_too(context: str):
    model, prompts = tiny(context, batch=3, tokens=24)
    for steps in (8, 4, 2):
        found = ours(model, prompts, steps)
        assert found.forwards - found.prefills == 3 * steps and found.prefills == int(context == "causal")
        alone = [ours(model, prompts.part(place, place + 1), steps).answers[0] for place in range(3)]
        assert found.answers == alone
    calls: list[None] = []
    ours(model, prompts.shortened(1), 4, lambda: calls.append(None))
    assert len(calls) == 4, "once a step of the one block"


def test_steps_that_are_due():
    class Config:
        block_size, grid = 8, "absolute"

    assert blocks_and_steps(Config, [16], [16], 4) == (2, 8)
    assert blocks_and_steps(Config, [16], [9], 4) == (2, 8)
    # Five tokens of the prompt in the first block leave three masks.
    assert blocks_and_steps(Config, [21], [3], 4) == (1, 3)
    assert blocks_and_steps(Config, [21], [4], 4) == (2, 7)
    assert blocks_and_steps(Config, [21, 16], [19, 8], 4) == (3, 12)
    Config.grid = "response"
    assert blocks_and_steps(Config, [21], [3], 4) == (1, 4)


# --- sums ------------------------------------------------------------------------------------------------------------------


def made_up(decoder: str, steps: int, batch: int, speed: float, compiled: bool = False) -> DecodeRow:
    return DecodeRow(
        decoder=decoder,
        steps=steps,
        compiled=compiled,
        block_size=8,
        batch=batch,
        forwards_per_token=1.0,
        tokens_per_second=speed,
        first_token_seconds=0.1,
        tokens=64,
        forwards=64,
        prefill_forwards=0,
        forward_seconds=None,
        seconds=[1.0],
        spread=0.0,
        ratio_to_ar=None,
        ratio_to_published=None,
    )


def test_a_row_is_medians_and_sums():
    model, prompts = tiny(batch=2, tokens=16)
    groups = [prompts, prompts]
    decoded = Decoded([[1] * 16, [2] * 10], forwards=9, prefills=1)
    timing = DecodeTiming([decoded, decoded], [4.0, 2.0, 3.0], [0.5, 0.4, 9.0])
    timings = {Case("ours", 4): timing, Case("ar_generate", 1): timing}
    row = make_row(Case("ours", 4), groups, timings, model.config)
    assert row.tokens == 52 and row.tokens_per_second == pytest.approx(52 / 3)
    assert row.forwards_per_token == pytest.approx(16 * 2 / 52)
    assert row.first_token_seconds == 0.5 and row.spread == pytest.approx(2 / 3)
    assert row.forward_seconds == pytest.approx((3 - 2 * 0.5) / (18 - 2 - 2))
    assert (row.blocks, row.steps_due) == (4, 16) and set(row.json) == KEYS | IN_BLOCKS
    ar = make_row(Case("ar_generate", 1), groups, timings, model.config)
    assert (ar.steps, ar.block_size) == (1, 1) and set(ar.json) == KEYS


def test_ratios_are_to_ar_at_the_same_batch_and_to_published_alone():
    rows = [made_up("ar_generate", 1, 1, 20.0), made_up("published", 4, 1, 10.0), made_up("ours", 4, 1, 15.0)]
    rows += [made_up("ar_generate", 1, 8, 80.0), made_up("ours", 4, 8, 60.0), made_up("ours", 2, 8, 90.0)]
    rows = with_ratios(rows)
    assert [row.ratio_to_ar for row in rows] == [1.0, 0.5, 0.75, 1.0, 0.75, 1.125]
    assert [row.ratio_to_published for row in rows] == [None, 1.0, 1.5, None, 6.0, None]
    alone = with_ratios([made_up("ours", 4, 8, 60.0)])
    assert (alone[0].ratio_to_ar, alone[0].ratio_to_published) == (None, None)


def test_a_compiled_row_is_compared_with_the_plain_ones():
    rows = [made_up("ar_generate", 1, 1, 190.0, compiled=True), made_up("ar_generate", 1, 1, 100.0)]
    rows += [made_up("published", 4, 1, 100.0), made_up("ours", 4, 1, 110.0), made_up("ours", 4, 1, 250.0, compiled=True)]
    rows = with_ratios(rows)
    assert [row.ratio_to_ar for row in rows] == [1.9, 1.0, 1.0, 1.1, 2.5]
    assert [row.ratio_to_published for row in rows] == [None, None, 1.0, 1.1, 2.5]


def test_compiled_tokens_are_compared_place_by_place():
    def timing(*answers: list[int]) -> DecodeTiming:
        return DecodeTiming([Decoded([answer], 4, 0) for answer in answers], [1.0], [0.5])

    assert equal_share(timing([1, 2, 9, 4], [5]), timing([1, 2, 3, 4], [5, 6])) == 4 / 6


def test_what_is_compiled():
    """At batch 1, and not the published loop, which has no fixed shapes."""
    chosen = decode_cases((4, 2), 1, True)
    assert [case.name for case in chosen if case.compiled] == ["ar_generate 1 compiled", "ours 4 compiled", "ours 2 compiled"]
    assert [case for case in chosen if not case.compiled] == decode_cases((4, 2), 1, False)
    assert [case.name for case in decode_cases((4,), 8, True) if case.compiled] == ["ar_generate 1 compiled", "ours 4 compiled"]


@pytest.mark.parametrize(
    ("request_", "device", "expected"),
    [
        (DecodeBench(), "cpu", ()),
        (DecodeBench(), "cuda", (1,)),
        (DecodeBench(compile=False), "cuda", ()),
        (DecodeBench(compile=True), "cpu", (1,)),
        (DecodeBench(compile_batch="1,8"), "cpu", (1, 8)),
    ],
)
def test_at_which_batch_sizes_is_compiled(request_: DecodeBench, device: str, expected: tuple[int, ...]):
    assert compiled_batches(request_, (1, 8, 32), torch.device(device)) == expected


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (DecodeBench(compile=False, compile_batch="1"), "--compile-batch has no effect with --no-compile"),
        (DecodeBench(compile_batch="4"), "--compile-batch 4 is not among the batch sizes 1, 8"),
        (DecodeBench(compile_batch="x"), "--compile-batch 'x': expected whole numbers"),
    ],
)
def test_compiled_batch_sizes_must_be_measured(request_: DecodeBench, says: str):
    with pytest.raises(UsageError) as error:
        compiled_batches(request_, (1, 8), torch.device("cpu"))
    assert says in str(error.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_compiled_forms_are_measured():
    """On the CPU's own compiler; in fp32 the tokens are the same."""
    words = ("bench", "decode", "--quick", "--json", "--device", "cpu", "--batch", 1, "--steps", 4, "--compile")
    report = json.loads(succeed(*words).out)
    rows = [(one["decoder"], one["compiled"], one.get("equal_to_plain")) for one in report["rows"]]
    assert rows == [
        *(("ar_generate", False, None), ("published", False, None), ("ours", False, None)),
        *(("ar_generate", True, 1.0), ("ours", True, 1.0)),
    ]


def test_streamed_weights_count_an_embedding_only_where_the_head_shares_it():
    sizes: Any = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
    for tied in (True, False):
        trunk: Any = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied))
        every = sum(parameter.numel() for parameter in trunk.parameters())
        assert every > 40 * 16 * (1 if tied else 2)
        assert streamed_bytes(trunk) == 4 * (every - (0 if tied else 40 * 16))


def test_a_sweep_row_sums_over_answers():
    def given(tokens: int, forwards: int, seconds: float) -> Answer:
        return Answer("", tokens, forwards, tokens / forwards, seconds / 2, seconds / 2, seconds + 5)

    scored = [ScoredAnswer(given(6, 3, 2.0), True, 1.0), ScoredAnswer(given(10, 5, 6.0), False, 0.5)]
    row = answers_row(scored, threshold=0.9)
    assert (row.tokens_per_forward, row.tokens_per_second) == (2.0, 2.0)
    assert (row.exact_match, row.edit_similarity, row.answers) == (0.5, 0.75, 2)
    sums = {"tokens_per_forward", "tokens_per_second", "exact_match", "edit_similarity"}
    sums |= {"answers", "tokens", "forwards", "seconds"}
    assert set(row.json) == {"threshold"} | sums
    assert set(answers_row(scored, mode="ar").json) == {"mode"} | sums


# --- the command -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(prepared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return block_checkpoint(prepared("qwen2"), tmp_path_factory.mktemp("bench") / "qwen2", grid="response")


@pytest.mark.parametrize("context", ["causal", pytest.param("block", marks=pytest.mark.slow)])
def test_a_quick_run_prints_one_json_object_and_nothing_else(context: str):
    done = succeed("bench", "decode", "--quick", "--json", "--device", "cpu", "--repeats", 2, "--context", context)
    report = json.loads(done.out)
    assert list(report) == ["machine", "rows"]
    machine = report["machine"]
    assert {"cpu", "cores", "memory_gb", "accelerator", "torch", "transformers", "date"} < set(machine)
    assert machine["settings"]["quick"] is True and machine["context"] == context
    assert machine["floor_seconds"] == pytest.approx(machine["weight_bytes"] / machine["bytes_per_second"])
    blocks = [("published", steps, 8, 1) for steps in (8, 4, 2)]
    assert [(one["decoder"], one["steps"], one["block_size"], one["batch"]) for one in report["rows"]] == [
        *(("ar_generate", 1, 1, 1), *blocks, *(("ours", *rest) for _, *rest in blocks)),
        *(("ar_generate", 1, 1, 2), *(("ours", steps, 8, 2) for steps in (8, 4, 2))),
    ]
    for one in report["rows"]:
        assert one["tokens_per_second"] == pytest.approx(16 * one["batch"] / (sum(one["seconds"]) / 2))
        assert set(one) == KEYS | (IN_BLOCKS if one["decoder"] != "ar_generate" else set())
        assert one["first_token_seconds"] > 0 and len(one["seconds"]) == 2
        extra = {"ar_generate": 0, "published": 1, "ours": 0}[one["decoder"]]
        assert one["forwards_per_token"] == (one["steps"] + extra) / one["block_size"]
        if one["decoder"] != "ar_generate":
            forwards = one["steps_due"] + extra * one["blocks"]
            assert one["forwards"] - one["prefill_forwards"] == forwards == (one["steps"] + extra) * 2
    assert [one["ratio_to_published"] is None for one in report["rows"]] == [one["steps"] == 1 for one in report["rows"]]
    assert "met" not in done.err, "targets of the project are no part of the figures (tools/targets.py)"


def test_a_checkpoint_is_measured_on_its_questions_with_its_own_stops(
    checkpoint: Path, shapes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(decode, "QUESTIONS", 2)
    words = ("bench", "decode", checkpoint, "--device", "cpu", "--batch", "1,2", "--steps", "4,1", "--repeats", 1)
    report = json.loads(succeed(*words, "--data", shapes["test"], "--max-new-tokens", 6, "--json").out)
    assert report["machine"]["prompts"] == {"1": 2, "2": 2} and len(report["machine"]["prompt_tokens"]) == 2
    assert [(one["decoder"], one["steps"], one["batch"]) for one in report["rows"]] == [
        *(("ar_generate", 1, 1), ("published", 4, 1), ("published", 1, 1), ("ours", 4, 1), ("ours", 1, 1)),
        *(("ar_generate", 1, 2), ("ours", 4, 2), ("ours", 1, 2)),
    ]
    for one in report["rows"]:
        assert 2 <= one["tokens"] <= 12
    out = succeed(*words, "--max-new-tokens", 3).out
    for word in ("published is single-sample", "qwen2", "/ ar_generate", "ours = published"):
        assert word in out


def test_a_sweep_prints_a_row_for_each_threshold(checkpoint: Path, shapes: dict[str, Path]):
    words = ("bench", "decode", checkpoint, "--device", "cpu", "--data", shapes["test"], "--sweep", "--limit", 2)
    report = json.loads(succeed(*words, "--max-new-tokens", 8, "--json").out)
    assert list(report) == ["machine", "rows"]
    assert [one["threshold"] for one in report["rows"]] == list(THRESHOLDS)
    assert report["machine"]["questions"] == 2
    assert report["rows"][0]["tokens_per_forward"] <= 1.0, "at 1.0 tokens settle one by one"
    for one in report["rows"]:
        assert one["tokens_per_forward"] == one["tokens"] / one["forwards"] and one["answers"] == 2
        assert 0 <= one["edit_similarity"] <= 1
    out = succeed(*words, "--max-new-tokens", 4).out
    assert "tokens/forward" in out and "0.95" in out


def test_the_two_modes_of_a_checkpoint_on_the_same_questions(checkpoint: Path, shapes: dict[str, Path]):
    words = ("bench", "modes", checkpoint, "--device", "cpu", "--data", shapes["test"], "--limit", 2, "--max-new-tokens", 6)
    report = json.loads(succeed(*words, "--json").out)
    blocks, ar = report["rows"]
    assert (blocks["mode"], ar["mode"]) == ("blocks", "ar")
    assert blocks["answers"] == ar["answers"] == report["machine"]["questions"] == 2
    assert ar["tokens_per_forward"] == 1.0, "token by token"
    assert report["speedup"] == blocks["tokens_per_second"] / ar["tokens_per_second"]
    line = succeed(*words).out
    assert "in blocks of 4: " in line and "; token by token: 1.00 tokens per forward, " in line and line.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "9"], "--steps 9: expected at most the block size, 8"),
        (["--steps", "4,x"], "--steps '4,x': expected whole numbers from 1 on with commas between them, as in 8,4,2"),
        (["--steps", "0"], "--steps '0': expected whole numbers from 1 on"),
        (["--batch", "1,1"], "--batch '1,1': a number is named twice"),
        (["--hidden", "100"], "--hidden 100: expected a multiple of"),
        (["--data", "x.json"], "--data has no effect without DIR"),
        (["--limit", "3"], "--limit 3 has no effect without --sweep"),
        (["--sweep"], "--sweep measures answers against true ones: give DIR and --data FILE"),
        (["missing", "--device", "cpu"], "missing"),
        (["DIR", "--layers", "2", "--seed", "1"], "--layers, --seed with DIR: the checkpoint has its own sizes"),
        (["DIR", "--steps", "5"], "--steps 5: expected at most the block size, 4"),
        (["DIR", "--max-new-tokens", "600"], "600 new ones do not fit the context of"),
        (["DIR", "--data", "missing.json"], "missing.json"),
        (["DIR", "--data", "x.json", "--sweep", "--steps", "2"], "--steps has no effect with --sweep"),
        (["DIR", "--data", "missing.json", "--sweep"], "missing.json"),
    ],
)
def test_words_that_do_not_fit_are_one_message_and_code_2(words: list[str], message: str, checkpoint: Path):
    given = [str(checkpoint) if word == "DIR" else word for word in words]
    quick = [] if {str(checkpoint), "missing", "--hidden"} & set(given) else ["--quick"]
    refused("bench", "decode", *given, *quick, says=[message])


def test_checkpoints_that_cannot_be_compared_are_refused(prepared: Callable[[str], Path], tmp_path: Path):
    refused("bench", "decode", prepared("llama"), says=["the checkpoint decodes token by token"])
    shifted = block_checkpoint(prepared("llama"), tmp_path / "shifted", target="shift")
    refused("bench", "decode", shifted, says=["the checkpoint has target 'shift'"])


def test_numbers():
    assert parse_numbers("--steps", "8, 4,2", ()) == (8, 4, 2)
    assert parse_numbers("--steps", None, [3]) == (3,)
    assert set(DECODERS) == {"ar_generate", "published", "ours"}


def test_rounds():
    """Fewer at larger batches, and few for a checkpoint, which has several prompts."""
    rounds = [decode.num_rounds(DecodeBench(), CPU, batch) for batch in (1, 2, 8, 32)]
    assert rounds == [5, 3, 3, 1]
    assert decode.num_rounds(DecodeBench(directory=Path("x")), CPU, 1) == 2
    assert decode.num_rounds(DecodeBench(quick=True), CPU, 1) == 1
    assert decode.num_rounds(DecodeBench(repeats=4, quick=True), CPU, 8) == 4


@pytest.mark.parametrize("decoder", list(DECODERS))
def test_the_time_to_the_first_token_is_that_of_one_prediction(decoder: str):
    """The call ends there: a prefill where the decoder makes one, and one forward that predicts."""
    model, prompts = tiny("causal")
    forwards: list[None] = []
    hook = model.language_model.register_forward_pre_hook(lambda *_: forwards.append(None))
    assert time_first(model, prompts, Case(decoder, 4), CPU) > 0
    hook.remove()
    assert len(forwards) == (1 if decoder == "ar_generate" else 2)
