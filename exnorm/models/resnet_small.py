"""`exnorm_resnet_small`: a ResNet for real images of 32 pixels, which one core trains in minutes.

timm's ResNets reduce 32 pixels to 8 before their first block. This one keeps 16: it has one convolution with stride 2,
then four stages of basic blocks with strides 1, 2, 2 and 2. It is made of timm's blocks and registered with timm.
"""

from collections.abc import Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

NAME = "exnorm_resnet_small"
default_cfgs = generate_default_cfgs(  # timm looks for this name
    {NAME: {"input_size": (3, 32, 32), "num_classes": 10, "first_conv": "stem.conv", "classifier": "head.fc"}}
)


@register_model
def exnorm_resnet_small(
    pretrained: bool = False,
    channels: Sequence[int] = (32, 64, 128, 256),
    depths: Sequence[int] = (1, 1, 1, 1),
    **options: Any,
) -> ByobNet:
    """Return the network.

    Args:
        pretrained: not possible; there are no weights.
        channels: of the four stages. The first convolution has as many as the first stage.
        depths: numbers of blocks of the four stages; (2, 2, 2, 2) with the channels 64 to 512 is a ResNet-18.
        options: keyword arguments of timm's ByobNet.
    """
    stages = enumerate(zip(depths, channels, strict=True))
    blocks = tuple(ByoBlockCfg(type="basic", d=d, c=c, s=2 if place else 1) for place, (d, c) in stages)
    config = ByoModelCfg(blocks=blocks, stem_chs=channels[0], stem_pool=None)
    return build_model_with_cfg(
        ByobNet, NAME, pretrained, model_cfg=config, feature_cfg={"flatten_sequential": True}, **options
    )
