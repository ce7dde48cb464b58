"""The Sparse Transformer as Hugging Face models: the stack of residual blocks and the language model on top of it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.utils import can_return_tuple

from longstride.errors import ArgumentError, UnsupportedError
from longstride.models.configuration import SparseTransformerConfig
from longstride.models.padding import RowShift, check_positions
from longstride.models.schedule import layer_patterns
from longstride.nn import (
    FactorizedPositions,
    FeedForward,
    LogitsProjection,
    ResidualBlock,
    SelfAttention,
    initialize_,
)


class SparseTransformerBlock(GradientCheckpointingLayer, ResidualBlock):
    """A residual block that the Trainer can checkpoint: its activations are recomputed in the backward pass."""


class SparseTransformerPreTrainedModel(PreTrainedModel):
    """What the models share: their configuration, how weights start, and what transformers may ask of them."""

    config_class = SparseTransformerConfig
    config: SparseTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SparseTransformerBlock"]  # noqa: RUF012 (transformers' declaration)

    def __init__(self, config: SparseTransformerConfig, *inputs: Any, **kwargs: Any) -> None:
        # A configuration can be changed between its construction and the model's.
        config.resolve()
        super().__init__(config, *inputs, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LogitsProjection) and self.config.tie_word_embeddings:
            return  # its weights are the token embeddings, which start as such
        initialize_(module, num_layers=self.config.num_hidden_layers, scale=self.config.initializer_scale)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if attn_implementation not in (None, "eager"):
            raise ArgumentError(
                f"attn_implementation={attn_implementation!r}: this model attends along config.patterns, whatever "
                "computes them; leave it out and name a backend by config.attention_backend"
            )
        return super()._check_and_adjust_attn_implementation("eager", *args, **kwargs)


class SparseTransformerModel(SparseTransformerPreTrainedModel):
    """Token and position embeddings, N residual blocks, a last layer norm: token ids to hidden states.

    Source: Child et al. 2019, section 5.
    """

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__(config)
        assert config.intermediate_size is not None
        assert config.position_axes is not None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = FactorizedPositions(config.position_axes, config.hidden_size)
        self.layers = nn.ModuleList(
            SparseTransformerBlock(
                SelfAttention(
                    pattern,
                    hidden_size=config.hidden_size,
                    num_heads=config.num_attention_heads,
                    qk_hidden_size=config.qk_hidden_size,
                    backend=config.attention_backend,
                ),
                FeedForward(config.hidden_size, config.intermediate_size),
                hidden_size=config.hidden_size,
                dropout=config.dropout,
                norm_eps=config.layer_norm_eps,
            )
            for pattern in layer_patterns(config)
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Hidden states of every token.

        Args:
            input_ids: int64[batch, length].
            attention_mask: [batch, length], nonzero where the token is real. Padding may stand on the left, on the
                right or on both sides of a row's content; every row comes out as if it stood alone. What comes out
                at padding means nothing.
            position_ids: int64[batch or 1, length]; accepted where it says what is the case anyway: positions count
                from each row's first real token.
            inputs_embeds: float[batch, length, hidden_size], instead of input_ids; positions are added to it.
            past_key_values: refused; there is no key/value cache.
            output_hidden_states: also return the embeddings and every block's output, the last one after the norm.

        Raises:
            ArgumentError: not exactly one of input_ids and inputs_embeds; a sequence longer than
                config.max_position_embeddings; a mask with padding inside the content; other positions.
            UnsupportedError: a cache or attention weights are asked for.
        """
        if past_key_values is not None:
            raise UnsupportedError("this model has no key/value cache: leave past_key_values out, with use_cache=False")
        if kwargs.get("output_attentions"):
            raise UnsupportedError(
                "sparse attention never forms its weights, so output_attentions=True has nothing to return: leave it "
                "out, and see pattern.mask(length) for what attends to what"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ArgumentError(
                "give exactly one of input_ids [batch, length] and inputs_embeds [batch, length, width]"
            )
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        assert inputs is not None
        batch, length = inputs.shape[:2]
        if length > self.config.max_position_embeddings:
            raise ArgumentError(
                f"the sequence has {length} tokens and max_position_embeddings={self.config.max_position_embeddings}: "
                "shorten it, or train a model with a longer context"
            )
        shift = None
        if attention_mask is not None:
            shift = RowShift(attention_mask, batch, length)
            inputs = shift.roll(inputs)
        if position_ids is not None:
            check_positions(position_ids, batch, length, shift)
        hidden = self.embed_tokens(inputs) if inputs_embeds is None else inputs
        hidden = hidden + self.embed_positions(torch.arange(length, device=hidden.device))

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = []
        for layer in self.layers:
            if output_hidden_states:
                states.append(hidden)
            hidden = layer(hidden)
        states.append(self.norm(hidden))

        if shift is not None:
            states = [shift.unroll(state) for state in states]
        return BaseModelOutput(
            last_hidden_state=states[-1], hidden_states=tuple(states) if output_hidden_states else None
        )


class SparseTransformerForCausalLM(SparseTransformerPreTrainedModel, GenerationMixin):
    """The language model: logits of the next token at every position.

    >>> from longstride.models import SparseTransformerConfig, SparseTransformerForCausalLM
    >>> config = SparseTransformerConfig(
    ...     hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
    ...     patterns=["Local(8)", "Strided(8)"],
    ... )
    >>> model = SparseTransformerForCausalLM(config)
    >>> model(torch.zeros(1, 64, dtype=torch.long)).logits.shape
    torch.Size([1, 64, 256])

    Source: Child et al. 2019, section 5.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' declaration)

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__(config)
        self.model = SparseTransformerModel(config)
        self.lm_head = LogitsProjection(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits, and the loss where labels are given; the other arguments are :class:`SparseTransformerModel`'s.

        Args:
            labels: int64[batch, length], usually the input_ids themselves: they are shifted inside, so that the
                logits at position t are held against labels[:, t + 1]. Places with -100 do not count.
            logits_to_keep: compute the logits of that many last positions alone, or of the positions in an int64
                tensor; 0 means all.
            kwargs: loss arguments, such as the Trainer's ``num_items_in_batch``, by which the summed loss is divided.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            output_hidden_states=output_hidden_states,
            output_attentions=kwargs.pop("output_attentions", None),
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,  # noqa: ARG002 (what a cache has not seen: here, nothing is seen)
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,  # noqa: ARG002 (every step is like the first)
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The whole sequence so far, for every new token: without a cache, each step starts from the beginning."""
        if past_key_values is not None:
            raise UnsupportedError(
                "this model has no key/value cache: call generate() without past_key_values, with use_cache=False"
            )
        inputs: dict[str, Tensor | None] = {"input_ids": input_ids}
        if inputs_embeds is not None:
            # The prompt came as embeddings; input_ids ends with the tokens generated since. generate() counts them all
            # in position_ids, and leaves attention_mask out where nothing is padded.
            generated = kwargs["position_ids"].shape[-1] - inputs_embeds.shape[1]
            new_ids = input_ids[:, input_ids.shape[1] - generated :]
            embeds = torch.cat([inputs_embeds, self.model.embed_tokens(new_ids).to(inputs_embeds.dtype)], dim=1)
            inputs = {"input_ids": None, "inputs_embeds": embeds}
        passed = ("position_ids", "logits_to_keep", "output_hidden_states", "output_attentions")
        return {**inputs, "attention_mask": attention_mask, **{name: kwargs[name] for name in passed if name in kwargs}}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False
