"""The network and its runtime: names of the weights, masks, flat batches."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import get_model

from skewless.core.errors import DefinitionError
from skewless.core.networks import build_network
from skewless.core.networks.attn_mil_resnet import AttnMILResNet
from skewless.core.runtimes import RuntimeSettings
from skewless.core.runtimes.eager import EagerRuntime
from tests.oracles import cough as oracle
from tests.recordings import one_thread  # noqa: F401

# The network takes images of any size; small ones keep the tests short.
SIZE = 48


@pytest.fixture(scope="module")
def network() -> AttnMILResNet:
    """Random weights, with batch-norm statistics and a bag head that make recordings differ."""
    torch.manual_seed(0)
    network = AttnMILResNet()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    nn.init.normal_(network.bag_head[4].weight, std=0.1)
    nn.init.normal_(network.attn[0].weight, std=0.1)
    nn.init.normal_(network.attn[2].weight, std=0.3)
    return network.eval()


@pytest.fixture(scope="module")
def recordings() -> list[torch.Tensor]:
    """Recordings of 1 to 11 segments at different levels: `(S, 3, SIZE, SIZE)` each."""
    generator = torch.Generator().manual_seed(1)
    counts = (3, 1, 7, 11, 2)
    return [(0.4 + 0.3 * i) * torch.randn(s, 3, SIZE, SIZE, generator=generator) for i, s in enumerate(counts)]


@pytest.fixture(scope="module")
def one_by_one(network, recordings) -> list[dict[str, torch.Tensor]]:
    with torch.no_grad():
        return [network.head(network.encode(x)) for x in recordings]


def padded(recordings: list[torch.Tensor], to: int, fill: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Recordings as one batch `(B, to, 3, SIZE, SIZE)` with `fill` after each one's end, and the mask."""
    batch = torch.full((len(recordings), to, 3, SIZE, SIZE), fill)
    mask = torch.zeros(len(recordings), to, dtype=torch.bool)
    for i, x in enumerate(recordings):
        batch[i, : len(x)], mask[i, : len(x)] = x, True
    return batch, mask


def test_state_dict_has_the_keys_of_existing_checkpoints(network):
    keys = set(network.state_dict())
    heads = {"attn.0", "attn.2", "bag_head.0", "bag_head.2", "bag_head.4", "seg_head"}
    expected = {f"{name}.{kind}" for name in heads for kind in ("weight", "bias")}
    expected |= {f"bag_head.2.{kind}" for kind in ("running_mean", "running_var", "num_batches_tracked")}
    backbone = {key for key in keys if key.startswith("backbone.")}
    assert keys - backbone == expected
    assert not [key for key in backbone if key.startswith("backbone.fc")]
    # torchvision's ResNet-18 has 122 entries, of which 2 are fc's.
    assert len(backbone) == 120
    assert network.state_dict()["backbone.conv1.weight"].shape == (64, 3, 7, 7)
    assert network.state_dict()["attn.0.weight"].shape == (128, 512)


def test_parameters_reach_the_layers():
    network = build_network({"attn_mil_resnet": {"dropout": 0.125, "attn_hidden": 16}})
    assert network.attn[0].out_features == 16
    assert network.dropout.p == network.bag_head[3].p == 0.125


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ({"resnet": {}}, "unknown network 'resnet'; there are: attn_mil_resnet"),
        ({"attn_mil_resnet": {"layers": 3}}, "attn_mil_resnet.*layers"),
        ({"attn_mil_resnet": {}, "other": {}}, "expected one"),
        ("attn_mil_resnet", "expected one"),
    ],
)
def test_wrong_definitions_are_refused(definition, message):
    with pytest.raises(ValueError, match=message):
        build_network(definition)


def test_recordings_are_told_apart(one_by_one):
    """The other tests compare probabilities: they mean something only where these are spread."""
    probabilities = sorted(float(out["bag_probability"]) for out in one_by_one)
    assert min(b - a for a, b in pairwise(probabilities)) > 1e-3
    assert 0.01 < probabilities[0] < probabilities[-1] < 0.99


