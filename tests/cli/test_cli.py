"""The command line: which flags there are, what is imported for help, what reaches the package, and how it ends."""

import dataclasses
import inspect
import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import typer.main

from diffvl.cli import benchmarks as cli_benchmarks
from diffvl.cli import decode as cli_decode
from diffvl.cli import main as cli
from diffvl.config import recipe as config
from diffvl.decode.flags import SETTINGS, flag
from diffvl.demo import shapes
from diffvl.errors import CheckpointError
from diffvl.hub.settings_diffvl import DecodeSettings

ENVIRONMENT = {"PYTHONPATH": str(Path(cli.__file__).parents[2]), "COLUMNS": "120"}  # of a process that finds diffvl's source
VERBS = [
    "answers",
    "bench decode",
    "bench train",
    "chat",
    "compare",
    "convert",
    "doctor",
    "evaluate",
    "export",
    "generate",
    "models",
    "push",
    "recipes",
    "serve",
    "shapes",
]

DECODING = {
    *("--max-new-tokens", "--steps", "--mode", "--strategy", "--threshold", "--entropy-budget", "--temperature", "--top-k"),
    *("--top-p", "--seed", "--stop", "--repetition-stop", "--compile", "--draft-length", "--drafting", "--draft-threshold"),
}

FLAGS = {
    "": {"--version"},
    "answers": {
        *(
            "MODEL",
            "--data",
            "--out",
            "--image-folder",
            "--batch-size",
            "--max-new-tokens",
            "--temperature",
            "--top-k",
            "--top-p",
        ),
        *("--seed", "--resume", "--trust-remote-code"),
    },
    "convert": {
        *("MODEL", "--stage", "--recipe", "--data", "--from", "--out", "--lora", "--set", "--resume", "--dry-run"),
        *("--accept-changed-data", "--trust-remote-code", "--control", "--no-speed", "--for", "--measure"),
    },
    "compare": {
        *("RUN...", "--data", "--out", "--limit", "--max-new-tokens", "--speed", "--no-speed", "--seed", "--json"),
        "--trust-remote-code",
    },
    "generate": {"DIR", "--image", "--video", "--prompt", "--batch", "--batch-size", "--stream", "--watch", "--json", *DECODING},
    "chat": {"DIR", *DECODING},
    "evaluate": {"DIR", "--data", "--tasks", "--include-path", "--batch-size", "--limit", "--json", *DECODING},
    "export": {"DIR", "--out", "-o", "--layout", "--keep-adapters", "--license"},
    "push": {"DIR", "REPO", "--yes", "--private"},
    "bench decode": {
        *("DIR", "--data", "--sweep", "--limit", "--steps", "--batch", "--max-new-tokens", "--repeats", "--device", "--layers"),
        *("--hidden", "--block-size", "--context", "--seed", "--quick", "--compile", "--no-compile", "--compile-batch", "--json"),
    },
    "bench drafts": {
        *("DIR", "--data", "--limit", "--lengths", "--batch", "--max-new-tokens", "--threshold", "--precision", "--device"),
        "--json",
    },
    "bench modes": {"DIR", "--data", "--limit", "--max-new-tokens", "--device", "--json"},
    "bench train": {
        *("--shapes", "--repeats", "--device", "--layers", "--hidden", "--block-size", "--context", "--seed", "--quick"),
        *("--profile", "--scaling", "--no-scaling", "--json"),
    },
    "doctor": {"MODEL", "--all", "--out", "--json", "--trust-remote-code"},
    "models": set(),
    "recipes": set(),
    "serve": {
        *("DIR", "--host", "--port", "--api-key", "--name", "--batch-size", "--queue", "--timeout", "--max-tokens"),
        *("--max-prompt-tokens", "--max-images", "--max-pixels", "--max-body", "--fetch-images"),
    },
    "shapes": {"OUT", "--align", "--train", "--test", "--seed"},
}


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """Puts a module with these contents where the command will import `name` from."""
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


@dataclass(frozen=True)
class Settings:
    """Stands for a class of the package that takes named values only."""

    values: dict[str, Any]

    @classmethod
    def make(cls, **values: Any) -> "Settings":
        return cls(values)


# --- flags and help ------------------------------------------------------------------------------------------------------


