"""How long `diffvl convert` takes from the command to its first step, and in how much memory, on a large synthetic data file.

    python tools/start_bench.py FOLDER --records 50000 --turns 1 [--row-length 4096]

Tiny random models stand for the real ones, so that what is measured is the start. The same command on a file of 64 records is
measured first: the difference is what the records add. PYTHONPATH chooses the source that is measured.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from PIL import Image

SMALL = 64  # records of the file that the large one is compared with
LONGEST = 8192  # tokens; the stand-ins take a byte for a token
IMAGES = 16  # that exist; the others are further names of these
WORDS = ("the", "a", "red", "blue", "small", "large", "cat", "dog", "train", "stands", "near", "under", "on", "old", "tree")
RECIPE: dict[str, Any] = {
    "prepare": {"image_size": 216},  # 27 x 27 patches, as many as the published towers make
    "stages": {
        "align": {
            "objective": {"kind": "ar"},
            "trainable": {"connector": 1e-3},
            "steps": 1,
            "batch_size": 8,
            "precision": "fp32",
            "data": {"max_length": LONGEST},
        }
    },
}


def sentence(generator: random.Random, longest: int) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(6, longest))).capitalize() + "."


def write_records(folder: Path, records: int, turns: int) -> Path:
    """A data file of this many records, each with an image and 1 to `turns` questions; made once."""
    file = folder / f"records-{records}-{turns}.json"
    if file.exists():
        return file
    generator = random.Random(0)
    originals = []
    for number in range(IMAGES):
        originals.append(folder / f"image-{number}.jpg")
        Image.effect_noise((64, 48), 40 + number).convert("RGB").save(originals[-1])
    values = []
    for number in range(records):
        name = f"images/{number // 1000:05d}/{number:09d}.jpg"
        image = folder / name
        image.parent.mkdir(parents=True, exist_ok=True)
        if not image.exists():
            os.link(originals[number % IMAGES], image)
        chat = []
        for turn in range(generator.randint(1, turns)):
            chat.append({"from": "human", "value": ("" if turn else "<image>\n") + sentence(generator, 14)})
            chat.append({"from": "gpt", "value": sentence(generator, 24)})
        values.append({"id": f"{number:09d}", "image": name, "conversations": chat})
    file.write_text(json.dumps(values), encoding="utf-8")
    return file


def memory_of(root: int) -> int:
    """Proportional memory (PSS, bytes) of a process and all it has started: pages that several share count once."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    total, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def first_step(command: list[str], log: Path) -> tuple[float, int]:
    """(seconds until the first step is done, peak memory on the way)."""
    began, peak = time.monotonic(), 0
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        stop = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not stop.wait(0.2):
                peak = max(peak, memory_of(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        seconds = None
        assert process.stdout is not None
        for line in process.stdout:
            print(f"  {time.monotonic() - began:7.1f} s  {line.rstrip()}", flush=True)
            if "step 1/1" in line:
                seconds = time.monotonic() - began
                stop.set()
        stop.set()
        watcher.join()
        if process.wait() or seconds is None:
            raise SystemExit(f"the command failed, see {log}:\n{log.read_text(encoding='utf-8')}")
    return seconds, peak


def convert_command(folder: Path, file: Path, settings: list[str]) -> list[str]:
    """The command on tiny models, which are made once; nothing of an earlier run is remembered."""
    models, recipe, now = folder / "models", folder / "recipe.json", time.time_ns()
    if not models.exists():
        subprocess.run([sys.executable, "-m", "diffvl.demo.standins", str(models)], check=True, stdout=subprocess.DEVNULL)
        config = models / "trunk-qwen2" / "config.json"
        longer = {**json.loads(config.read_text(encoding="utf-8")), "max_position_embeddings": LONGEST}
        config.write_text(json.dumps(longer), encoding="utf-8")
    recipe.write_text(json.dumps(RECIPE), encoding="utf-8")  # JSON is YAML
    os.environ["HF_DATASETS_CACHE"] = str(folder / f"cache-{now}")
    words = [
        "convert",
        str(models / "trunk-qwen2"),
        "--recipe",
        str(recipe),
        "--data",
        str(file),
        "--out",
        str(folder / f"run-{now}"),
    ]
    for setting in (f"prepare.vision_tower={models / 'tower-siglip'}", *settings):
        words += ["--set", setting]
    return [sys.executable, "-m", "diffvl.cli", *words]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--turns", type=int, default=1, help="most questions of a record")
    parser.add_argument("--row-length", type=int, help="pack into rows of so many tokens")
    parser.add_argument("--set", action="append", default=[], dest="settings", help="as of `diffvl convert`")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    packing = [f"stages.align.data.row_length={arguments.row_length}"] if arguments.row_length else []
    measured = {}
    for count in (SMALL, arguments.records):
        file = write_records(folder, count, arguments.turns)
        print(f"{count} records:", flush=True)
        measured[count] = first_step(convert_command(folder, file, packing + arguments.settings), folder / "stderr.txt")
    (small, small_peak), (large, large_peak) = measured[SMALL], measured[arguments.records]
    print(f"{SMALL} records: {small:.1f} s, {small_peak / 2**20:.0f} MiB at most")
    print(f"{arguments.records} records: {large:.1f} s, {large_peak / 2**20:.0f} MiB at most")
    print(f"the records add {large - small:.1f} s and {(large_peak - small_peak) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
