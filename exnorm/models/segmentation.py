"""Semantic segmentation networks: a dilated backbone of timm, a head, and an auxiliary head for training."""

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from exnorm.config.errors import UserError
from exnorm.models.backbones import features
from exnorm.models.heads import HEADS, POOLED, fcn, initialise
from exnorm.norms import Norm

STRIDES = (8, 16)
DEFAULT_HEAD = "fcn"


class SegmentationNetwork(nn.Module):
    """A backbone with a head on its last feature maps, and maybe an auxiliary head on those before.

    Args:
        backbone: returns a list of feature maps.
        head, aux_head: return logits for each position of their features.
        pooled: a pattern of the names of the norms that see one position only; None if there are none.

    Shape: images (N, 3, H, W). In evaluation the result is `logits`, (N, num_classes, h, w), where h and w are H and W
    divided by the output stride. In training it is a tuple: `(logits,)`, or `(logits, aux_logits)`. The task resizes
    logits to the size of the masks.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, aux_head: nn.Module | None = None, *, pooled: str | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.aux_head = aux_head
        self.pooled = pooled

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        maps = self.backbone(images)
        logits = self.head(maps[-1])
        if not self.training:
            return logits
        return (logits,) if self.aux_head is None else (logits, self.aux_head(maps[-2]))

    def check_pooled_norms(self) -> None:
        """Raise an error if a layer of exnorm cannot normalize the one position that a pooling leaves.

        Raises:
            UserError: the message has the option that keeps the head's own norm there.
        """
        for name, module in self.named_modules():
            if isinstance(module, Norm) and self.pooled is not None and fnmatchcase(name, self.pooled):
                try:
                    module.check_input(torch.empty(2, module.num_features, 1, 1))
                except UserError as problem:
                    raise UserError(
                        f"{name} normalizes features that are pooled to 1 position, which a {type(module).__name__} of "
                        f"{module.num_features} channels cannot do; keep the batch normalization there: type "
                        f"'model.keep=[{self.pooled}]'"
                    ) from problem


def segmentation_network(model_config: Any, *, num_classes: int, output_stride: int, aux: bool) -> SegmentationNetwork:
    """Return a segmentation network with batch normalization. `exnorm.models.normalized` converts it.

    The backbone is `model_config.name`, with the names of its classification network in its state dict. The head is
    `model_config.head`, or `fcn` if that is None. `exnorm.models.heads` describes the heads. Only the backbone can be
    pretrained. The convolutions of the heads start with He's normal initialisation.

    Args:
        output_stride: 8 or 16, the size of an image divided by that of its features.
        aux: add an auxiliary `fcn` head on the second-to-last stage. It runs in training only.

    Raises:
        UserError: an unknown head or model, or a backbone that has no features at this stride.
    """
    chosen = model_config.head or DEFAULT_HEAD
    if chosen not in HEADS:
        raise UserError(f"model.head={chosen} is unknown; allowed: {', '.join(HEADS)}")
    if output_stride not in STRIDES:
        allowed = " or ".join(map(str, STRIDES))
        raise UserError(f"an output stride of {output_stride} is not possible; allowed: {allowed}")
    backbone = features(model_config, output_stride=output_stride, count=2 if aux else 1)
    channels = backbone.feature_info.channels()
    head = initialise(HEADS[chosen](channels[-1], num_classes, output_stride))
    aux_head = initialise(fcn(channels[-2], num_classes, output_stride)) if aux else None
    return SegmentationNetwork(backbone, head, aux_head, pooled=POOLED.get(chosen))
