"""The masked loss: cross-entropy over the supervised positions only, as a sum and a count.

    L(step) = sum over supervised tokens of -log p(token | what precedes it)  /  number of supervised tokens

Both sums run over all micro-batches of one optimizer step. The mean of the micro-batches' means is another number as
soon as they supervise different counts of tokens, and its gradient another gradient (measured 206% off on ragged
batches), so this module never divides: who knows the step's total does.

Why logits only at supervised positions: one row of logits is V numbers. At Qwen2's V = 151,936 a 512-token row has
0.3 GB of them in fp32, and the softmax and its gradient need as much again each (0.9 GB in all), while MedQA supervises
about 11 tokens of 274. Selecting the hidden states first makes the head's cost follow the 11.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


def supervised_states(
    hidden: torch.Tensor, input_ids: torch.Tensor, supervised: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states where the next token is supervised, and those next tokens.

    Args:
        hidden: (B, T, D), the last hidden states.
        input_ids: (B, T) token ids.
        supervised: (B, T) bool, True where the token is one to be learned. Position 0 has no predecessor.

    Returns:
        states (N, D) and targets (N,), N the number of supervised tokens after the first position.
    """
    mask = supervised[:, 1:]  # the hidden state at t predicts the token at t + 1
    return hidden[:, :-1][mask], input_ids[:, 1:][mask]  # (B, T-1, D) -> (N, D)


def masked_cross_entropy(
    hidden: torch.Tensor, head: nn.Module, input_ids: torch.Tensor, supervised: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the supervised tokens' losses, their count), both 0-dim; the logits, (N, V), are in fp32.

    Args:
        hidden, input_ids, supervised: as for `supervised_states`.
        head: the output head, (N, D) -> (N, V).
    """
    states, targets = supervised_states(hidden, input_ids, supervised)
    return F.cross_entropy(head(states).float(), targets, reduction="sum"), targets.new_tensor(targets.numel())
