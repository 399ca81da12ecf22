"""Networks: backbones by name, heads, the conversion to a normalizer, and weights from elsewhere."""

from exnorm.models.backbones import classifier
from exnorm.models.conversion import build_model, normalized
from exnorm.models.cost import count_parameters, gflops_per_image
from exnorm.models.parts import head_parameters
from exnorm.models.segmentation import SegmentationNetwork, segmentation_network
from exnorm.models.weights import load_ratios, load_weights

__all__ = [
    "SegmentationNetwork",
    "build_model",
    "classifier",
    "count_parameters",
    "gflops_per_image",
    "head_parameters",
    "load_ratios",
    "load_weights",
    "normalized",
    "segmentation_network",
]
