"""Encoders with language-specific modules, for `transformers`. This file needs torch and transformers alone.

    from transformers import AutoModelForMaskedLM, AutoTokenizer
    import mlinterf_ds.export.modeling_mlinterf  # or trust_remote_code=True: exported folders hold a copy of this file

    model, tokenizer = AutoModelForMaskedLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    model(**tokenizer(["Habari ya <mask>", "Good <mask>"], padding=True, return_tensors="pt"), language=["sw", "en"])

Parameters have the names and shapes of `mlinterf_ds.model.encoder.Encoder`, without the padding of its vocabulary.
Hidden states are (rows, length, width) throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {"gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh, "silu": F.silu}
# For each language, its code and the indices (n,) of its rows, None for all rows; empty if the model needs no language.
Route = Sequence[tuple[str, Tensor | None]]


class MLInterfConfig(PreTrainedConfig):
    """Shape and languages. variant: the language-specific module (`ffn`, `attn` or `adpt`); other names mean none."""

    model_type = "mlinterf"
    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 12
    head_dim: int = 64
    intermediate_size: int = 2048
    max_position_embeddings: int = 256
    variant: str = "adpt"
    languages: Sequence[str] = ("en",)
    default_language: str | None = None
    language_embeddings: bool = False
    norm: str = "pre"
    embedding_norm: bool = False
    position_kind: str = "learned"
    position_offset: int = 0
    token_types: int = 0
    adapter_size: int = 128
    adapter_activation: str = "gelu"
    adapter_after: str = "both"
    adapter_on: str = "output"
    adapter_norm: str = "none"
    adapter_skip: str = "sum"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-5
    bos_token_id: int = 0
    pad_token_id: int = 1
    eos_token_id: int = 2


class Routed(nn.Module):
    """One copy of a module for each language; every row goes through the copy of its language."""

    def __init__(self, languages: Sequence[str], build: Callable[[], nn.Module]):
        super().__init__()
        self.copies = nn.ModuleDict({f"language_{code}": build() for code in languages})

    def forward(self, hidden: Tensor, route: Route, *others: Tensor | None) -> Tensor:
        """others: tensors with an entry a row along dimension 0, or None."""
        output = torch.zeros_like(hidden)
        for code, rows in route:
            copy = self.copies[f"language_{code}"]
            if rows is None:
                return copy(hidden, route, *others)
            routed = copy(hidden[rows], route, *(None if other is None else other[rows] for other in others))
            output = output.index_copy(0, rows, routed.to(output.dtype))
        return output


class Attention(nn.Module):
    """Self-attention. One projection holds each head's query, key and value side by side."""

    def __init__(self, config: MLInterfConfig):
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        inner = config.num_attention_heads * config.head_dim
        self.linear_qkv = nn.Linear(config.hidden_size, 3 * inner)
        self.linear_proj = nn.Linear(inner, config.hidden_size)

    def forward(self, hidden: Tensor, _route: Route, mask: Tensor | None, turns: Tensor | None) -> Tensor:
        """mask: (rows, 1, 1, length) bool, True = attend, or None; turns: see `rotary_turns`."""
        joint = self.linear_qkv(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query, key, value = joint.chunk(3, dim=-1)  # each (rows, heads, length, head width)
        if turns is not None:
            query, key = rotated(query, turns), rotated(key, turns)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        return self.linear_proj(mixed.transpose(1, 2).flatten(2))


def rotary_turns(positions: Tensor, head_width: int, dtype: torch.dtype) -> Tensor:
    """The cosines, then the sines by which a head's pairs of channels turn at positions (rows, length): (rows, length, head width).

    Pair k is channel k with channel k + head width / 2; at position p it turns by p * 10000^(-2 k / head width).
    """
    pairs = head_width // 2
    exponents = torch.arange(pairs, device=positions.device, dtype=torch.promote_types(dtype, torch.float32)) / -pairs
    angles = positions[:, :, None] * 10_000.0**exponents
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


def rotated(heads: Tensor, turns: Tensor) -> Tensor:
    """Queries or keys (rows, heads, length, head width), turned by their positions (Su et al., 2021)."""
    cosine, sine = turns[:, None].chunk(2, dim=-1)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, config: MLInterfConfig):
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor, _route: Route) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(hidden)))


