"""The multilingual encoder: embeddings, Transformer with routed modules, masked-language-model head.

Shapes: hidden states (rows, length, width) throughout. Tensor-parallel ranks hold slices of one model; rows, route and
dropout are the same on all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, Protocol

from mlinterf_ds.runtime.parallel import replayed  # isort: skip  # first: it imports megatron without a compiler

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlinterf_ds.errors import UserError
from mlinterf_ds.model.layers import Block, mark_split, parallel_config, rotary_turns
from mlinterf_ds.model.routing import Routed, Router
from mlinterf_ds.sections import ModelConfig

SHARED = "shared"  # the name of the parameter group that all languages share
VOCABULARY_MULTIPLE = 64  # whatever the number of ranks, so that checkpoints do not depend on it


class Rows(Protocol):
    """The attributes of a batch that the engine reads, and how the batch comes to the device."""

    @property
    def languages(self) -> Tensor: ...  # (rows,) int64: index into the encoder's languages; stays on the host
    @property
    def step_languages(self) -> tuple[int, ...]: ...  # the languages of all ranks' rows, ascending
    def to(self, device: torch.device) -> Any: ...


class Batch(Rows, Protocol):
    """The attributes of a batch that a forward pass reads."""

    @property
    def tokens(self) -> Tensor: ...  # (rows, length) int64
    @property
    def positions(self) -> Tensor: ...  # (rows, masked) int64: columns to predict
    @property
    def labels(self) -> Tensor: ...  # (rows, masked) int64
    @property
    def weights(self) -> Tensor: ...  # (rows, masked) fp32
    @property
    def dropout_seed(self) -> int: ...
    @property
    def segment_ids(self) -> Tensor | None: ...  # (rows, length): tokens see those of the same number; None: the row
    @property
    def position_ids(self) -> Tensor | None: ...  # (rows, length) int64; None: columns


# -- the word embeddings of a large model --------------------------------------------------------------------------------
# They are the output matrix too. Autograd would make a matrix of their size for the gradient of each use, and one for the sum;
# these add the gradients to `weight.grad` as they arise, where a parameter group that `hands_over` has put its buffer there.


def collects(weight: Tensor) -> bool:
    """Whether the gradients of this parameter are added to its `grad` as they arise."""
    return getattr(weight, "collects", False) and weight.grad is not None and torch.is_grad_enabled()


class Looked(torch.autograd.Function):
    """Rows (..., width) of a matrix by number (...)."""

    @staticmethod
    def forward(context: Any, numbers: Tensor, weight: Tensor) -> Tensor:
        context.numbers, context.weight = numbers, weight
        return F.embedding(numbers, weight)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, None]:
        context.weight.grad.index_add_(0, context.numbers.flatten(), gradient.flatten(0, -2))
        return None, None


class Multiplied(torch.autograd.Function):
    """hidden (..., width) times the transpose of a matrix (columns, width): (..., columns)."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        context.weight = weight
        context.save_for_backward(hidden)
        return F.linear(hidden, weight)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (hidden,) = context.saved_tensors
        context.weight.grad.addmm_(gradient.flatten(0, -2).t(), hidden.flatten(0, -2))
        return gradient @ context.weight, None


