"""Triton kernels that compute the (N, C) coefficients of a normalizer on an NVIDIA GPU. `layer` imports Triton.

`exnorm.norms.*` has each formula. These kernels repeat the formula and its gradient, for the options that the papers
use. For other options and other normalizers, the formula itself runs between the same passes over the big tensors.
"""