class Adapter(nn.Module):
    """Down projection, activation, up projection (Houlsby et al., 2019)."""

    def __init__(self, config: MLInterfConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.adapter_activation]
        self.down = nn.Linear(config.hidden_size, config.adapter_size)
        self.up = nn.Linear(config.adapter_size, config.hidden_size)

    def forward(self, hidden: Tensor, _route: Route) -> Tensor:
        return self.up(self.activation(self.down(hidden)))


class Residual(nn.Module):
    """Dropout, the residual sum and the adapter: on the sublayer's output, or on the sum (X-MOD, MAD-X)."""

    def __init__(self, config: MLInterfConfig, adapted: bool):
        super().__init__()
        self.dropout, self.norm = config.hidden_dropout_prob, config.adapter_norm
        self.on_sum, self.skip = config.adapter_on == "sum", config.adapter_skip
        self.adapter: nn.Module | None = None
        if adapted and config.variant == "share_adpt":
            self.adapter = Adapter(config)
        elif adapted and config.variant == "adpt":
            self.adapter = Routed(config.languages, lambda: Adapter(config))
        if self.adapter is not None and self.norm == "own":
            self.adapter_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, output: Tensor, residual: Tensor, route: Route, layer_norm: nn.Module) -> Tensor:
        output = F.dropout(output, self.dropout, self.training)
        if self.adapter is None:
            return residual + output
        if not self.on_sum:
            return residual + output + self.adapter(output, route)
        hidden = residual + output
        read = hidden
        if self.norm != "none":
            read = self.adapter_norm(hidden) if self.norm == "own" else layer_norm(hidden)
        change = F.dropout(self.adapter(read, route), self.dropout, self.training)
        return (read if self.skip == "normed" else hidden) + change


class Layer(nn.Module):
    """A Transformer layer: LayerNorm before each sublayer (pre-norm) or after each residual sum (post-norm)."""

    def __init__(self, config: MLInterfConfig):
        super().__init__()

        def part(kind: Callable[[MLInterfConfig], nn.Module], own: bool) -> nn.Module:
            return Routed(config.languages, lambda: kind(config)) if own else kind(config)

        first, second = (nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in range(2))
        if config.norm == "pre":
            self.input_layernorm, self.pre_mlp_layernorm = first, second
        else:
            self.post_attention_layernorm, self.post_mlp_layernorm = first, second
        self.self_attention = part(Attention, config.variant == "attn")
        self.self_attn_bda = Residual(config, config.adapter_after == "both")
        self.mlp = part(FeedForward, config.variant == "ffn")
        self.mlp_bda = Residual(config, True)
        self.pre_norm = config.norm == "pre"

    def forward(self, hidden: Tensor, route: Route, mask: Tensor | None, turns: Tensor | None) -> Tensor:
        if self.pre_norm:
            first, second = self.input_layernorm, self.pre_mlp_layernorm
            hidden = self.self_attn_bda(self.self_attention(first(hidden), route, mask, turns), hidden, route, first)
            return self.mlp_bda(self.mlp(second(hidden), route), hidden, route, second)
        first, second = self.post_attention_layernorm, self.post_mlp_layernorm
        hidden = first(self.self_attn_bda(self.self_attention(hidden, route, mask, turns), hidden, route, first))
        return second(self.mlp_bda(self.mlp(hidden, route), hidden, route, second))


class Block(nn.Module):
    """All layers; in a pre-norm model, a LayerNorm after the last."""

    def __init__(self, config: MLInterfConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.final_layernorm: nn.Module | None = None
        if config.norm == "pre":
            self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor, route: Route, mask: Tensor | None, turns: Tensor | None) -> tuple[Tensor, ...]:
        """The input of each layer, and the (normalised) output of the last."""
        states = [hidden]
        for layer in self.layers:
            states.append(layer(states[-1], route, mask, turns))
        return tuple(states) if self.final_layernorm is None else (*states[:-1], self.final_layernorm(states[-1]))


