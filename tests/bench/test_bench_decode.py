"""`diffvl bench decode`: no figure without a proof, right sums, and what it prints. The loop itself: test_published_decoder.py.

Nothing here looks at a clock: times enter as made-up numbers, or not at all.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from block_checkpoints import block_checkpoint
from conftest import Loaded
from decode_prompts import CPU, TINY, chat, prompts_of, tiny
from helpers import CONTEXTS
from tiny_runs import refused, succeed
from transformers import LlamaConfig, LlamaForCausalLM

from diffvl.bench import decode, published_decoder
from diffvl.bench.answered import Scored
from diffvl.bench.bandwidth import streamed_bytes
from diffvl.bench.decode import Case, Timed, add_ratios, cases, equality, in_fp32, prove_same_tokens, row
from diffvl.bench.decode_bars import DecodeVerdict, decode_verdicts
from diffvl.bench.decode_request import DecodeBench, numbers
from diffvl.bench.decoders import DECODERS, NEVER, Decoded, Prompts, ar_generate, blocks_and_steps, ours
from diffvl.bench.forms import build_model
from diffvl.bench.sweep import THRESHOLDS, sweep_row
from diffvl.decode.answer import Answer
from diffvl.errors import TrainingError

Row = dict[str, Any]


# --- the proof -------------------------------------------------------------------------------------------------------------


def test_decoders_that_disagree_give_no_figures(monkeypatch: pytest.MonkeyPatch):
    """Here the published loop settles one token in its first step whatever the quota."""
    monkeypatch.setattr(published_decoder, "quota", lambda masks, steps, step: masks if step else 1)
    model, prompts = tiny()
    with pytest.raises(TrainingError, match=r"do not give the same tokens here \(4 steps, greedy, fp32\)"):
        prove_same_tokens(model, [prompts], [4])
    said = ["ours and the published loop do not give the same tokens"]
    refused("bench", "decode", "--quick", "--json", "--device", "cpu", says=said)


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
        alone = prompts.part(place, place + 1, model.config)
        assert alone.ids.shape == (1, prompts.lengths[place]) and bool(alone.valid.all())
        ids = alone.ids
        for _ in range(12):
            ids = torch.cat([ids, model.language_model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        assert ids[0, alone.ids.shape[1] :].tolist() == found.answers[place]
    calls: list[None] = []
    assert ar_generate(model, prompts, 1, lambda: calls.append(None)).tokens == 3 and len(calls) == 1


def test_ar_sees_pictures_and_its_stops(loaded: Callable[[str], Loaded]):
    model, _ = both = loaded("llama")
    model.config.set_decoding("blocks", 4, "causal", "response", "same")
    prompts = prompts_of(both, [chat("What?", True), chat("A longer question?"), chat("And?", True)], 6, frozenset({NEVER}))
    answers = ar_generate(model, prompts, 1).answers
    other = ar_generate(model, prompts_of(both, [chat("What?", True)], 6, frozenset({NEVER})), 1).answers
    assert answers[0] == other[0]
    last = prompts.part(2, 3, model.config)
    assert prompts.pixel_values is not None and last.pixel_values is not None
    assert torch.equal(last.pixel_values, prompts.pixel_values[1:]) and prompts.part(1, 2, model.config).pixel_values is None
    assert ar_generate(model, last, 1).answers[0] == answers[2]
    stopping = Prompts(last.ids, last.valid, last.pixel_values, 6, frozenset({answers[2][1]}))
    assert ar_generate(model, stopping, 1).answers == [answers[2][: answers[2].index(answers[2][1]) + 1]]


@pytest.mark.parametrize("context", CONTEXTS)
def test_ours_makes_d_forwards_a_block_in_a_batch_too(context: str):
    model, prompts = tiny(context, batch=3, tokens=24)
    for steps in (8, 4, 2):
        found = ours(model, prompts, steps)
        assert found.forwards - found.prefills == 3 * steps and found.prefills == int(context == "causal")
        alone = [ours(model, prompts.part(place, place + 1, model.config), steps).answers[0] for place in range(3)]
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


def made_up(decoder: str, steps: int, batch: int, speed: float, **more: Any) -> Row:
    common = {"block_size": 1 if decoder == "ar_generate" else 8, "tokens_per_second": speed, "forward_seconds": 0.006}
    common |= {"prefill_forwards": int(decoder == "published")}
    if decoder != "ar_generate":
        extra = 9 if decoder == "published" else 0
        common |= {"blocks": 8, "steps_due": 8 * steps, "forwards": 8 * steps + extra}
    return {"decoder": decoder, "steps": steps, "batch": batch, "compiled": False, **common, **more}


def test_a_row_is_medians_and_sums():
    model, prompts = tiny(batch=2, tokens=16)
    groups = [prompts, prompts]
    decoded = Decoded([[1] * 16, [2] * 10], forwards=9, prefills=1)
    timed = Timed([decoded, decoded], [4.0, 2.0, 3.0], [0.5, 0.4, 9.0])
    found = row(Case("ours", 4), groups, timed, model.config)
    assert found["tokens"] == 52 and found["tokens_per_second"] == pytest.approx(52 / 3)
    assert found["forwards_per_token"] == pytest.approx(16 * 2 / 52)
    assert found["first_token_seconds"] == 0.5 and found["spread"] == pytest.approx(2 / 3)
    assert found["forward_seconds"] == pytest.approx((3 - 2 * 0.5) / (18 - 2 - 2))
    assert (found["blocks"], found["steps_due"]) == (4, 16)
    ar = row(Case("ar_generate", 1), groups, timed, model.config)
    assert (ar["steps"], ar["block_size"]) == (1, 1) and "steps_due" not in ar


def test_ratios_are_to_ar_at_the_same_batch_and_to_published_alone():
    rows = [made_up("ar_generate", 1, 1, 20.0), made_up("published", 4, 1, 10.0), made_up("ours", 4, 1, 15.0)]
    rows += [made_up("ar_generate", 1, 8, 80.0), made_up("ours", 4, 8, 60.0), made_up("ours", 2, 8, 90.0)]
    add_ratios(rows)
    assert [one["ratio_to_ar"] for one in rows] == [1.0, 0.5, 0.75, 1.0, 0.75, 1.125]
    assert [one["ratio_to_published"] for one in rows] == [None, 1.0, 1.5, None, 6.0, None]


def test_bars_of_a_cpu():
    speeds = {8: (10.0, 10.0), 4: (18.0, 20.0), 2: (30.0, 32.0)}
    rows = [made_up("ar_generate", 1, 1, 25.0)]
    for steps, (other, own) in speeds.items():
        rows += [made_up("published", steps, 1, other), made_up("ours", steps, 1, own)]
    rows += [made_up("ours", 8, 8, 17.9), made_up("ours", 4, 8, 36.0)]
    found = {verdict.text: verdict for verdict in decode_verdicts(rows, "cpu", 0.004)}
    assert [(verdict.value, verdict.met) for text, verdict in found.items() if "ours / published" in text] == [
        (1.0, True),
        (pytest.approx(20 / 18), True),
        (pytest.approx(32 / 30), False),
    ]
    gains = [(verdict.value, verdict.met) for text, verdict in found.items() if "batch 8 / batch 1" in text]
    assert gains == [(pytest.approx(1.79), False), (1.8, True), (None, None)]
    assert found["forwards, ours, 4 steps, batch 1, 8 blocks"] == DecodeVerdict(
        "forwards, ours, 4 steps, batch 1, 8 blocks", "=", 32, 32
    )
    assert found["forwards, published, 4 steps, batch 1, 8 blocks"].value == 40
    assert not any("ar_generate" in text for text in found)


def test_bars_of_cuda():
    rows = [made_up("ar_generate", 1, 1, 100.0), made_up("published", 4, 1, 100.0), made_up("ours", 4, 1, 160.0)]
    verdicts = decode_verdicts(rows, "cuda", 0.004)[2:]
    assert [(verdict.relation, verdict.limit, verdict.value, verdict.met) for verdict in verdicts] == [
        (">=", 1.5, 1.6, True),
        (">=", 2.0, 1.6, False),
        ("<=", 1.5, pytest.approx(1.5), True),
    ]


def test_on_cuda_ours_is_measured_compiled_and_ar_as_it_comes():
    rows = [made_up("ar_generate", 1, 1, 100.0), made_up("published", 4, 1, 100.0), made_up("ours", 4, 1, 110.0)]
    rows += [made_up("ar_generate", 1, 1, 190.0, compiled=True)]
    rows += [made_up("ours", 4, 1, 250.0, compiled=True, forward_seconds=0.005)]
    found = {verdict.text: verdict.value for verdict in decode_verdicts(rows, "cuda", 0.004)}
    assert found["tokens/s, ours / ar_generate, 4 steps, batch 1"] == 2.5
    assert found["time per forward, ours / weight streaming, 4 steps, batch 1"] == 1.25
    assert "forwards, ours compiled, 4 steps, batch 1, 8 blocks" in found
    assert {verdict.value for verdict in decode_verdicts(rows, "cpu", 1.0) if "4 steps, batch 1" in verdict.text} == {40, 32, 1.1}
    add_ratios(rows)
    assert [one["ratio_to_ar"] for one in rows] == [1.0, 1.0, 1.1, 1.9, 2.5]


def test_compiled_tokens_are_compared_place_by_place():
    def timed(*answers: list[int]) -> Timed:
        return Timed([Decoded([answer], 4, 0) for answer in answers], [1.0], [0.5])

    plain, compiled = Case("ours", 4), Case("ours", 4, compiled=True)
    both = {plain: timed([1, 2, 3, 4], [5, 6]), compiled: timed([1, 2, 9, 4], [5])}
    assert equality(plain, both) == {} and equality(compiled, both) == {"equal_to_plain": 4 / 6}


def test_what_is_compiled():
    """At batch 1, and not the published loop, which has no fixed shapes."""
    chosen = cases((4, 2), 1, True)
    assert [case.name for case in chosen if case.compiled] == ["ar_generate 1 compiled", "ours 4 compiled", "ours 2 compiled"]
    assert [case for case in chosen if not case.compiled] == cases((4, 2), 1, False)
    assert not any(case.compiled for case in cases((4, 2), 8, True))


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


def test_a_forward_too_many_is_not_met_and_other_block_sizes_have_no_bar_of_speed():
    rows = [made_up("published", 4, 1, 10.0), made_up("ours", 4, 1, 20.0, forwards=33)]
    met = {verdict.text: verdict.met for verdict in decode_verdicts(rows, "cpu", 1.0)}
    assert met["forwards, ours, 4 steps, batch 1, 8 blocks"] is False
    assert met["tokens/s, ours / published, 4 steps, batch 1"] is True
    other = [one | {"block_size": 4} for one in rows]
    assert {verdict.met for verdict in decode_verdicts(other, "cpu", 1.0) if "tokens/s" in verdict.text} == {None}
    assert decode_verdicts([], "cuda", 1.0) and not any(verdict.met for verdict in decode_verdicts([], "cuda", 1.0))


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

    found = sweep_row(0.9, [Scored(given(6, 3, 2.0), True, 1.0), Scored(given(10, 5, 6.0), False, 0.5)])
    assert (found["tokens_per_forward"], found["tokens_per_second"]) == (2.0, 2.0)
    assert (found["exact_match"], found["edit_similarity"], found["answers"]) == (0.5, 0.75, 2)


# --- the command -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(prepared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return block_checkpoint(prepared("qwen2"), tmp_path_factory.mktemp("bench") / "qwen2", grid="response")


@pytest.mark.parametrize("context", CONTEXTS)
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
        assert one["first_token_seconds"] > 0 and len(one["seconds"]) == 2
        extra = {"ar_generate": 0, "published": 1, "ours": 0}[one["decoder"]]
        assert one["forwards_per_token"] == (one["steps"] + extra) / one["block_size"]
    assert [one["ratio_to_published"] is None for one in report["rows"]] == [one["steps"] == 1 for one in report["rows"]]
    assert "forwards, ours, 4 steps, batch 1, 2 blocks  = 8  8  met" in done.err
    assert "tokens/s, ours, batch 8 / batch 1, 4 steps  >= 1.80  -  not measured" in done.err


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
    assert numbers("--steps", "8, 4,2", ()) == (8, 4, 2)
    assert numbers("--steps", None, [3]) == (3,)
    assert set(DECODERS) == {"ar_generate", "published", "ours"}


def test_rounds():
    """Fewer at larger batches, and few for a checkpoint, which has several prompts."""
    rounds = [decode.repeats_of(DecodeBench(), CPU, batch) for batch in (1, 2, 8, 32)]
    assert rounds == [5, 3, 3, 1]
    assert decode.repeats_of(DecodeBench(directory=Path("x")), CPU, 1) == 2
    assert decode.repeats_of(DecodeBench(quick=True), CPU, 1) == 1
    assert decode.repeats_of(DecodeBench(repeats=4, quick=True), CPU, 8) == 4


@pytest.mark.parametrize("decoder", list(DECODERS))
def test_the_time_to_the_first_token_is_that_of_one_prediction(decoder: str):
    """The call ends there: a prefill where the decoder makes one, and one forward that predicts."""
    model, prompts = tiny("causal")
    forwards: list[None] = []
    hook = model.language_model.register_forward_pre_hook(lambda *_: forwards.append(None))
    assert decode.time_first(model, prompts, Case(decoder, 4), CPU) > 0
    hook.remove()
    assert len(forwards) == (1 if decoder == "ar_generate" else 2)
