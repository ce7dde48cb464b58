"""Encoders on top of the Sparse Transformer's stack: masked tokens filled in, and whole sequences classified.

Their patterns look ahead: ``longformer(512)``, ``bigbird(64)``, ``Local(9, lookahead=8) | Global(1, causal=False)``.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForMaskedLMLoss
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput
from transformers.utils import can_return_tuple

from longstride.errors import UnsupportedError
from longstride.models.causal_loss import chunked_causal_loss
from longstride.models.configuration import SparseTransformerConfig
from longstride.models.modeling import SparseTransformerModel, SparseTransformerPreTrainedModel
from longstride.models.packing import packed_documents
from longstride.models.schedule import check_bidirectional, layer_patterns
from longstride.nn import LogitsProjection


class SparseTransformerEncoder(SparseTransformerPreTrainedModel):
    """What the encoders share: the stack of blocks, whose patterns must look ahead."""

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__(config)
        check_bidirectional(layer_patterns(config))
        self.model = SparseTransformerModel(config)

    def encode(self, *inputs: Any, output_attentions: bool | None = None, **options: Any) -> Any:
        """The stack's output; the arguments are :class:`SparseTransformerModel`'s, but a cache's."""
        return self.model(*inputs, output_attentions=output_attentions, return_dict=True, **options)


class SparseTransformerForMaskedLM(SparseTransformerEncoder):
    """The masked language model: logits of every token from all that its layers reach on either side.

    >>> from longstride.models import SparseTransformerConfig, SparseTransformerForMaskedLM
    >>> config = SparseTransformerConfig(
    ...     hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
    ...     patterns="Local(9, lookahead=8) | Global(1, causal=False)",
    ... )
    >>> model = SparseTransformerForMaskedLM(config)
    >>> model(torch.zeros(1, 64, dtype=torch.long)).logits.shape
    torch.Size([1, 64, 256])

    Source: Devlin 2019 (BERT), section 3.1, task 1.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' declaration)

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__(config)
        self.lm_head = LogitsProjection(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits, and the loss where labels are given; the other arguments are :class:`SparseTransformerModel`'s.

        As in `SparseTransformerForCausalLM`, a call for the loss in training forms the logits by chunks and
        returns none.

        Args:
            labels: int64[batch, length]: the token that stood where input_ids has another; -100 at places that do not
                count, padding among them.
            kwargs: loss arguments, such as the Trainer's ``num_items_in_batch``, by which the summed loss is divided.
        """
        outputs = self.encode(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            cu_seq_lens_q=cu_seq_lens_q,
            max_length_q=max_length_q,
        )
        logits, loss = None, None
        if self.training and labels is not None and self.loss_function is ForMaskedLMLoss:
            # Nothing is shifted: a label is held against the prediction at its own place.
            kwargs["shift_labels"] = labels
            loss = chunked_causal_loss(outputs.last_hidden_state, self.lm_head, labels, **kwargs)
        else:
            logits = self.lm_head(outputs.last_hidden_state)
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class SparseTransformerForSequenceClassification(SparseTransformerEncoder):
    """A whole sequence's classes: one linear map of the mean hidden state of its real tokens.

    ``config.num_labels`` classes, or what ``config.problem_type`` says (regression, several labels at once), as in
    transformers. From a saved :class:`SparseTransformerForMaskedLM` it takes all but the classifier, which starts anew.
    """

    def __init__(self, config: SparseTransformerConfig) -> None:
        super().__init__(config)
        assert config.num_labels is not None
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits float[batch, num_labels]; the other arguments are :class:`SparseTransformerModel`'s.

        Args:
            labels: int64[batch], classes; float[batch, num_labels] for several labels at once or for regression.
            kwargs: arguments of a ``loss_function`` of one's own.

        Raises:
            UnsupportedError: packed documents: a row has one class.
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is not None and attention_mask is None:
            packed = packed_documents(
                position_ids,
                kwargs.pop("cu_seq_lens_q", None),
                kwargs.pop("max_length_q", None),
                batch=inputs.shape[0],
                length=inputs.shape[1],
                longest=self.config.max_position_embeddings,
            )
            if packed is not None:
                raise UnsupportedError(
                    "packed documents in a classifier: a row has one class; give each document a row of its own, "
                    "padded, with an attention_mask"
                )
        outputs = self.encode(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        logits = self.classifier(mean_of_real(outputs.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


def mean_of_real(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The mean of each row's real tokens: float[batch, length, width] to [batch, width]; 0 for a row of padding.

    >>> mean_of_real(torch.tensor([[[1.0], [3.0], [8.0]]]), torch.tensor([[1, 1, 0]]))
    tensor([[2.]])
    """
    if attention_mask is None:
        return hidden.mean(1)
    real = (attention_mask != 0)[..., None].to(hidden.device)
    # float32: a sum over thousands of tokens is too much for bfloat16. Selected: what stands at padding means nothing.
    summed = torch.where(real, hidden, 0).sum(1, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return (summed / real.sum(1).clamp(min=1)).to(hidden.dtype)
