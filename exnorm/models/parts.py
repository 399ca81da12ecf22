"""The parts of a network: its backbone, its head, and the layers that give a value for each class."""

from torch import nn


def backbone_of(model: nn.Module) -> nn.Module | None:
    """Return `model.backbone`, which a network with heads of its own has; None for a classification network."""
    backbone = getattr(model, "backbone", None)
    return backbone if isinstance(backbone, nn.Module) else None


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the heads: all outside of `model.backbone`, or those of the classifiers."""
    backbone = backbone_of(model)
    if backbone is None:
        classifiers = [model.get_submodule(name) for name in sorted(_classifiers(model))]
        return [parameter for classifier in classifiers for parameter in classifier.parameters()]
    inside = set(backbone.parameters())
    return [parameter for parameter in model.parameters() if parameter not in inside]


def output_names(model: nn.Module) -> set[str]:
    """Return the names of the layers that have an output for each class: the classifiers, or each head's last layer."""
    if backbone_of(model) is None:
        return _classifiers(model)
    last: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            last[name.partition(".")[0]] = name
    return {name for part, name in last.items() if part != "backbone"}


def _classifiers(model: nn.Module) -> set[str]:
    """Return the names of the classifiers: timm's (a distilled DeiT has two), else the last linear layer."""
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    if named:
        return {named} if isinstance(named, str) else set(named)
    return set([name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:])