def test_no_flag_appears_or_disappears_unnoticed():
    """A hyperparameter has no flag: it is a key of the recipe, for `--set`."""
    root: Any = typer.main.get_command(cli.app)

    def names(command: Any) -> set[str]:
        found = {word for parameter in command.params for word in [*parameter.opts, *parameter.secondary_opts]}
        arguments = {parameter.name: parameter.metavar for parameter in command.params if parameter.param_type_name == "argument"}
        return {arguments.get(word, word) for word in found}

    def commands(group: Any, before: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for verb, command in group.commands.items():
            found |= commands(command, f"{before}{verb} ") if hasattr(command, "commands") else {before + verb: command}
        return found

    assert {"": names(root)} | {verb: names(command) for verb, command in commands(root).items()} == FLAGS


def test_the_flags_of_decoding_are_its_settings():
    """With their defaults, choices and bounds. Settings without a flag are those that a command gives `generate` by itself."""
    fields = {field.name: field for field in dataclasses.fields(DecodeSettings)}
    without = {"do_sample", "cache_implementation", "compile_config", "disable_compile"}
    without |= {"eos_token_id", "pad_token_id", "tokenizer", "return_dict_in_generate"}
    assert set(SETTINGS) == set(fields) - without
    for verb in (cli_decode.generate, cli_decode.chat, cli.evaluate):
        found = inspect.signature(verb).parameters
        for name in SETTINGS:
            about, default = fields[name].metadata, fields[name].default
            kind, option = get_args(found[name].annotation)
            assert found[name].default == (None if default == () else default) and option.help == about["about"]
            assert option.default == flag(name) and flag(name) in DECODING
            words = get_args(get_args(kind)[0]) if default is None else get_args(kind)
            assert not about["choices"] or words == about["choices"]
            assert option.max == about["most"] or name == "seed"
            assert option.min == about["least"] or name in ("denoising_steps", "temperature", "top_k", "seed")


@pytest.mark.parametrize("verb", ["", "bench", *VERBS])
def test_help_has_an_example(verb: str, run_cli):
    code, out, _ = run_cli(*verb.split(), "--help")
    assert code == 0
    assert f"Example:  diffvl {verb}" in out if verb else all(verb.split()[0] in out for verb in VERBS)


def test_help_names_what_to_install(run_cli):
    # An extra stands in brackets, which rich takes for its own unless they are escaped.
    assert "pip install 'diffvl[serve]'" in run_cli("serve", "--help")[1]


def children_seconds() -> float:
    """CPU time of the processes that have ended: what other work on the machine does not change much."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_and_version_load_neither_torch_nor_transformers_and_answer_at_once():
    program = (
        "import sys\n"
        "from diffvl.cli.main import main\n"
        "for words in (['--help'], ['--version'], *([*verb.split(), '--help'] for verb in sys.argv[1:])):\n"
        "    sys.argv = ['diffvl', *words]\n"
        "    try: main()\n"
        "    except SystemExit as stop: assert stop.code == 0, words\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    start = children_seconds()
    done = subprocess.run([sys.executable, "-c", program, *VERBS], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    seconds = children_seconds() - start
    assert done.returncode == 0, done.stderr
    assert f"diffvl {config.VERSION}\n" in done.stdout
    assert seconds < 1 * (2 + len(VERBS)), "less than a second each"


# --- how a command ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["convert", "--lr", "1"],
        ["generate", "--prompt", "x"],
        ["generate", "dir", "--prompt", "x", "--strategy", "random"],
        ["generate", "dir", "--prompt", "x", "--mode", "beam"],
        ["generate", "dir", "--prompt", "x", "--temperature", "1", "--top-k", "0"],
        ["generate", "dir", "--prompt", "x", "--temperature", "1", "--top-p", "1.1"],
        ["generate", "dir", "--prompt", "x", "--repetition-stop", "1"],
        ["generate", "dir", "--batch", "x.jsonl", "--batch-size", "0"],
        ["chat"],
        ["chat", "dir", "--prompt", "x"],
        ["generate", "dir", "--prompt", "x", "--steps", "0"],
        ["generate", "dir", "--prompt", "x", "--temperature", "-1"],
        ["evaluate", "dir", "--data", "x.json", "--limit", "0"],
        ["shapes", "dir", "--train", "0"],
    ],
)
def test_words_that_do_not_fit_end_with_code_2(words: list[str], run_cli):
    code, out, err = run_cli(*words)
    assert (code, out) == (2, "") and "Error" in err and "Traceback" not in err


STATIC = "--strategy low_confidence_static"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "give --prompt TEXT, or --batch FILE.jsonl with many"),
        ("--prompt x --batch f.jsonl", "give --prompt TEXT, or --batch FILE.jsonl with many, not both"),
        ("--batch f.jsonl --stream", "--stream has no effect with --batch, which prints a JSON line for each answer"),
        ("--batch f.jsonl --watch", "--watch has no effect with --batch, which prints a JSON line for each answer"),
        ("--batch f.jsonl --image a.png", "--image has no effect with --batch: name the images in its file"),
        ("--prompt x --batch-size 4", "--batch-size has no effect with a single --prompt"),
        ("--prompt x --stream --json", "--json has no effect with --stream, which prints text as it comes"),
        ("--prompt x --watch --stream", "--stream has no effect with --watch, which draws the answer itself"),
        ("--prompt x --watch --json", "--json has no effect with --watch, which draws the answer itself"),
        ("--prompt x --watch --mode ar", "--watch has no effect with --mode ar: it settles no blocks"),
        ("--prompt x --watch --mode speculative", "--watch has no effect with --mode speculative: it settles no blocks"),
    ],
)
def test_words_of_generate_that_exclude_each_other(words: str, says: str, run_cli):
    assert run_cli("generate", "dir", *words.split()) == (2, "", f"error: {says}\n")


@pytest.mark.parametrize("verb", ["generate dir --prompt x", "chat dir", "evaluate dir --data x.json"])
@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--threshold 0.9", f"--threshold 0.9 has no effect with {STATIC}: add --strategy low_confidence_dynamic, or leave"),
        ("--entropy-budget 0.1", f"--entropy-budget 0.1 has no effect with {STATIC}: add --strategy entropy, or leave"),
        (
            "--strategy entropy --threshold 0.9",
            "--threshold 0.9 has no effect with --strategy entropy: add --strategy low_confid",
        ),
        ("--mode ar --steps 2", "--steps has no effect with --mode ar, which decodes token by token"),
        (f"--mode ar {STATIC}", "--strategy has no effect with --mode ar, which decodes token by token"),
        ("--mode ar --threshold 0.9", "--threshold 0.9 has no effect with --mode ar: leave it out"),
        (
            "--mode speculative --strategy entropy",
            "--strategy has no effect with --mode speculative, which keeps what its AR log",
        ),
        ("--top-k 5", "--top-k has no effect with temperature 0, which takes the likeliest token: add --temperature"),
        ("--top-p 0.5 --temperature 0", "--top-p has no effect with temperature 0, which takes the likeliest token: add --temp"),
        ("--seed 0", "--seed has no effect with temperature 0, which takes the likeliest token: add --temperature"),
        ("--stop=", "--stop '' is in every text: name a text that ends the answer"),
    ],
)
def test_a_setting_without_effect_is_an_error(verb: str, words: str, says: str, run_cli, monkeypatch: pytest.MonkeyPatch):
    """Told before anything is loaded."""
    monkeypatch.setitem(sys.modules, "diffvl.decode.answer", None)
    code, out, err = run_cli(*verb.split(), *words.split())
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(f"error: {says}")


def test_a_user_mistake_is_one_message_and_code_2(run_cli, monkeypatch: pytest.MonkeyPatch):
    def convert(request: Settings) -> Path:
        raise CheckpointError("dir/[bold]x[/bold].json: no config.json here")

    pretend(monkeypatch, "diffvl.conversion.run", ConvertRequest=Settings.make, convert=convert)
    assert run_cli("convert", "dir") == (2, "", "error: dir/[bold]x[/bold].json: no config.json here\n")


@pytest.mark.parametrize(
    ("flag", "words"),
    [("MODEL", ["caf\udce9"]), *((flag, ["m", flag, "caf\udce9"]) for flag in ("--data", "--from", "--out", "--recipe"))],
)
def test_a_name_that_is_no_text_is_refused_before_anything(flag: str, words: list[str], run_cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "diffvl.conversion.run", None)
    says = f"error: {flag} 'caf\\udce9' is not valid UTF-8, and the files of a run must name it: rename it\n"
    assert run_cli("convert", *words) == (2, "", says)


def test_our_own_mistake_keeps_its_traceback(run_cli, monkeypatch: pytest.MonkeyPatch):
    def convert(request: Settings) -> Path:
        raise ZeroDivisionError("a bug")

    pretend(monkeypatch, "diffvl.conversion.run", ConvertRequest=Settings.make, convert=convert)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run_cli("convert", "dir")


@pytest.mark.parametrize(
    ("words", "again"),
    [
        (["convert", "m", "--out", "a b"], "interrupted. To continue: diffvl convert m --out 'a b' --resume\n"),
        (["convert", "m", "--resume"], "interrupted. To continue: diffvl convert m --resume\n"),
    ],
)
def test_an_interrupted_conversion_says_how_to_continue(words, again, run_cli, monkeypatch: pytest.MonkeyPatch):
    def convert(request: Settings) -> Path:
        raise KeyboardInterrupt

    pretend(monkeypatch, "diffvl.conversion.run", ConvertRequest=Settings.make, convert=convert)
    assert run_cli(*words) == (130, "", again)


# --- what reaches the package ----------------------------------------------------------------------------------------------


def test_convert_passes_every_flag_on(run_cli, monkeypatch: pytest.MonkeyPatch):
    seen: list[dict[str, Any]] = []

    def convert(request: Settings) -> Path:
        seen.append(request.values)
        return Path("runs/x/align")

    pretend(monkeypatch, "diffvl.conversion.run", ConvertRequest=Settings.make, convert=convert)
    words = (
        "--stage align --recipe demo --data d.json --from f --out o --lora --set a.b=1 --set c=x=y --resume "
        "--accept-changed-data --trust-remote-code"
    )
    assert run_cli("convert", "m", *words.split()) == (0, "", "")
    assert run_cli("convert", "--dry-run", "--for", "24GB", "--measure") == (0, "", "")
    assert seen[0] == {
        "model": "m",
        "stage": "align",
        "recipe": "demo",
        "data": Path("d.json"),
        "start": Path("f"),
        "out": Path("o"),
        "lora": True,
        "assignments": ("a.b=1", "c=x=y"),
        "resume": True,
        "accept_changed_data": True,
        "dry_run": False,
        "machine": None,
        "measure": False,
        "trust_remote_code": True,
        "control": False,
        "speed": True,
    }
    nothing = dict.fromkeys(("model", "stage", "recipe", "data", "start", "out"))
    no_flags = dict.fromkeys(("lora", "resume", "accept_changed_data", "trust_remote_code", "control"), False)
    assert seen[1] == nothing | no_flags | {
        "assignments": (),
        "dry_run": True,
        "machine": "24GB",
        "measure": True,
        "speed": True,
    }


def test_evaluate_prints_a_table_or_json(run_cli, monkeypatch: pytest.MonkeyPatch):
    figures = {"masked_accuracy": 0.25, "records": 3, "model": "dir"}
    seen: list[Any] = []

    def evaluate_directory(
        directory: Path, data: Path, limit: int | None, settings: DecodeSettings
    ) -> dict[str, float | int | str]:
        seen.append((directory, data, limit, settings))
        return figures

    pretend(monkeypatch, "diffvl.evaluation.evaluate", evaluate_directory=evaluate_directory)
    code, out, _ = run_cli("evaluate", "dir", "--data", "d.json")
    assert code == 0 and all(word in out for word in ("masked_accuracy", "0.2500", "records", "3"))
    assert json.loads(run_cli("evaluate", "dir", "--data", "d.json", "--limit", "3", "--json")[1]) == figures
    assert run_cli("evaluate", "dir", "--data", "d.json", "--steps", "2", "--stop", "END")[0] == 0
    of_file = (Path("dir"), Path("d.json"))
    assert seen[:2] == [(*of_file, None, DecodeSettings()), (*of_file, 3, DecodeSettings())]
    assert seen[2:] == [(*of_file, None, DecodeSettings(denoising_steps=2, stop_strings=("END",)))]


def test_convert_with_its_control_ends_with_the_comparison(run_cli, monkeypatch: pytest.MonkeyPatch):
    seen: list[Settings] = []

    def convert_with_control(request: Settings) -> tuple[Path, None]:
        seen.append(request)
        return Path("runs/x/diffuse"), None

    def convert(request: Settings) -> Path:
        raise AssertionError("without the control")

    pretend(monkeypatch, "diffvl.conversion.run", ConvertRequest=Settings.make, convert=convert)
    pretend(monkeypatch, "diffvl.compare.control", convert_with_control=convert_with_control)
    assert run_cli("convert", "m", "--control") == (0, "", "")
    assert run_cli("convert", "m", "--control", "--no-speed") == (0, "", "")
    assert [(one.values["control"], one.values["speed"]) for one in seen] == [(True, True), (True, False)]


def test_compare_refuses_an_out_that_it_could_not_write_before_anything(run_cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("diffvl.compare.compare.compare", None)
    for out, says in ((tmp_path, "it is a directory"), (tmp_path / "none" / "x.html", "is no directory")):
        code, printed, err = run_cli("compare", "a", "b", "--out", str(out))
        assert (code, printed) == (2, "") and err.startswith(f"error: --out {out} cannot be written: ") and says in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "give --data FILE with held-out records, or --tasks NAME,... of lmms-eval: one of them is needed"),
        ("--data d.json --tasks mmstar", "or --tasks NAME,... of lmms-eval: not both"),
        ("--data d.json --batch-size 4", "--batch-size has no effect without --tasks"),
        ("--data d.json --include-path .", "--include-path has no effect without --tasks"),
        ("--tasks mmstar,mmstar", "expected names with commas between them, each once"),
        ("--tasks , ", "expected names with commas between them, each once"),
        ("--tasks mmstar --threshold 0.9", "add --strategy low_confidence_dynamic"),
        ("--tasks mmstar", "pip install 'diffvl[eval]'"),
    ],
)
def test_benchmarks_are_refused_in_one_message(words: str, says: str, run_cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli_benchmarks, "find_spec", lambda name: None)
    code, out, err = run_cli("evaluate", "dir", *words.split())
    assert (code, out) == (2, "") and says in err and err.count("error:") == 1 and "Traceback" not in err


def test_benchmarks_get_what_was_typed_and_print_a_table_or_json(run_cli, monkeypatch: pytest.MonkeyPatch):
    """Settings that were typed are named, also where they are the defaults: they hold against what a task asks for."""
    seen: list[Any] = []
    metrics = [{"metric": "acc", "filter": "none", "value": 0.25, "stderr": 0.125}, {"metric": "f1", "filter": "x", "value": 1.0}]
    found = [{"task": "mmstar", "metrics": metrics, "n": 12, "seconds": 3.25}]

    def run_benchmarks(directory: Path, request: Any, console: Any) -> list[dict[str, Any]]:
        seen.append((directory, request))
        print("Overall accuracy:")  # as many tasks do, while stdout is for the results
        return found

    monkeypatch.setattr(cli_benchmarks, "find_spec", lambda name: object())
    monkeypatch.setenv("LOGURU_LEVEL", "WARNING")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    pretend(monkeypatch, "diffvl.evaluation.benchmarks", run_benchmarks=run_benchmarks, Benchmarks=lambda *given: given)
    words = ["evaluate", "dir", "--tasks", "mmstar,mmmu_val"]
    code, out, err = run_cli(*words)
    assert "Overall" in err and "Overall" not in out
    assert code == 0 and all(word in out for word in ("mmstar", "acc", "0.2500", "0.1250", "12", "3.2", "f1 (x)"))
    more = "--steps 2 --strategy low_confidence_static --stop END --compile --batch-size 3 --limit 5 --include-path here --json"
    assert json.loads(run_cli(*words, *more.split())[1]) == {"results": found}
    named = {
        "denoising_steps": 2,
        "remasking": "low_confidence_static",
        "stop_strings": ("END",),
        "cache_implementation": "static",
    }
    names = ["mmstar", "mmmu_val"]
    assert seen == [(Path("dir"), (names, {}, 8, None, None)), (Path("dir"), (names, named, 3, 5, Path("here")))]


# --- lists ---------------------------------------------------------------------------------------------------------------


def test_models_and_recipes_are_listed_whole_however_narrow_the_terminal(run_cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "40")
    lines = run_cli("models")[1].splitlines()
    row = next(line for line in lines if "qwen2.5-7b" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "qwen2.5-7b",
        "Qwen/Qwen2.5-7B-Instruct",
        *("language model", "llava", "google/siglip2-so400m-patch14-384"),
        *("7.62B", "15.2", "17.5", "122"),
    ]
    row = next(line for line in lines if "qwen2.5-vl-3b" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")][2:5] == ["vision-language model", "vlm", "its own"]
    assert any("mistral" in line and "sliding window" in line for line in lines)
    listed = run_cli("recipes")[1]
    assert "DiffusionVL's two stages as published" in next(line for line in listed.splitlines() if "llava" in line)


def test_shapes_writes_the_image_set_and_names_its_files(run_cli, tmp_path: Path):
    out = tmp_path / "data"
    code, printed, _ = run_cli("shapes", str(out), "--align", "2", "--train", "3", "--test", "1", "--seed", "5")
    assert code == 0
    assert printed.split() == [str(out / f"{split}.json") for split in shapes.SPLITS]
    assert [len(json.loads(Path(file).read_text(encoding="utf-8"))) for file in printed.split()] == [2, 3, 1]
