"""mini-WebVision: Google's images for the first 50 classes of WebVision 1.0, 66 thousand images.

L. Jiang et al., "MentorNet", ICML 2018; the benchmark of DivideMix (Li et al., ICLR 2020) and its followers, tested on
the same 50 classes of WebVision's validation set and of ImageNet's (`data.val=[mini_webvision,imagenet]`).
"""

from exnorm.data.sets.webvision import fingerprint, load

__all__ = ["fingerprint", "load"]
