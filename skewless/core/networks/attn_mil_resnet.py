"""A recording is a bag of segments: ResNet-18 features, attention pooling, one probability for the bag.

Multiple-instance learning with attention pooling after M. Ilse, J. M. Tomczak, M. Welling, "Attention-based Deep
Multiple Instance Learning", ICML 2018, equations 7 and 8 (without the gate).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torchvision.models import resnet18

from skewless.core.networks.network import Network


class AttnMILResNet(Network):
    """Bag probability and per-segment probabilities from segment images.

    State-dict keys: `backbone.*` (torchvision's ResNet-18 without `fc`), `attn.0/2.*`, `bag_head.0/2/4.*`,
    `seg_head.*`.

    `encode` and `pool` are the two halves: all segments of many recordings go through the backbone as one flat
    batch, then each recording is pooled on its own.
    """

    packages: ClassVar[tuple[str, ...]] = ("torch", "torchvision")
    input_name: ClassVar[str] = "images"
    default_loss: ClassVar[str] = "bag"

    def __init__(self, dropout: float = 0.3, attn_hidden: int = 128):
        super().__init__()
        self.backbone = resnet18(weights=None)
        features = self.backbone.fc.in_features
        self.backbone.fc = nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.attn = nn.Sequential(nn.Linear(features, attn_hidden), nn.Tanh(), nn.Linear(attn_hidden, 1))
        self.bag_head = nn.Sequential(
            nn.Linear(features, 512), nn.ReLU(), nn.BatchNorm1d(512), nn.Dropout(dropout), nn.Linear(512, 1)
        )
        self.seg_head = nn.Linear(features, 1)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Segment images `(N, 3, 224, 224)` to features `(N, 512)`; rows do not depend on one another in eval mode."""
        return self.dropout(self.backbone(x))

    def pool(self, features: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features `(B, S, 512)` and a mask `(B, S)` (True: a real segment) to the outputs, by name:

        bag_probability `(B,)`, segment_probabilities `(B, S)`, segment_logits `(B, S)`, bag_logit `(B,)` and
        segment_attention `(B, S)`, which sums to 1 over a bag. Probabilities and attention of masked segments are 0.
        """
        scores = self.attn(features).squeeze(-1).masked_fill(~mask, float("-inf"))
        attention = torch.softmax(scores, dim=1)
        pooled = (attention.unsqueeze(-1) * features).sum(dim=1)
        bag_logit = self.bag_head(pooled).squeeze(-1)
        segment_logits = self.seg_head(features).squeeze(-1)
        return {
            "bag_probability": torch.sigmoid(bag_logit),
            "segment_probabilities": torch.sigmoid(segment_logits) * mask,
            "segment_logits": segment_logits,
            "bag_logit": bag_logit,
            "segment_attention": attention,
        }

    def head(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """One recording's features `(S, 512)` to its outputs: those of `pool` without the bag dimension."""
        mask = features.new_ones((1, features.shape[0]), dtype=torch.bool)
        return {name: value[0] for name, value in self.pool(features.unsqueeze(0), mask).items()}

    def forward(
        self, x: torch.Tensor, seg_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(B, S, 3, 224, 224)` and `(B, S)` bool to bag probability `(B,)`, segment probabilities `(B, S)`, segment
        logits `(B, S)` and bag logit `(B,)`. Only real segments reach the backbone, so padding cannot touch its
        batch statistics in training. A bag must have at least one real segment.
        """
        encoded = self.encode(x[seg_mask])
        features = encoded.new_zeros(*seg_mask.shape, encoded.shape[-1])
        features[seg_mask] = encoded
        out = self.pool(features, seg_mask)
        return out["bag_probability"], out["segment_probabilities"], out["segment_logits"], out["bag_logit"]