def test_forward_is_encode_then_head(network, recordings, one_by_one):
    for x, expected in zip(recordings, one_by_one, strict=True):
        with torch.no_grad():
            bag, segments, segment_logits, bag_logit = network(x[None], torch.ones(1, len(x), dtype=torch.bool))
        assert torch.equal(bag[0], expected["bag_probability"])
        assert torch.equal(segments[0], expected["segment_probabilities"])
        assert torch.equal(segment_logits[0], expected["segment_logits"])
        assert torch.equal(bag_logit[0], expected["bag_logit"])
        assert bag_logit.shape == bag.shape == (1,)
        assert segments.shape == segment_logits.shape == (1, len(x))


def test_probabilities_are_the_logits_through_a_sigmoid(one_by_one):
    for out in one_by_one:
        for probability, logit in (("bag_probability", "bag_logit"), ("segment_probabilities", "segment_logits")):
            expected = 1 / (1 + np.exp(-out[logit].double().numpy()))
            np.testing.assert_allclose(out[probability].numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("fill", [0.0, 100.0, float("nan")])
def test_padding_does_not_change_outputs(network, recordings, one_by_one, fill):
    """Whatever the padding holds: outputs of the real segments stay, those of the padding are 0."""
    batch, mask = padded(recordings, to=13, fill=fill)
    with torch.no_grad():
        bag, segments, _, _ = network(batch, mask)
    for i, (x, expected) in enumerate(zip(recordings, one_by_one, strict=True)):
        # Another batch size may choose another convolution kernel: float32's last bits.
        torch.testing.assert_close(bag[i], expected["bag_probability"], atol=1e-6, rtol=0)
        torch.testing.assert_close(segments[i, : len(x)], expected["segment_probabilities"], atol=1e-6, rtol=0)
        assert (segments[i, len(x) :] == 0).all()


def test_attention_is_the_oracles_softmax(network, recordings):
    with torch.no_grad():
        for x in recordings:
            features = network.encode(x)
            out = network.head(features)
            weights, pooled = oracle.attention_pool(
                features, network.attn[0].weight, network.attn[0].bias, network.attn[2].weight, network.attn[2].bias
            )
            # Sums over 512 features and 128 hidden units in float32, of scores of a few units.
            np.testing.assert_allclose(out["segment_attention"], weights, atol=1e-5)
            assert float(out["segment_attention"].sum()) == pytest.approx(1.0, abs=1e-6)
            logit = network.bag_head(torch.tensor(pooled, dtype=torch.float32)[None])
            np.testing.assert_allclose(out["bag_logit"], logit.squeeze(), atol=1e-4)


def test_attention_prefers_some_segments(one_by_one):
    """With equal weights a mean would pass the tests above."""
    attention = one_by_one[3]["segment_attention"]
    assert attention.max() > 1.5 * attention.min()


def test_masked_attention_is_zero_and_the_rest_sums_to_one(network):
    features = torch.randn(2, 5, 512, generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[True, True, False, False, False], [True, True, True, True, True]])
    with torch.no_grad():
        attention = network.pool(features, mask)["segment_attention"]
    assert (attention[0, 2:] == 0).all()
    torch.testing.assert_close(attention.sum(dim=1), torch.ones(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("micro_batch", [1, 5, 32])
def test_flat_batch_equals_one_by_one(network, recordings, one_by_one, micro_batch):
    outputs = EagerRuntime(network, torch.device("cpu"), RuntimeSettings(micro_batch=micro_batch))(recordings)
    assert len(outputs) == len(recordings)
    for x, out, expected in zip(recordings, outputs, one_by_one, strict=True):
        assert set(out) == set(expected)
        assert out["segment_probabilities"].shape == (len(x),)
        for name in ("bag_probability", "segment_probabilities", "segment_attention"):
            torch.testing.assert_close(out[name], expected[name], atol=1e-6, rtol=0)


def test_runtime_bounds_the_batch_and_switches_dropout_off(recordings):
    seen = []

    class Probe(nn.Module):
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((len(x), self.training, torch.is_inference_mode_enabled()))
            return x.flatten(1)[:, :2]

        def head(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"features": features}

    outputs = EagerRuntime(Probe().train(), torch.device("cpu"), RuntimeSettings(micro_batch=10))(recordings)
    assert seen == [(10, False, True), (10, False, True), (4, False, True)]
    for x, out in zip(recordings, outputs, strict=True):
        assert torch.equal(out["features"], x.flatten(1)[:, :2])


def test_runtime_of_nothing_is_nothing(network):
    assert EagerRuntime(network, torch.device("cpu"))([]) == []


def test_runtime_refuses_an_empty_micro_batch():
    with pytest.raises(ValueError, match="micro_batch is 0"):
        RuntimeSettings(micro_batch=0)


def test_padding_does_not_reach_batch_statistics_in_training(recordings):
    """Training pads recordings to one length: the running means and variances must be those of the real segments."""

    def statistics_after(batch: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        torch.manual_seed(2)
        network = AttnMILResNet().train()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        network(batch, mask)
        changed = {name: value for name, value in network.state_dict().items() if "running" in name}
        assert not torch.equal(changed["backbone.bn1.running_mean"], before["backbone.bn1.running_mean"])
        return changed

    tight = statistics_after(*padded(recordings[:3], to=7, fill=0.0))
    loose = statistics_after(*padded(recordings[:3], to=9, fill=50.0))
    for name in tight:
        assert torch.equal(tight[name], loose[name]), name


# Each with the place of the layer that is replaced.
BACKBONES = {
    "resnet18": "fc",
    "mobilenet_v3_small": "classifier.3",
    "efficientnet_b0": "classifier.1",
    "convnext_tiny": "classifier.2",
    "densenet121": "classifier",
    "shufflenet_v2_x0_5": "fc",
}


@pytest.mark.parametrize("model", BACKBONES)
def test_a_torchvision_classifier_is_torchvisions_own(model: str):
    """With the same weights it gives the logits that torchvision gives for so many classes."""
    torch.manual_seed(0)
    network = build_network({"torchvision": model, "classes": 5}).eval()
    theirs = get_model(model, weights=None, num_classes=5).eval()
    weights = network.state_dict()
    renamed = {
        f"{BACKBONES[model]}.{name.removeprefix('classifier.')}"
        if name.startswith("classifier.")
        else name.removeprefix("backbone."): value
        for name, value in weights.items()
    }
    theirs.load_state_dict(renamed, strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = network.encode(images)
        outputs = network.head(features)
        assert features.shape == (2, network.classifier.in_features)
        assert torch.equal(outputs["class_logits"], theirs(images))
    assert float(outputs["class_probabilities"].sum()) == pytest.approx(2)


@pytest.mark.parametrize("model", ["resnet18", "convnext_tiny", "vit_b_16"])
def test_a_torchvision_classifier_for_other_channels(model: str):
    """Only the number of channels of the first convolution changes."""
    with torch.device("meta"):
        two = build_network({"torchvision": {"model": model, "classes": 3, "channels": 2}})
        three = build_network({"torchvision": {"model": model, "classes": 3}})
        assert two.encode(torch.zeros(4, 2, 224, 224)).shape[0] == 4
    shapes = {name: value.shape for name, value in three.state_dict().items()}
    changed = {name: value.shape for name, value in two.state_dict().items() if value.shape != shapes[name]}
    assert set(two.state_dict()) == set(shapes)
    ((name, shape),) = changed.items()
    assert (shape[1], shapes[name][1], name) == (
        2,
        3,
        next(n for n in shapes if n.endswith("weight") and len(shapes[n]) == 4),
    )
    one, other = (next(m for m in network.modules() if isinstance(m, nn.Conv2d)) for network in (two, three))
    for setting in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(one, setting) == getattr(other, setting)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"model": "squeezenet1_1"}, "model is 'squeezenet1_1', whose last layer is AdaptiveAvgPool2d"),
        ({"model": "googlenet"}, "model is 'googlenet', which has auxiliary outputs in training"),
        ({"model": "resnet19"}, "model is 'resnet19', expected one of torchvision's: alexnet, "),
        ({"model": "fcn_resnet50"}, "model is 'fcn_resnet50', expected one of torchvision's"),
        ({"model": "resnet18", "classes": 0}, "classes is 0 and channels 3, expected 1 or more"),
        ({"model": "resnet18", "height": 224}, "unknown parameter height"),
    ],
)
def test_torchvision_models_that_are_no_classifiers_are_refused(parameters, message: str):
    with pytest.raises(DefinitionError, match=message):
        build_network({"torchvision": {"classes": 3, **parameters}})
