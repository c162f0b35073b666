#!/usr/bin/env python3
"""Write a checkpoint's network as an ONNX graph in float32, for use without this project.

In: spectrograms (B, S, 3, 224, 224) float32, what the pipeline gives for B recordings padded to S segments, and
segment_mask (B, S) bool, False where a segment is padding. Out: bag_probability and bag_logit (B,),
segment_probabilities, segment_logits and segment_attention (B, S).

With --whole-path the graph starts at the waveform. In: waveforms (S, samples) float32, one recording's segments after
resampling, filtering and cutting. Out: bag_probability and bag_logit (), the others (S,).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from skewless.core.pipeline import Pipeline
from skewless.packaging.export import export_onnx, export_segment_model
from skewless.training.checkpoint import load_checkpoint, network_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="best.pth of a run")
    parser.add_argument("--out", type=Path, required=True, help="file to write, such as model.onnx")
    parser.add_argument("--whole-path", action="store_true", help="with everything that follows the segmentation")
    args = parser.parse_args()
    try:
        checkpoint = load_checkpoint(args.checkpoint)
        network = network_of(checkpoint)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        if args.whole_path:
            export_segment_model(network, Pipeline.from_dict(checkpoint["pipeline"]), args.out)
        else:
            export_onnx(network, args.out)
    except ValueError as error:
        parser.exit(2, f"export_onnx.py: {error}\n")
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
