"""Turn an ESC-style CSV (file, fold, category) into a manifest: one category against the rest, whole folds held out.

Of the folds that are not tested on, every n-th source recording of each category validates, with all its clips.
"""

import argparse
import csv
from collections import Counter
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="such as ../shared/data/esc10/esc10.csv")
    parser.add_argument("--out", type=Path, required=True, help="manifest to write")
    parser.add_argument("--positive", default="person_sneeze", help="the category that is labelled 1")
    parser.add_argument("--test-fold", default="4")
    parser.add_argument("--val-every", type=int, default=4, help="every n-th of the other sources validates")
    args = parser.parse_args()
    if not args.csv.is_file():
        parser.error(f"there is no file {args.csv}")
    with open(args.csv, newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row.get("file", ""))
    absent = {"file", "fold", "category"} - set(rows[0] if rows else ())
    if absent:
        parser.error(f"{args.csv} has no column {', '.join(sorted(absent))}, or no rows")
    if args.positive not in {row["category"] for row in rows}:
        parser.error(
            f"--positive is {args.positive!r}, expected one of {', '.join(sorted({r['category'] for r in rows}))}"
        )
    if args.test_fold not in {row["fold"] for row in rows}:
        parser.error(
            f"--test-fold is {args.test_fold!r}, expected one of {', '.join(sorted({r['fold'] for r in rows}))}"
        )
    if args.val_every < 2:
        parser.error(f"--val-every is {args.val_every}, expected at least 2")
    seen: Counter[str] = Counter()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file_path", "cough_label", "split"])
        splits: Counter[str] = Counter()
        for row in rows:
            if row["fold"] == args.test_fold:
                split = "test"
            else:
                # Clips cut from one source share the file name's middle part: they must stay on one side.
                source = row["file"].split("-")[1] if "-" in row["file"] else row["file"]
                key = f"{row['category']}/{source}"
                if key not in seen:
                    seen[key] = sum(k.startswith(row["category"] + "/") for k in seen)
                split = "val" if seen[key] % args.val_every == 0 else "train"
            splits[split] += 1
            writer.writerow([row["file"], int(row["category"] == args.positive), split])
    print(f"{args.out}: {dict(splits)}")


if __name__ == "__main__":
    main()
