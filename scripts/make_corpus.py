"""Write a synthetic corpus of cough and not-cough recordings, to try the rest on. NOT FOR MEDICINE."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.corpus import FORMATS, CorpusError, write_corpus


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="No person was recorded: the sounds are computed from random numbers, and a detector trained "
        "on them knows nothing about real coughs. The same settings always make the same corpus.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        help="directory to make; refused if it holds anything else",
    )
    parser.add_argument("--clips", type=int, default=240, help="how many recordings; half of them are coughs")
    parser.add_argument("--seed", type=int, default=42, help="0 or more")
    parser.add_argument("--min-seconds", type=float, default=2.2, help="shortest recording")
    parser.add_argument("--max-seconds", type=float, default=4.0, help="longest recording")
    parser.add_argument("--formats", default=",".join(FORMATS), help="file formats, separated by commas")
    args = parser.parse_args()
    try:
        written = write_corpus(
            args.out,
            args.clips,
            args.seed,
            min_seconds=args.min_seconds,
            max_seconds=args.max_seconds,
            formats=tuple(args.formats.split(",")),
            progress=lambda indices: tqdm(indices, unit="clip"),
        )
    except (CorpusError, OSError) as error:
        parser.error(str(error))
    state = "written" if written else "already there, nothing done"
    print(f"{args.out}: {args.clips} recordings with manifest.csv and events.csv, seed {args.seed}: {state}")


if __name__ == "__main__":
    main()
