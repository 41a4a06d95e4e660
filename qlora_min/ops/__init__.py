"""Tensor operations below the level of a layer: formulas in plain PyTorch and the same as Triton kernels, attention on
packed rows, dropout, and the flat tensor of trainable weights.
"""