class Embeddings(nn.Module):
    """Word (+ position + token type + language) embeddings, with LayerNorm where the model has one, and with dropout.

    Rotary positions have no table.
    """

    def __init__(self, config: MLInterfConfig):
        super().__init__()
        self.dropout, self.offset = config.hidden_dropout_prob, config.position_offset
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        learned, rows = config.position_kind == "learned", config.max_position_embeddings
        self.position = nn.Embedding(rows, config.hidden_size) if learned else None
        self.token_type = nn.Embedding(config.token_types, config.hidden_size) if config.token_types else None
        embedded = len(config.languages) if config.language_embeddings else 0
        self.language = nn.Embedding(embedded, config.hidden_size) if embedded else None
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.embedding_norm else None

    def forward(self, tokens: Tensor, positions: Tensor, languages: Tensor | None) -> Tensor:
        """tokens and positions (rows, length), languages (rows,) or None."""
        hidden: Tensor = self.word(tokens)
        if self.position is not None:
            hidden = hidden + self.position(positions + self.offset)
        if self.token_type is not None:
            hidden = hidden + self.token_type.weight[0]
        if self.language is not None:
            hidden = hidden + self.language(languages)[:, None]
        if self.norm is not None:
            hidden = self.norm(hidden)
        return F.dropout(hidden, self.dropout, self.training)


class Head(nn.Module):
    """Dense layer, GELU, LayerNorm, and a decoder tied to the word embeddings."""

    def __init__(self, config: MLInterfConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, words: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(hidden))), words, self.bias)


class Encoder(PreTrainedModel):
    """The base of the models below: an encoder, which may have language-specific modules."""

    config_class = MLInterfConfig
    base_model_prefix = "block"
    _supports_sdpa = True

    def __init__(self, config: MLInterfConfig):
        super().__init__(config)
        self.embeddings, self.block = Embeddings(config), Block(config)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Head):
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word

    def set_default_language(self, language: str) -> None:
        """Sets the language of calls without `language=`."""
        self._known(language)
        self.config.default_language = language

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None, language: str | Sequence[str] | None
    ) -> tuple[Tensor, ...]:
        """The input of each layer, and the normalised output of the last: (rows, length, width) each.

        input_ids, attention_mask (1 = attend): (rows, length). language: a code for all rows, or one code for each row. It
        may be left out if the model has one language or no language-specific part, or after `set_default_language`.
        """
        length, longest = input_ids.shape[1], self.config.max_position_embeddings - self.config.position_offset
        if length > longest:
            raise ValueError(
                f"rows of {length} tokens, the model has {longest} positions: tokenize with truncation=True"
            )
        route, languages = self._route(language, input_ids)
        if attention_mask is None:
            mask, positions = None, torch.arange(length, device=input_ids.device)[None]
        else:
            mask = attention_mask.bool()[:, None, None]
            positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)  # padding on the left takes no position
        embedded = self.embeddings(input_ids, positions, languages)
        turns = None
        if self.config.position_kind == "rotary":
            turns = rotary_turns(positions.expand(input_ids.shape), self.config.head_dim, embedded.dtype)
        states: tuple[Tensor, ...] = self.block(embedded, route, mask, turns)
        return states

    def _known(self, language: str) -> int:
        if language not in self.config.languages:
            known = ", ".join(self.config.languages)
            raise ValueError(f"language {language!r}: the model knows {known}; name one of them")
        return self.config.languages.index(language)

    def _route(self, language: str | Sequence[str] | None, tokens: Tensor) -> tuple[Route, Tensor | None]:
        """The rows of each language, and the index of each row's language (rows,)."""
        config, rows = self.config, len(tokens)
        if language is None:
            language = config.default_language or (config.languages[0] if len(config.languages) == 1 else None)
        if language is None:
            if config.variant not in ("adpt", "ffn", "attn") and not config.language_embeddings:
                return (), None
            raise ValueError(f"language= is missing: name one of {', '.join(config.languages)}, or one for each row")
        codes = [language] * rows if isinstance(language, str) else list(language)
        if len(codes) != rows:
            raise ValueError(f"language= has {len(codes)} codes for {rows} rows: give one code, or one for each row")
        numbers = torch.tensor([self._known(code) for code in codes], device=tokens.device)
        present = sorted(set(codes))
        if len(present) == 1:
            return [(present[0], None)], numbers
        return [(code, (numbers == self._known(code)).nonzero()[:, 0]) for code in present], numbers


