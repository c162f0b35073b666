#!/usr/bin/env python3
"""Write a synthetic corpus to try the rest on: for demonstration only."""

import argparse
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from skewless.demos import KINDS, write_corpus
from skewless.training.recipe import read_recipe


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Nothing was recorded or photographed: every file is computed from random numbers, and a model trained on "
        "them knows nothing of the real thing. The same settings always make the same corpus.",
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to make; refused if it holds anything else")
    parser.add_argument("--recipe", type=Path, help="a recipe.yaml whose part 'corpus' gives the settings below")
    parser.add_argument("--kind", choices=KINDS, help="what it is a corpus of (cough)")
    parser.add_argument("--count", "--clips", type=int, help="how many files (240)")
    parser.add_argument("--seed", type=int, help="0 or more (42)")
    lengths = parser.add_argument_group("of kinds that have them")
    lengths.add_argument("--min-seconds", type=float, help="shortest recording")
    lengths.add_argument("--max-seconds", type=float, help="longest recording")
    lengths.add_argument("--formats", type=lambda text: tuple(text.split(",")), help="separated by commas")
    args = parser.parse_args()
    try:
        settings = {"kind": "cough", "count": 240, "seed": 42} | (
            read_recipe(args.recipe, "corpus") if args.recipe else {}
        )
        settings |= {k: v for k, v in vars(args).items() if k not in ("out", "recipe") and v is not None}
        written = write_corpus(out=args.out, progress=partial(tqdm, unit="file", total=settings["count"]), **settings)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    state = "written" if written else "already there, nothing done"
    print(f"{args.out}: {settings['count']} files of kind '{settings['kind']}', seed {settings['seed']}: {state}")


if __name__ == "__main__":
    main()
