"""What a large data set costs before and during training: time to the first batch, memory of each process, and samples a second
of one loader process. No model takes part.

    python tools/data_bench.py FOLDER --records 1000000 --form jsonl     (jsonl, parquet or tar)

Writes the set into FOLDER unless it is there already: two turns a record and one JPEG, which all records of a shard share in
turn (`--images` different ones), so that a million records fit on a small disk. Anonymous memory is what the process itself
needs; mapped files are counted apart, since the kernel drops their pages when it needs room. Times are given on the clock and as
CPU time, which other work on the machine changes less.
"""

import argparse
import io
import json
import multiprocessing
import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader

from diffvl.config.recipe import Data
from diffvl.data.loader import load_data
from diffvl.data.samples import PROBLEMS, collate
from diffvl.data.stream import Batches, StreamDataset
from diffvl.store import checkpoint
from diffvl.train.order import BatchesOfSteps, StepOrder

LONGEST = 16_384  # tokens; stand-ins take a byte for a token
_SHARD = 10_000  # records of a tar or Parquet file


def jpeg(number: int, side: int) -> bytes:
    """Draws a smooth image with some noise, which packs about as well as a photograph."""
    draw = numpy.random.default_rng(number)
    coarse = Image.fromarray(draw.integers(0, 256, (12, 12, 3), dtype=numpy.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    noisy = numpy.asarray(coarse, dtype=numpy.int16) + draw.integers(-12, 13, (side, side, 3))
    Image.fromarray(noisy.clip(0, 255).astype(numpy.uint8)).save(buffer := io.BytesIO(), "JPEG", quality=85)
    return buffer.getvalue()


def value_of(number: int) -> dict[str, Any]:
    """Gives a record of 60 words, numbered so that no two are equal."""
    answer = f"Record {number} shows " + "a red circle beside a blue square on a green field, " * 5
    turns = [{"from": "human", "value": "<image>\nDescribe the image in detail."}, {"from": "gpt", "value": answer}]
    return {"id": f"{number:09}", "conversations": turns}


def write_jsonl(folder: Path, records: int, images: list[bytes]) -> None:
    for number, image in enumerate(images):
        (folder / f"{number}.jpg").write_bytes(image)
    with (folder / "data.jsonl").open("w") as lines:
        lines.writelines(json.dumps({**value_of(n), "image": f"{n % len(images)}.jpg"}) + "\n" for n in range(records))


def write_parquet(folder: Path, records: int, images: list[bytes]) -> None:
    for start in range(0, records, _SHARD):
        rows = [
            {**value_of(n), "image": {"bytes": images[n % len(images)], "path": f"{n}.jpg"}}
            for n in range(start, min(start + _SHARD, records))
        ]
        # As `datasets` writes images: no compression helps them, and a hundred rows stand in a group.
        pq.write_table(pa.Table.from_pylist(rows), folder / f"train-{start // _SHARD:05}.parquet", row_group_size=100)


def write_tars(folder: Path, records: int, images: list[bytes]) -> None:
    for start in range(0, records, _SHARD):
        with tarfile.open(folder / f"{start // _SHARD:05}.tar", "w") as archive:
            for number in range(start, min(start + _SHARD, records)):
                for ending, content in (("json", json.dumps(value_of(number)).encode()), ("jpg", images[number % len(images)])):
                    member = tarfile.TarInfo(f"{number:09}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


WRITERS = {"jsonl": (write_jsonl, "data.jsonl"), "parquet": (write_parquet, "*.parquet"), "tar": (write_tars, "*.tar")}


def memory_of(process: int) -> dict[str, float]:
    """Gives a process's anonymous and mapped memory in MiB, and the most that it has had of both."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines() if ":" in line)
    names = {"anonymous": "RssAnon", "mapped": "RssFile", "peak": "VmHWM"}
    return {name: round(int(fields[key].split()[0]) / 1024, 1) for name, key in names.items()}


def cpu_of(process: int) -> float:
    """Gives the CPU seconds that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def batches_of(data: Any, batch_size: int, workers: int, pad: int, steps: int) -> Iterator[dict[str, Any]]:
    """Gives the batches that one training process would read."""
    padded = lambda rows: collate(rows, pad_token_id=pad)  # noqa: E731
    if isinstance(data, StreamDataset):
        batches = Batches(data.begun(0), batch_size, padded, 0, 1, {}, 0)
        return iter(DataLoader(batches, batch_size=None, num_workers=workers, collate_fn=lambda batch: batch))
    order = StepOrder(len(data), batch_size, 1, 0)
    sampler: Any = BatchesOfSteps(order, 0, steps)
    return iter(DataLoader(data, batch_sampler=sampler, num_workers=workers, collate_fn=padded))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a DiffVL directory, for its processor")
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--form", choices=tuple(WRITERS), default="jsonl")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--side", type=int, default=16, help="pixels of an image")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--samples", type=int, default=2000, help="read to measure the speed")
    arguments = parser.parse_args()
    write, pattern = WRITERS[arguments.form]
    folder = arguments.folder / f"{arguments.form}-{arguments.records}-{arguments.side}"
    if not folder.exists():
        folder.mkdir(parents=True)
        write(folder, arguments.records, [jpeg(number, arguments.side) for number in range(arguments.images)])
    _, processor = checkpoint.load_description(arguments.checkpoint)
    settings = Data(train=str(folder / pattern), streaming=arguments.form == "tar", max_length=LONGEST)
    before, cpu = memory_of(os.getpid()), time.process_time()
    start = time.perf_counter()
    data = load_data(settings, processor, None).train
    opened, cpu = time.perf_counter(), time.process_time() - cpu
    batch_size = 8
    batches = batches_of(data, batch_size, arguments.workers, processor.pad_token_id, arguments.samples)
    next(batches)
    first = time.perf_counter()
    loaders = [child.pid or 0 for child in multiprocessing.active_children()] or [os.getpid()]
    used = sum(map(cpu_of, loaders))
    begun = memory_of(os.getpid()), [memory_of(process) for process in loaders]
    for _ in range(arguments.samples // batch_size):
        if problems := next(batches).get(PROBLEMS):
            raise SystemExit(str(problems[0]))
    seconds = time.perf_counter() - first
    used = sum(map(cpu_of, loaders)) - used
    print(
        json.dumps(
            {
                "form": arguments.form,
                "records": arguments.records,
                "image_side": arguments.side,
                "seconds_to_open": round(opened - start, 2),
                "cpu_seconds_to_open": round(cpu, 2),
                "seconds_to_first_batch": round(first - start, 2),
                "samples_per_second": round(arguments.samples // batch_size * batch_size / seconds, 1),
                "samples_per_cpu_second": round(arguments.samples // batch_size * batch_size / used, 1),
                "loader_processes": arguments.workers,
                "before": before,
                "main_at_first_batch": begun[0],
                "loaders_at_first_batch": begun[1],
                "main": memory_of(os.getpid()),
                "loaders": [memory_of(process) for process in loaders],
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
