"""The masked loss: cross-entropy over the supervised positions only, as a sum.

    L(step) = sum over supervised tokens of -log p(token | what precedes it)  /  number of supervised tokens

Both sums run over all micro-batches of one optimizer step. The mean of the micro-batches' means is something else
where their numbers of supervised tokens differ, and so is its gradient (206% off, measured on ragged batches). So this
module never divides: the trainer, which knows the step's total beforehand, passes in `factor`.

Why logits only at supervised positions: at Qwen2's V = 151,936 a 512-token row has 0.3 GB of them in fp32, and the
softmax and its gradient need as much again each, while MedQA supervises about 11 tokens of 274. Selecting the hidden
states first makes the head's cost follow the 11; LOGIT_ROWS at a time bound it where every token is supervised.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_ROWS = 256  # positions whose logits exist at a time


def masked_loss(
    hidden: Tensor, logits: Callable[[Tensor], Tensor], targets: Tensor, weights: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """The summed loss, and the gradient of factor * that.

    Args:
        hidden: (S, D), the hidden states that predict a supervised token. targets: (S,), those tokens.
        logits: (n, D) -> (n, V), the model's head. weights: (S,), 0 for padding. factor: 0-dim.

    Returns:
        0-dim fp32, and (S, D).
    """
    leaf = hidden.detach().requires_grad_()
    leaf.grad, total = torch.zeros_like(leaf), torch.zeros((), device=leaf.device)
    for start in range(0, len(leaf), LOGIT_ROWS):
        part = slice(start, start + LOGIT_ROWS)
        with torch.enable_grad():
            losses = F.cross_entropy(logits(leaf[part]).float(), targets[part], reduction="none")
            loss = (losses * weights[part]).sum()
        (loss * factor).backward()
        total += loss.detach()
    return total, leaf.grad
