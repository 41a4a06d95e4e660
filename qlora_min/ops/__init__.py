"""Operations on tensors below the level of a layer: formulas in plain PyTorch, the same as Triton kernels, attention of
packed rows, and the random bits of dropout.
"""
