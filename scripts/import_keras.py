#!/usr/bin/env python3
"""Turn a picture classifier that was trained in Keras into a checkpoint that can be evaluated and packaged.

Reads MODEL.keras, MODEL.h5 or MODEL.weights.h5 as data: no layer is built and no code in the file runs. What the model does
to its input before ResNet50 has to be what the archive's pipeline does.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from skewless.core.postprocess import build_postprocessor
from skewless.core.config import read_config
from skewless.core.networks import build_network
from skewless.core.networks.keras_resnet50 import KerasResNet50
from skewless.core.pipeline import Pipeline
from skewless.importers import pytorch as legacy
from skewless.importers.keras_file import KerasFile, check_trained, read_keras


def check_pipeline(pipeline: Pipeline, model: KerasFile) -> None:
    """Raises ValueError unless the pipeline ends with what the model does to its own input."""
    if not model.stages:
        return
    expected = Pipeline.from_dict({"name": pipeline.name, "stages": list(model.stages)}).to_dict()["stages"]
    if pipeline.to_dict()["stages"][-len(expected) :] != expected:
        listed = yaml.safe_dump(expected, sort_keys=False, default_flow_style=None, width=110)
        raise ValueError(
            f"the model does this to its input itself, and pipeline '{pipeline.name}' does not end with it; end it so:\n{listed}"
        )


def run(args: argparse.Namespace) -> None:
    """Check everything, then write."""
    if args.out.exists():
        raise ValueError(f"{args.out} exists; choose another --out, or delete it")
    definitions = read_config(args.archive / "model-config.yaml")
    pipeline = Pipeline.from_yaml(args.archive / "pipeline.yaml")
    network = build_network(definitions["network"])
    if not isinstance(network, KerasResNet50):
        raise ValueError(f"{args.archive} has the network {definitions['network']}, expected keras_resnet50")
    classes = build_postprocessor(definitions["postprocess"]).classes
    if len(classes) != network.predictions.out_features:
        raise ValueError(f"{args.archive}: {len(classes)} classes for {network.predictions.out_features} outputs")
    model = read_keras(args.model, network, args.replaced)
    check_pipeline(pipeline, model)
    check_trained(model.weights)
    fitted = legacy.network_from(model.weights, definitions["network"])
    for note in model.notes:
        print(f"note: {note}")
    old = legacy.Legacy(model.sha256, model.weights, epoch=None, val_auc=None, config={})
    legacy.write(args.out, legacy.as_checkpoint(old, fitted, pipeline, definitions))
    done = ", ".join(next(iter(stage)) for stage in model.stages)
    print(f"{args.out}: behind pipeline '{pipeline.name}', which does what the model did itself: {done or 'nothing'}")
    print(f"its outputs are taken to be {', '.join(classes)}, in this order")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="what model.save or model.save_weights wrote")
    parser.add_argument("--archive", type=Path, default=Path("archive/portrait"), help="definition to import for")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint to write, such as runs/NAME/best.pth")
    parser.add_argument(
        "--replaced",
        nargs="+",
        default=[],
        metavar="LAYER",
        help="layers before ResNet50, such as a Lambda with preprocess_input, of which you know that the pipeline does the same",
    )
    args = parser.parse_args()
    try:
        run(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"import_keras.py: {error}\n")


if __name__ == "__main__":
    main()
