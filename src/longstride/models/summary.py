"""How many parameters a model has, and where."""

import dataclasses
from collections import Counter

import torch

from longstride.models.configuration import SparseTransformerConfig
from longstride.models.encoder import SparseTransformerForMaskedLM
from longstride.models.modeling import SparseTransformerForCausalLM
from longstride.models.schedule import layer_patterns


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Parameters by part; ``str()`` is a small table. Tied logit weights count once, as token embedding."""

    token_embedding: int
    position_embedding: int
    attention: int
    feed_forward: int
    norms: int
    logits: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def __str__(self) -> str:
        rows = [*dataclasses.asdict(self).items(), ("total", self.total)]
        return "\n".join(f"{name.replace('_', ' '):<20}{count:>16,}" for name, count in rows)


def parameter_count(config: SparseTransformerConfig) -> ParameterCount:
    """Count a model's parameters by part, without allocating any.

    It is ``SparseTransformerForCausalLM(config)``, or ``SparseTransformerForMaskedLM(config)`` where a pattern looks
    ahead.

    >>> print(parameter_count(SparseTransformerConfig()).total)  # the paper's enwik8 model: 95 M
    94887936
    """
    causal = all(pattern.is_causal for pattern in layer_patterns(config))
    with torch.device("meta"):
        model = (SparseTransformerForCausalLM if causal else SparseTransformerForMaskedLM)(config)
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[_part(name)] += parameter.numel()
    return ParameterCount(**{field.name: counts[field.name] for field in dataclasses.fields(ParameterCount)})


def _part(name: str) -> str:
    for marker, part in (
        ("embed_tokens.", "token_embedding"),
        ("embed_positions.", "position_embedding"),
        ("norm.", "norms"),
        (".attention.", "attention"),
        (".feed_forward.", "feed_forward"),
        ("lm_head.", "logits"),
    ):
        if marker in name:
            return part
    raise AssertionError(f"parameter {name} belongs to no part of the summary")
