"""The Sparse Transformer as Hugging Face models: the stack of residual blocks and the language model on top of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from longstride.cache import PatternCache
from longstride.errors import ArgumentError, UnsupportedError
from longstride.models.blocks import build_blocks, last_norm
from longstride.models.cache import SparseTransformerCache, assisted_headroom
from longstride.models.causal_loss import chunked_causal_loss
from longstride.models.configuration import SparseTransformerConfig
from longstride.models.memory import SegmentMemory
from longstride.models.packing import document_positions, packed_documents
from longstride.models.padding import ChunkShift, RowShift, check_positions
from longstride.models.schedule import check_causal, layer_patterns
from longstride.nn import (
    Documents,
    FactorizedPositions,
    LogitsProjection,
    RotaryPositions,
    chunk_loss,
    initialize_,
)


class SparseTransformerPreTrainedModel(PreTrainedModel):
    """What the models share: their configuration, how weights start, and what transformers may ask of them."""

    config_class = SparseTransformerConfig
    config: SparseTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SparseTransformerBlock", "ModernTransformerBlock"]  # noqa: RUF012 (transformers' declaration)

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


def run_block(layer: nn.Module, hidden: Tensor, for_attention: dict[str, Any]) -> Any:
    """One residual block: what `longstride.models.compiled_blocks` compiles.

    Returns:
        The block's output; with ``earlier`` segments a pair of it and the keys and values that the next ones read.
    """
    return layer(hidden, **for_attention)


def run_norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    """The last norm: `longstride.models.compiled_blocks` compiles it, too."""
    return norm(hidden)


class SparseTransformerModel(SparseTransformerPreTrainedModel):
    """Token and position embeddings, N residual blocks, a last norm: token ids to hidden states.

    With ``config.block == "modern"`` positions are not added to the tokens: they turn every block's queries and keys.
    Patterns that look ahead make it an encoder, which has no cache.

    Source: Child et al. 2019, section 5.
    """

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.block == "modern":
            assert config.qk_hidden_size is not None
            self.rotary_positions = RotaryPositions(
                config.qk_hidden_size // config.num_attention_heads, config.rotary_base
            )
        else:
            assert config.position_axes is not None
            self.embed_positions = FactorizedPositions(config.position_axes, config.hidden_size)
        self.layers = build_blocks(config)
        self.patterns = layer_patterns(config)
        self.looks_ahead = not all(pattern.is_causal for pattern in self.patterns)
        self.run_block: Callable[..., Tensor] = run_block
        self.run_norm: Callable[..., Tensor] = run_norm
        self.norm = last_norm(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: SparseTransformerCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        memory: SegmentMemory | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of every token.

        Args:
            input_ids: int64[batch, length].
            attention_mask: [batch, length], nonzero where the token is real. Padding may stand on the left, on the
                right or on both sides of a row's content; every row comes out as if it stood alone. What comes out
                at padding means nothing. With a cache it is [batch, tokens seen + length], of the earlier tokens too.
            position_ids: int64[batch or 1, length]; positions count from each row's first real token, which need not be
                said. Where they begin at 0 again, another document begins, which sees none of those before it.
            inputs_embeds: float[batch, length, hidden_size], instead of input_ids; positions are added to it.
            past_key_values: keys and values of earlier tokens, which the given ones follow; these are added to it.
            use_cache: True makes a cache for config.max_position_embeddings tokens where none is given.
            output_hidden_states: also return the embeddings and every block's output, the last one after the norm.
            memory: what is kept of earlier segments of the same rows, which the given tokens follow; it takes these.
                Gradients end at it.
            cu_seq_lens_q: int32 or int64[documents + 1], offsets in the batch's tokens, row after row: where documents
                begin, said without position_ids.
            max_length_q: the tokens of the longest document, or more; with it nothing is read back from the device.

        Raises:
            ArgumentError: not exactly one of input_ids and inputs_embeds; a sequence longer than
                config.max_position_embeddings; a mask with padding inside the content; other positions; another kind
                of cache, or one without room; another model's memory; two of a cache, a memory and packed documents,
                or a mask with either of the last two.
            UnsupportedError: attention weights are asked for, or gradients with a cache.
        """
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
        cache = self._cache(past_key_values, use_cache)
        # With a mask or a cache position_ids say 0 of padding, too.
        said = position_ids if attention_mask is None and cache is None else None
        documents = packed_documents(
            said,
            cu_seq_lens_q,
            max_length_q,
            batch=batch,
            length=length,
            longest=self.config.max_position_embeddings,
        )
        _check_one_of(cache, memory, documents, attention_mask, position_ids)
        if memory is not None:
            memory.open(batch, self.patterns)
        seen = 0 if cache is None else cache.seen
        if documents is None:
            self._check_length(length, seen, memory)
        rows: PatternCache | None = None
        shift, counts = None, None
        if cache is not None:
            rows = cache.rows_for(batch, self.embed_tokens.weight.dtype, inputs.device)
            if attention_mask is not None:
                chunk = ChunkShift(attention_mask, rows.lengths, seen, length)
                shift, counts = chunk.shift, chunk.counts
        elif attention_mask is not None:
            shift = RowShift(attention_mask, batch, length)
        if shift is not None:
            inputs = shift.roll(inputs)
        if position_ids is not None and documents is None:
            check_positions(position_ids, batch, length, shift, None if rows is None else rows.lengths)
        hidden = self.embed_tokens(inputs) if inputs_embeds is None else inputs
        positions = torch.arange(length, device=hidden.device)
        if rows is not None:
            # What stands behind a row's real tokens has no position; any will do.
            positions = (rows.lengths[:, None] + positions).clamp(max=self.config.max_position_embeddings - 1)
        for_attention: dict[str, Any] = {}
        if memory is not None:
            positions = memory.positions(length, hidden.device)
        if documents is not None:
            for_attention["documents"] = documents
            positions = document_positions(documents.cu_seqlens, batch * length).view(batch, length)
        elif self.looks_ahead and shift is not None:
            for_attention["counts"] = shift.counts()
        if self.config.block == "modern":
            for_attention["rotation"] = self.rotary_positions(positions)
        elif rows is None and memory is None and documents is None:
            hidden = hidden + self.embed_positions.first(length)
        else:
            hidden = hidden + self.embed_positions(positions)

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = []
        run = self.run_block if self.training and rows is None else run_block
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                states.append(hidden)
            if rows is not None:
                for_attention |= {"cache": rows, "layer": index, "counts": counts}
            if memory is None:
                hidden = run(layer, hidden, for_attention)
            else:
                hidden, own = run(layer, hidden, for_attention | {"earlier": memory.earlier(index)})
                memory.carry(index, own)
        states.append((self.run_norm if self.training and rows is None else run_norm)(self.norm, hidden))
        if memory is not None:
            memory.advance(length)
        if cache is not None:
            cache.advance(length)

        if shift is not None:
            states = [shift.unroll(state) for state in states]
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            past_key_values=cache,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _check_length(self, length: int, seen: int, memory: SegmentMemory | None) -> None:
        longest, most = seen + length, self.config.max_position_embeddings
        if memory is not None:
            if self.config.block == "modern":
                return  # its positions are distances, and its memory is bounded
            longest = max(memory.seen) + length
        if longest <= most:
            return
        if memory is not None:
            raise ArgumentError(
                f"the text has {longest} tokens with this segment and max_position_embeddings={most}: learned position "
                "embeddings end there; block='modern' has positions that do not"
            )
        raise ArgumentError(
            f"the sequence has {longest} tokens and max_position_embeddings={most}: shorten it, or train a model with "
            "a longer context"
        )

    def _cache(self, given: Any, use_cache: bool | None) -> SparseTransformerCache | None:
        if given is None:
            return SparseTransformerCache(self.config) if use_cache else None
        if not isinstance(given, SparseTransformerCache):
            raise ArgumentError(
                f"past_key_values is {type(given).__name__}: this model's cache is a SparseTransformerCache, which "
                "generate() makes by itself; leave it out"
            )
        if len(given.patterns) != len(self.layers):
            raise ArgumentError(
                f"past_key_values was made for {len(given.patterns)} layers and this model has {len(self.layers)}: "
                "make a SparseTransformerCache of its config"
            )
        return given


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
        check_causal(layer_patterns(config))
        self.model = SparseTransformerModel(config)
        self.lm_head = LogitsProjection(config.hidden_size, config.vocab_size, bias=False)
        self.chunk_loss: Callable[..., Tensor] = chunk_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: SparseTransformerCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        memory: SegmentMemory | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where labels are given; the other arguments are :class:`SparseTransformerModel`'s.

        A call for the loss in training (``model.train()``, labels, all positions) forms the logits a chunk of tokens at
        a time, twice, and keeps none of them: its ``logits`` are None, and the loss costs no memory that grows with
        length x vocab_size. ``model.eval()`` has both, and so has a ``loss_function`` of one's own.

        Args:
            labels: int64[batch, length], usually the input_ids themselves: they are shifted inside, so that the
                logits at position t are held against labels[:, t + 1]. Places with -100 do not count, nor does the
                first token of a packed document, which no token of its own stands before.
            logits_to_keep: compute the logits of that many last positions alone, or of the positions in an int64
                tensor; 0 means all.
            kwargs: loss arguments, such as the Trainer's ``num_items_in_batch``, by which the summed loss is divided,
                and ``shift_labels``, int64[batch, length], which are shifted already and taken as they are.
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is not None and attention_mask is None and past_key_values is None and not use_cache:
            batch, length = inputs.shape[:2]
            documents = packed_documents(
                position_ids,
                cu_seq_lens_q,
                max_length_q,
                batch=batch,
                length=length,
                longest=self.config.max_position_embeddings,
            )
            if documents is not None:
                position_ids, (cu_seq_lens_q, max_length_q) = None, documents
                if labels is not None:
                    begins = document_positions(cu_seq_lens_q, batch * length).view(batch, length) == 0
                    labels = labels.masked_fill(begins, -100)
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            memory=memory,
            cu_seq_lens_q=cu_seq_lens_q,
            max_length_q=max_length_q,
            output_hidden_states=output_hidden_states,
            output_attentions=kwargs.pop("output_attentions", None),
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = None, None
        every = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if self.training and labels is not None and every and self.loss_function is ForCausalLMLoss:
            loss = chunked_causal_loss(
                outputs.last_hidden_state, self.lm_head, labels, chunk_loss=self.chunk_loss, **kwargs
            )
        else:
            logits = self.lm_head(outputs.last_hidden_state[:, kept])
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """The cache of a call of ``generate()``, for as many tokens as it may come to."""
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            # Its annotation of self asks for more than a model with generate() has.
            prepare: Any = super()._prepare_cache_for_generation
            return prepare(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        if generation_config.cache_implementation is not None:
            raise UnsupportedError(
                f"cache_implementation={generation_config.cache_implementation!r}: this model has a cache of its own, "
                "which keeps what its patterns may still read; leave it out"
            )
        longest, headroom = self.config.max_position_embeddings, 0
        if generation_config.is_assistant:  # its cache outlives the call, and grows with the text
            max_cache_length, headroom = longest, assisted_headroom(generation_config)
        elif generation_mode == GenerationMode.ASSISTED_GENERATION:  # guesses may go past the end
            headroom = assisted_headroom(generation_config)
            max_cache_length += headroom
        capacity = max(1, min(max_cache_length, longest))
        model_kwargs["past_key_values"] = SparseTransformerCache(self.config, capacity, headroom)


def _check_one_of(
    cache: SparseTransformerCache | None,
    memory: SegmentMemory | None,
    documents: Documents | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> None:
    """What a sequence follows, or lies beside, is one thing."""
    if memory is not None and not isinstance(memory, SegmentMemory):
        raise ArgumentError(f"memory is {type(memory).__name__}: give a SegmentMemory of this model's config")
    given = {"past_key_values": cache, "memory": memory, "packed documents": documents}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ArgumentError(f"{' and '.join(names)} together: a call takes one of them; leave the others out")
    if attention_mask is not None and (memory is not None or documents is not None):
        raise ArgumentError(
            f"attention_mask with {names[0]}: all tokens are real there; leave it out; pad a text's last segment on "
            "the right, with the label -100"
        )
    if position_ids is not None and memory is not None:
        raise ArgumentError("position_ids with memory: a memory knows where its rows stand; leave them out")