def mean_nll(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """The mean loss of logits (..., classes) for labels (...), -100 = not counted; None without labels."""
    if labels is None:
        return None
    return F.cross_entropy(logits.float().flatten(0, -2), labels.to(logits.device).flatten())


class MLInterfModel(Encoder):
    """The encoder without a head; it returns hidden states."""

    _keys_to_ignore_on_load_unexpected = [r"^(head|classifier)\."]  # noqa: RUF012 (transformers' name)

    def __init__(self, config: MLInterfConfig):
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        language: str | Sequence[str] | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutput:
        """`last_hidden_state` is (rows, length, width); the arguments are those of `Encoder.encode`."""
        states = self.encode(input_ids, attention_mask, language)
        return BaseModelOutput(last_hidden_state=states[-1], hidden_states=states if output_hidden_states else None)


class MLInterfForMaskedLM(Encoder):
    """The encoder with the head that predicts masked pieces."""

    def __init__(self, config: MLInterfConfig):
        super().__init__(config)
        self.head = Head(config)
        self.post_init()

    def get_output_embeddings(self) -> None:
        """Returns None: the decoder is the word embedding itself."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        language: str | Sequence[str] | None = None,
        output_hidden_states: bool | None = None,
    ) -> MaskedLMOutput:
        """Logits are (rows, length, vocabulary). labels: (rows, length), -100 = not predicted; others as `Encoder.encode`."""
        states = self.encode(input_ids, attention_mask, language)
        logits, hidden = self.head(states[-1], self.embeddings.word.weight), states if output_hidden_states else None
        return MaskedLMOutput(loss=mean_nll(logits, labels), logits=logits, hidden_states=hidden)


class Classifier(Encoder):
    """The base of the fine-tuned models: the encoder with a linear classifier."""

    _keys_to_ignore_on_load_unexpected = [r"^head\."]  # noqa: RUF012 (transformers' name)

    def __init__(self, config: MLInterfConfig):
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def classify(self, hidden: Tensor) -> Tensor:
        """Logits (..., labels) of hidden states (..., width)."""
        logits: Tensor = self.classifier(F.dropout(hidden, self.config.hidden_dropout_prob, self.training))
        return logits


class MLInterfForTokenClassification(Classifier):
    """A label for each piece. A word's is that of its first piece, or of its pieces' mean logits (`finetuned["word"]` in config.json)."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        language: str | Sequence[str] | None = None,
    ) -> TokenClassifierOutput:
        """Logits are (rows, length, labels). labels: (rows, length), -100 = not counted; others as `Encoder.encode`."""
        logits = self.classify(self.encode(input_ids, attention_mask, language)[-1])
        return TokenClassifierOutput(loss=mean_nll(logits, labels), logits=logits)


class MLInterfForSequenceClassification(Classifier):
    """A label for each text or pair of texts, read from its first piece."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        language: str | Sequence[str] | None = None,
    ) -> SequenceClassifierOutput:
        """Logits are (rows, labels). labels: (rows,); others as `Encoder.encode`. Padding stands on the right."""
        logits = self.classify(self.encode(input_ids, attention_mask, language)[-1][:, 0])
        return SequenceClassifierOutput(loss=mean_nll(logits, labels), logits=logits)


class MLInterfForQuestionAnswering(Classifier):
    """Scores of each piece as the first and as the last of an answer."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        language: str | Sequence[str] | None = None,
    ) -> QuestionAnsweringModelOutput:
        """Both logits are (rows, length). start_positions, end_positions: (rows,), columns; others as `Encoder.encode`."""
        start, end = self.classify(self.encode(input_ids, attention_mask, language)[-1]).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (F.cross_entropy(start, start_positions) + F.cross_entropy(end, end_positions)) / 2
        return QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end)


AutoConfig.register(MLInterfConfig.model_type, MLInterfConfig, exist_ok=True)
AutoModel.register(MLInterfConfig, MLInterfModel, exist_ok=True)
AutoModelForMaskedLM.register(MLInterfConfig, MLInterfForMaskedLM, exist_ok=True)
AutoModelForTokenClassification.register(MLInterfConfig, MLInterfForTokenClassification, exist_ok=True)
AutoModelForSequenceClassification.register(MLInterfConfig, MLInterfForSequenceClassification, exist_ok=True)
AutoModelForQuestionAnswering.register(MLInterfConfig, MLInterfForQuestionAnswering, exist_ok=True)
