"""Prompts of open text without answers, for `diffvl answers`: what a lossless conversion of a text model is measured on.

usage: python -m tools.open_prompts FOLDER [--train 800] [--test 64]

FOLDER/train-prompts.jsonl, test-prompts.jsonl    one prompt a record: an instruction about a topic, in some style

Every combination occurs once, in an order drawn from a seed; the two files share no topic, so that a test prompt is about
something that training has not heard of.
"""

import argparse
import itertools
import json
import random
from pathlib import Path

INSTRUCTIONS = (
    "Explain {} in a few sentences.",
    "What is {}? Answer in one paragraph.",
    "Give three facts about {}.",
    "Write a short note to a friend about {}.",
    "Why does {} matter?",
    "Tell a child what {} is.",
    "What should a beginner know about {}?",
    "Name one advantage and one disadvantage of {}.",
    "Write the first lines of a story about {}.",
    "How has {} changed over the last hundred years?",
    "Describe {} without using the word itself.",
    "Give step by step advice on getting started with {}.",
    "What do people often get wrong about {}?",
    "Write a title and one sentence for an article about {}.",
    "Compare {} with something similar.",
    "List five words that go with {}, and say why.",
)
TOPICS = """
    photosynthesis; the printing press; bread baking; chess; volcanoes; the human heart; cycling; rain; honey bees;
    bridges; gravity; gardening; the violin; glaciers; coffee; libraries; magnets; migration of birds; the number zero;
    soap; sailing; tea; earthquakes; maps; sleep; fermentation; the moon; public transport; paper; electric motors;
    rainforests; clocks; poetry; vaccines; salt; swimming; deserts; wool; telescopes; lighthouses; rice farming; steel;
    comedy; recycling; whales; mirrors; rivers; algebra; running; cheese; radio; coral reefs; pottery; satellites; trees;
    windmills; jazz; batteries; markets; snow; the alphabet; photography; mushrooms; canals
"""


def prompts(topics: list[str], count: int, draw: random.Random) -> list[str]:
    """Gives `count` different prompts about these topics."""
    every = [instruction.format(topic) for instruction, topic in itertools.product(INSTRUCTIONS, topics)]
    return draw.sample(every, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=800)
    parser.add_argument("--test", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    every = [topic.strip() for topic in TOPICS.split(";")]
    held_out = len(every) // 8
    for limit, count in ((len(every) - held_out, given.train), (held_out, given.test)):
        if not 0 < count <= limit * len(INSTRUCTIONS):
            parser.error(f"{count} prompts: expected 1 to {limit * len(INSTRUCTIONS)}")
    draw = random.Random(given.seed)
    topics = draw.sample(every, len(every))
    given.folder.mkdir(parents=True, exist_ok=True)
    parts = {"test": (topics[:held_out], given.test), "train": (topics[held_out:], given.train)}
    for part, (about, count) in parts.items():
        records = [
            {"id": f"{part}-{number}", "conversations": [{"from": "human", "value": prompt}]}
            for number, prompt in enumerate(prompts(about, count, draw))
        ]
        file = given.folder / f"{part}-prompts.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        print(f"{len(records)} prompts: {file}")


if __name__ == "__main__":
    main()