class Embeddings(nn.Module):
    """Word (+ position + token type + language) embeddings, with LayerNorm if the model has one there, and with dropout.

    Rotary positions have no table: they turn queries and keys instead (`turns`).
    """

    def __init__(self, config: ModelConfig, vocabulary: int, positions: int, languages: int):
        super().__init__()
        self.dropout, width = config.dropout, config.width
        group = parallel_state.get_tensor_model_parallel_group()
        self.ranks = group.size()
        self.word = VocabParallelEmbedding(
            padded(vocabulary), width, init_method=nn.init.zeros_, config=parallel_config(), tp_group=group
        )
        mark_split(self.word.weight, 0)
        rotary, rows = config.position_kind == "rotary", config.positions or positions
        self.position = None if rotary else nn.Embedding(rows, width)
        self.offset = config.position_offset  # the row of the position table for a text's first token
        self.longest, self.rotary_width = rows - self.offset, config.kv_channels if rotary else 0
        self.token_type = nn.Embedding(config.token_types, width) if config.token_types else None
        self.language = nn.Embedding(languages, width) if languages else None
        self.norm = nn.LayerNorm(width, eps=config.epsilon) if config.embedding_norm else None

    def forward(self, tokens: Tensor, languages: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """(rows, length, width) of tokens (rows, length), languages (rows,) and position ids (rows, length), or columns."""
        length, most = tokens.shape[1], self.longest
        if length > most:
            raise UserError(f"rows of {length} tokens, the model has {most} positions: cut the rows to {most} tokens")
        alone = self.ranks == 1 and collects(self.word.weight)
        hidden = Looked.apply(tokens, self.word.weight) if alone else self.word(tokens)
        if self.position is not None:
            hidden = hidden + self.position(positions_of(tokens, position_ids) + self.offset)
        if self.token_type is not None:
            hidden = hidden + self.token_type(tokens.new_zeros(1))
        if self.language is not None:
            hidden = hidden + self.language(languages.to(tokens.device))[:, None]
        if self.norm is not None:
            hidden = self.norm(hidden)
        return F.dropout(hidden, self.dropout, self.training)

    def turns(self, tokens: Tensor, position_ids: Tensor | None) -> Tensor | None:
        """What turns queries and keys by their positions (`rotary_turns`); None: the model has learned positions."""
        if not self.rotary_width:
            return None
        ids = positions_of(tokens, position_ids).expand(tokens.shape)
        return rotary_turns(ids, self.rotary_width, self.word.weight.dtype)


class MaskedHead(nn.Module):
    """Maps hidden states at masked positions to this rank's columns of the logits: dense, GELU, LayerNorm, tied decoder (as
    XLM-R's).

    The padding of the vocabulary takes no part in the softmax.
    """

    excluded: Tensor  # (columns,) -inf where the vocabulary is padding, else 0

    def __init__(self, width: int, vocabulary: int, epsilon: float):
        super().__init__()
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=epsilon)
        columns = padded(vocabulary) // self.group.size()
        self.bias = nn.Parameter(torch.zeros(columns))
        mark_split(self.bias, 0)
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

    @contextlib.contextmanager
    def among_first(self, count: int) -> Iterator[None]:
        """A context in which the first `count` pieces of the vocabulary alone take part in the softmax.

        The surprisal of any other piece is large there, but finite, so that a weight of 0 leaves it out.
        """
        before = self.excluded
        pieces = torch.arange(len(before), device=before.device) + len(before) * self.group.rank()
        self.excluded = before.masked_fill(pieces >= count, -1e4)
        try:
            yield
        finally:
            self.excluded = before

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """hidden: (..., width); embedding: this rank's (columns, width) of the word embeddings. Returns (..., columns)."""
        hidden = self.norm(F.gelu(self.dense(hidden)))
        if self.group.size() > 1:
            hidden = copy_to_tensor_model_parallel_region(hidden, self.group)  # sums the ranks' gradients
        elif collects(embedding):
            return Multiplied.apply(hidden, embedding) + (self.bias + self.excluded)
        return F.linear(hidden, embedding, self.bias + self.excluded)


