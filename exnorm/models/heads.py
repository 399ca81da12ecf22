"""Heads of segmentation networks: FCN, PSPNet's pyramid pooling, and DeepLabv3.

J. Long et al., "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015; H. Zhao et al., "Pyramid Scene
Parsing Network", CVPR 2017; L.-C. Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017.

A head takes the (N, C, H, W) features of a backbone and returns (N, num_classes, H, W) logits. The width of a head
follows C. For the C = 2048 of ResNet-50 it is the papers': 512 channels for `fcn` and `psp`, 256 for `deeplabv3`.

Differences. `fcn` is torchvision's `FCNHead`: the head of SN's released code, plus a dropout of 0.1. As an auxiliary
head it has C / 4 = 256 channels, where SN's code has 512. `psp` resizes with `align_corners=False` and drops single
values, where the code of PSPNet's authors resizes with `align_corners=True` and drops channels. `deeplabv3` is
torchvision's `DeepLabHead`, with the paper's dilations for stride 16, too. What SN's paper calls DeepLab has no pyramid
of dilations: it is `fcn` on a dilated backbone.

Legend: N batch, C channels, H and W positions, B bins.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.models.segmentation.fcn import FCNHead

BINS = (1, 2, 3, 6)  # the grids of PSPNet, per side


def fcn(in_channels: int, num_classes: int, output_stride: int) -> nn.Module:
    """Return a 3x3 convolution to C / 4 channels, norm, ReLU, dropout 0.1, and a 1x1 convolution."""
    return FCNHead(in_channels, num_classes)


def deeplabv3(in_channels: int, num_classes: int, output_stride: int) -> nn.Module:
    """Return DeepLabv3's head with C / 8 channels, which is torchvision's `DeepLabHead` for C = 2048.

    The dilations of its 3x3 convolutions are 12, 24 and 36 at stride 8, and half of that at stride 16.
    """
    width = in_channels // 8
    unit = 96 // output_stride
    return nn.Sequential(
        ASPP(in_channels, (unit, 2 * unit, 3 * unit), width),
        *_convolved(width, width, 3),
        nn.Conv2d(width, num_classes, 1),
    )


class PyramidHead(nn.Module):
    """PSPNet's head: features, and their averages over four grids, into a 3x3 convolution.

    The averages over 1x1, 2x2, 3x3 and 6x6 bins each go through a 1x1 convolution to C / 4 channels, norm and ReLU.
    They are resized to the size of the features (bilinear, `align_corners=False`) and concatenated with them. Then
    follow a 3x3 convolution to C / 4 channels, norm, ReLU, dropout 0.1, and a 1x1 convolution.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        width = in_channels // 4
        self.branches = nn.ModuleDict({f"bin{bins}": _convolved(in_channels, width, 1) for bins in BINS})
        self.bottleneck = _convolved(in_channels + len(BINS) * width, width, 3)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for bins, branch in zip(BINS, self.branches.values(), strict=True):
            part = branch(adaptive_average(x, bins))
            parts.append(F.interpolate(part, size=x.shape[-2:], mode="bilinear", align_corners=False))
        return self.classifier(self.dropout(self.bottleneck(torch.cat(parts, 1))))


def psp(in_channels: int, num_classes: int, output_stride: int) -> nn.Module:
    """Return PSPNet's head; see `PyramidHead`."""
    return PyramidHead(in_channels, num_classes)


def _convolved(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


def adaptive_average(x: Tensor, bins: int) -> Tensor:
    """Return the (N, C, bins, bins) averages of (N, C, H, W), as `F.adaptive_avg_pool2d(x, bins)`.

    Bin i covers the positions from floor(i H / bins) to ceil((i + 1) H / bins). The sums are matrix products, because
    the backward of torch's function is not deterministic on a GPU.
    """
    members_BW, count_B = _members(x.shape[3], bins, x)
    x = x @ members_BW.T / count_B
    members_BH, count_B = _members(x.shape[2], bins, x)
    return members_BH @ x / count_B[:, None]


def _members(length: int, bins: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 where a position is in a bin and else 0, (bins, length), and how many each bin has, (bins,)."""
    # Made on the device: a copy from the host would make a GPU wait, and cannot be in a CUDA graph.
    position = torch.arange(length, device=like.device)
    bin_B1 = torch.arange(bins, device=like.device)[:, None]
    inside = (position >= bin_B1 * length // bins) & (position < ((bin_B1 + 1) * length + bins - 1) // bins)
    return inside.to(like.dtype), inside.sum(1).to(like.dtype)


Head = Callable[[int, int, int], nn.Module]
HEADS: dict[str, Head] = {"fcn": fcn, "psp": psp, "deeplabv3": deeplabv3}
# The norms of a head whose input is pooled to one position. Some normalizers cannot normalize one value.
POOLED: dict[str, str] = {"psp": "head.branches.bin1.*", "deeplabv3": "head.0.convs.4.*"}


def initialise(head: nn.Module) -> nn.Module:
    """Initialise the convolutions of a head as He et al. (2015): normal, by the number of inputs. Return the head."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return head
