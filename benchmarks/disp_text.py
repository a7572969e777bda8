"""Cut a text into pieces of so many tokens, as data for `proa train qst`.

python -m benchmarks.disp_text --text train.txt --length 520 --stride 512 --output pieces.jsonl
"""

import argparse
import json
from pathlib import Path

from benchmarks.perplexity import add_model_arguments
from models.checkpoints import load_checkpoint
from text.text_file import read_text
from text.tokenizer import Tokenizer


def cut_text(tokenizer: Tokenizer, text: str, *, length: int, stride: int) -> list[str]:
    """Return the text of each run of `length` tokens that begins at a multiple of `stride`."""
    token_ids = tokenizer.encode(text)
    starts = range(0, len(token_ids) - length + 1, stride)
    return [tokenizer.decode(token_ids[start : start + length]) for start in starts]


def main() -> None:
    """Cut the text that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--length", type=int, required=True, help="tokens of a piece")
    parser.add_argument("--stride", type=int, required=True, help="tokens between their beginnings")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    checkpoint = load_checkpoint(options.model, cache_dir=options.cache_dir)
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    text = read_text(options.text)
    pieces = cut_text(tokenizer, text, length=options.length, stride=options.stride)
    lines = [json.dumps({"text": piece}) for piece in pieces]
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(json.dumps({"pieces": len(pieces)}))


if __name__ == "__main__":
    main()
