"""Backbones by their names: any model of timm, and torchvision's ShuffleNet v2.

`classifier` gives a complete classification network. `features` gives the same backbone without its classifier: it
returns its last feature maps at the stride that is asked for.
"""

from typing import Any

import timm
import torchvision
from torch import nn

from exnorm.config.errors import UserError, first_line, suggest
from exnorm.models import resnet_small as _registered  # noqa: F401  # with timm

TORCHVISION_PREFIX = "shufflenet_v2_"  # timm has none
ADVICE = "use a ResNet, such as model=resnet50"
# What a constructor of timm raises for an option that it does not have, or a value that it does not allow.
_REFUSALS = (TypeError, ValueError, RuntimeError, AssertionError)


def classifier(model_config: Any, *, num_classes: int) -> nn.Module:
    """Return a classification network with `num_classes` outputs, with the norms of its library.

    Raises:
        UserError: an unknown name, an option that the constructor refuses, or a head.
    """
    if model_config.head is not None:
        raise UserError(f"model.head={model_config.head} is for segmentation; leave model.head at null here")
    try:
        return _classifier(model_config, num_classes)
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError, OSError) as problem:
        raise UserError(first_line(problem)) from problem


def _classifier(config: Any, num_classes: int) -> nn.Module:
    if config.name.startswith(TORCHVISION_PREFIX):
        return _torchvision(config, num_classes, dict(config.options))
    return timm.create_model(
        _architecture(config),
        pretrained=config.pretrained,
        num_classes=num_classes,
        drop_rate=config.drop_rate,
        **dict(config.options),
    )


def _architecture(config: Any) -> str:
    """Return the name in timm."""
    architecture: str = config.architecture or config.name
    if not timm.is_model(architecture):
        raise UserError(f"unknown model; {suggest(architecture, timm.list_models())}")
    return architecture


def _torchvision(config: Any, num_classes: int, options: dict[str, Any]) -> nn.Module:
    if config.drop_rate:
        raise UserError("torchvision's ShuffleNet v2 has no dropout; leave model.drop_rate at 0")
    if not config.pretrained:
        return torchvision.models.get_model(config.name, num_classes=num_classes, **options)
    model = torchvision.models.get_model(config.name, weights="DEFAULT", **options)
    assert isinstance(model.fc, nn.Linear)
    if num_classes != model.fc.out_features:
        model.fc = nn.Linear(model.fc.in_features, num_classes)
    return model


def features(model_config: Any, *, output_stride: int, count: int) -> Any:
    """Return a backbone whose forward gives its last `count` feature maps, the last one at `output_stride`.

    Its state dict is that of the classification network without the classifier, such as `fc`. `feature_info` has the
    numbers of channels. The argument wins over `output_stride` in `model_config.options`.

    Raises:
        UserError: an unknown name, a backbone that has no features at this stride, an option that is refused, or
            pretrained weights that cannot be downloaded.
    """
    if model_config.name.startswith(TORCHVISION_PREFIX):
        raise UserError(f"torchvision's ShuffleNet v2 has no features at stride {output_stride}; {ADVICE}")
    architecture = _architecture(model_config)
    indices = tuple(range(-count, 0))
    try:
        backbone = _features(architecture, model_config, out_indices=indices, output_stride=output_stride)
    except OSError as problem:
        raise UserError(first_line(problem)) from problem
    except _REFUSALS:
        # timm cannot dilate this backbone. It may have the stride without dilation, as ViTs do.
        backbone = _undilated_features(architecture, model_config, indices)
    info = backbone.feature_info
    if info.reduction()[-1] != output_stride:
        strides = ", ".join(str(stride) for stride in sorted(set(info.reduction(list(range(len(info)))))))
        raise UserError(
            f"its last features cannot have stride {output_stride}: its stages have the strides {strides}, and timm "
            f"cannot dilate it; {ADVICE}"
        )
    return backbone


def _undilated_features(architecture: str, config: Any, indices: tuple[int, ...]) -> Any:
    try:
        return _features(architecture, config, out_indices=indices)
    except (*_REFUSALS, AttributeError) as problem:
        raise UserError(f"timm cannot make a feature extractor of it ({first_line(problem)}); {ADVICE}") from problem


def _features(architecture: str, config: Any, **more: Any) -> Any:
    options = {key: value for key, value in config.options.items() if key != "output_stride"}
    return timm.create_model(architecture, pretrained=config.pretrained, features_only=True, **options, **more)