class Encoder(nn.Module):
    """A multilingual masked language model with language-routed modules; this process must have joined a `Group`.

    variant: which module is language-specific: none (`mono`, `joint`, `share_adpt`), `ffn`, `attn` or `adpt`.
    languages: codes, in the order of the indices that batches carry. vocabulary: number of pieces, without padding.
    positions: the longest row, unless `config.positions` says more. Equal seeds give equal weights at any tensor-parallel
    size. Each parameter is drawn by its name, so that parameters which two models share start alike, whatever other modules
    or languages they have.
    """

    twice_differentiable = False  # set by tests of second derivatives: attention without fused kernels, one rank

    def __init__(
        self,
        config: ModelConfig,
        *,
        variant: str,
        languages: Sequence[str],
        vocabulary: int,
        positions: int,
        seed: int = 0,
    ):
        super().__init__()
        tensor = parallel_state.get_tensor_model_parallel_world_size()
        if padded(vocabulary) % tensor:
            raise UserError(f"parallel.tensor={tensor} does not divide a vocabulary padded to {padded(vocabulary)}")
        self.config, self.variant, self.vocabulary = config, variant, vocabulary
        self.router = Router(languages)
        with replayed(seed):  # building draws default weights, which must not move the ambient random state
            embedded = len(self.languages) if config.language_embeddings else 0
            self.embeddings = Embeddings(config, vocabulary, positions, embedded)
            self.block = Block(config, variant, self.router)
            self.head = MaskedHead(config.width, vocabulary, config.epsilon)
        self._initialise(seed)

    @property
    def languages(self) -> tuple[str, ...]:
        return self.router.languages

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Initialises as XLM does: embeddings of std width^-0.5, matrices of std (3 fan-in)^-0.5, biases 0, norms 1.

        Each matrix is drawn from a seed of its own and cut to this rank's slice.
        """
        group = parallel_state.get_tensor_model_parallel_group()
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
                continue
            digest = blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
            source = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            dimension, shape = partition_dim(parameter), list(parameter.shape)
            if dimension is not None:
                shape[dimension] *= group.size()
            fan_in = shape[1] if name.startswith("embeddings.") else 3 * shape[1]
            whole = torch.empty(shape).normal_(0.0, fan_in**-0.5, generator=source)
            parameter.copy_(whole if dimension is None else whole.chunk(group.size(), dimension)[group.rank()])

    def hidden(
        self,
        tokens: Tensor,
        languages: Tensor,
        step_languages: Sequence[int],
        padding: Tensor | None = None,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (rows, length, width) after the last LayerNorm; (rows, read, width) where `read` names columns.

        tokens: (rows, length); languages: (rows,); step_languages: the languages of all ranks' rows, in the order in which
        every rank visits them; padding: (rows, length) bool, True = ignore, or None; segment_ids: (rows, length), tokens
        attend to those of the same number, or None for the whole row; position_ids: (rows, length), or None for columns;
        read: (rows, read) columns, or None for all: the last layer computes no others.
        """
        route, order = self.router.plan(languages, step_languages)
        if order is not None:  # group the rows by language; tokens are cheaper to move than hidden states
            grouped, given_order = (
                index.to(tokens.device, non_blocking=True)
                for index in (torch.tensor(order), torch.tensor(order).argsort())
            )
            tokens, languages = tokens[grouped], languages[order]
            padding, segment_ids, position_ids, read = (
                None if value is None else value[grouped] for value in (padding, segment_ids, position_ids, read)
            )
        with self.router.following(route):
            embedded, turns = self.router.run(embed, self.embeddings, tokens, languages, position_ids)
            mask, read_mask = attention_mask(padding, segment_ids), attention_mask(padding, segment_ids, read)
            hidden: Tensor = self.block(embedded, mask, read, read_mask, turns)
        if order is None:
            return hidden
        return hidden.index_select(0, given_order)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss, sum(weights * nll) (a scalar), and the detached nll (rows, masked), both fp32.

        In training, dropout is that of the batch's seed.
        """
        with replayed(batch.dropout_seed) if self.training else contextlib.nullcontext():
            return self.loss(batch)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss and the nll as `forward` returns them, with dropout from the ambient random state."""
        with sdpa_kernel(SDPBackend.MATH) if self.twice_differentiable else contextlib.nullcontext():
            hidden = self.hidden(
                batch.tokens,
                batch.languages,
                batch.step_languages,
                segment_ids=batch.segment_ids,
                position_ids=batch.position_ids,
                read=batch.positions,
            )
            loss, nll = self.router.run(
                masked_loss, self.head, hidden, self.embeddings.word.weight, batch.labels, batch.weights
            )
        return loss, nll.detach()

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., vocabulary) of hidden states (..., width), gathered over tensor-parallel ranks, fp32."""
        return gathered(self.head(hidden, self.embeddings.word.weight), self.vocabulary)

    def parameter_groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """The parameters by group and full name: `SHARED`, then each language's own where modules are routed."""
        full_names = {id(parameter): name for name, parameter in self.named_parameters()}
        groups: dict[str, dict[str, nn.Parameter]] = {SHARED: {}}
        for module in self.modules():
            if isinstance(module, Routed):
                for code in self.languages:
                    own = {full_names.pop(id(parameter)): parameter for parameter in module.language(code).parameters()}
                    groups.setdefault(code, {}).update(own)
        groups[SHARED] = {name: parameter for name, parameter in self.named_parameters() if id(parameter) in full_names}
        return groups


