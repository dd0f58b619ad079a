"""The masked-language-model head: dense, GELU, LayerNorm, decoder tied to the word embeddings (as XLM-R's).

The vocabulary is padded to a multiple of 64 and split over the tensor-parallel ranks; the padding takes no part in the
softmax.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY_MULTIPLE = 64  # whatever the number of ranks, so that checkpoints do not depend on it


def padded(vocabulary: int) -> int:
    """The rows of the word embedding matrix."""
    return -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


class MaskedHead(nn.Module):
    """Hidden states at masked positions to this rank's columns of the logits."""

    excluded: Tensor  # (columns,) -inf where the vocabulary is padding, else 0

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        columns = padded(vocabulary) // self.group.size()
        self.bias = nn.Parameter(torch.zeros(columns))
        set_tensor_model_parallel_attributes(self.bias, is_parallel=True, dim=0, stride=1)
        pieces = torch.arange(columns) + columns * self.group.rank()
        excluded = torch.zeros(columns).masked_fill(pieces >= vocabulary, -torch.inf)
        self.register_buffer("excluded", excluded, persistent=False)

    @torch.no_grad()
    def start_at(self, logits: Tensor) -> None:
        """Sets the bias so that an untrained head predicts softmax(logits); logits: (vocabulary,)."""
        columns = len(self.bias)
        whole = torch.zeros(columns * self.group.size())
        whole[: len(logits)] = logits
        self.bias.copy_(whole.narrow(0, columns * self.group.rank(), columns))

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """hidden: (..., width); embedding: this rank's (columns, width) of the word embeddings. Returns (..., columns)."""
        hidden = self.norm(F.gelu(self.dense(hidden)))
        if self.group.size() > 1:
            hidden = copy_to_tensor_model_parallel_region(hidden, self.group)  # sums the ranks' gradients
        return F.linear(hidden, embedding, self.bias + self.excluded)


def cross_entropy(logits: Tensor, labels: Tensor, twice_differentiable: bool = False) -> Tensor:
    """Negative log-likelihood in fp32 (or better) of labels (rows, masked), from vocabulary-parallel logits.

    megatron's is right to the first derivative only; `twice_differentiable` takes torch's, on one rank.
    """
    if not twice_differentiable:
        return vocab_parallel_cross_entropy(logits.float(), labels)
    assert parallel_state.get_tensor_model_parallel_world_size() == 1, "twice differentiable: one rank only"
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)


def gathered(logits: Tensor, vocabulary: int) -> Tensor:
    """All ranks' columns side by side without the padding: (..., columns) to (..., vocabulary), fp32, no gradient."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() > 1:
        columns = [torch.empty_like(logits) for _ in range(group.size())]
        torch.distributed.all_gather(columns, logits.detach().contiguous(), group=group)
        logits = torch.cat(columns, dim=-1)
    return logits[..., :vocabulary].float()
