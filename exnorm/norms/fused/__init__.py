"""Normalizers on an NVIDIA GPU: their (N, C) coefficients in a few Triton kernels each. `layer` imports Triton.

`exnorm.norms.*` states each formula once; these kernels repeat it and its gradient for the options that the papers use.
Any other option, and any other normalizer, runs the formula itself between the same passes over the big tensors.
"""