def attention_mask(padding: Tensor | None, segment_ids: Tensor | None, read: Tensor | None = None) -> Tensor | None:
    """Which tokens (dimension 3) each token (dimension 2) attends to: bool, (rows, 1, 1 or queries, length); None: all.

    padding: (rows, length) bool, True = ignore; segment_ids: (rows, length), tokens attend within their segment; read:
    (rows, queries) columns of the tokens that attend, None for all.
    """
    mask = None
    if segment_ids is not None:
        queries = segment_ids if read is None else segment_ids.gather(1, read)
        mask = (queries[:, :, None] == segment_ids[:, None, :])[:, None]
    if padding is None:
        return mask
    text = ~padding[:, None, None, :]
    return text if mask is None else mask & text


def positions_of(tokens: Tensor, position_ids: Tensor | None) -> Tensor:
    """The position ids given, (rows, length), or the columns of tokens (rows, length), (1, length)."""
    return torch.arange(tokens.shape[1], device=tokens.device)[None] if position_ids is None else position_ids


# -- regions: functions that are compiled as a whole ---------------------------------------------------------------


def embed(
    embeddings: Embeddings, tokens: Tensor, languages: Tensor, position_ids: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The embeddings of a batch, and what turns queries and keys; see `Embeddings`."""
    return embeddings(tokens, languages, position_ids), embeddings.turns(tokens, position_ids)


def masked_loss(
    head: MaskedHead, hidden: Tensor, embedding: Tensor, labels: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """sum(weights * nll) and nll (rows, masked) of hidden states (rows, masked, width), fp32."""
    nll = cross_entropy(head(hidden, embedding), labels)
    return (weights * nll).sum(), nll


def padded(vocabulary: int) -> int:
    """The rows of the word embedding matrix."""
    return -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood in fp32 (or better) of labels (rows, masked), from vocabulary-parallel logits.

    On one rank torch's own, which can be differentiated twice; megatron's is right to the first derivative only.
    """
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        return vocab_parallel_cross_entropy(logits.float(), labels)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)


def gathered(logits: Tensor, vocabulary: int) -> Tensor:
    """Puts all ranks' columns side by side, without the padding: (..., columns) to (..., vocabulary), fp32, no gradient."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() > 1:
        columns = [torch.empty_like(logits) for _ in range(group.size())]
        torch.distributed.all_gather(columns, logits.detach().contiguous(), group=group)
        logits = torch.cat(columns, dim=-1)
    return logits[..., :vocabulary].float()


def partition_dim(parameter: nn.Parameter) -> int | None:
    """The dimension along which tensor-parallel ranks hold slices of a parameter; None: each holds all of it."""
    sharded = getattr(parameter, "tensor_model_parallel", False)  # megatron's mark
    return getattr(parameter, "partition_dim", None) if sharded else None
