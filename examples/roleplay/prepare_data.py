"""Split GPTeacher's role-play instructions into training and held-out data.

    python examples/roleplay/prepare_data.py roleplay-instruct.json FOLDER

The file is the role-play part of https://github.com/teknium1/GPTeacher (MIT; commit 4810751, 1,923
entries). Writes FOLDER/train.jsonl and FOLDER/held_out.jsonl,
the latter with 64 entries that the former does not have.
"""

import argparse
import json
import random
from pathlib import Path

HELD_OUT = 64
SEED = 0


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    entries = json.loads(arguments.source.read_text(encoding="utf-8"))
    random.Random(SEED).shuffle(entries)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    parts = {"held_out": entries[:HELD_OUT], "train": entries[HELD_OUT:]}
    for name, part in parts.items():
        path = arguments.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(entry) + "\n" for entry in part), encoding="utf-8")
        print(f"{path}: {len(part)} entries")


if __name__ == "__main__":
    main()
