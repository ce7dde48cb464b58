"""`PatternCache` for sparsified models: what `generate` holds and reads is what the patterns allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from longstride.attention_cached import attention_cached
from longstride.dispatch.checks import autocast, autocast_on
from longstride.errors import ArgumentError, UnsupportedError
from longstride.integrations.transformers.placement import Facts
from longstride.integrations.transformers.saved import layer_text, pattern_of
from longstride.models.cache import GenerationCache, GenerationCacheLayer
from longstride.models.padding import ChunkShift
from longstride.patterns import Pattern


class SparsifiedCache(GenerationCache):
    """Keys and values of a sparsified decoder, as far as its patterns still read them.

    ``model.generate(ids)`` makes one by itself, as large as the call may need. Make one to keep it over several calls,
    ``model.generate(ids, past_key_values=SparsifiedCache(model.config, capacity=4096))``, or for a loop of your own.
    All memory is taken with the first tokens.

    Args:
        config: the configuration of a sparsified model.
        capacity: the most tokens a row, padding not counted; config.max_position_embeddings unless given.
        headroom: up to headroom + 1 of the latest tokens can always be taken back by `crop`, as assisted generation
            does.

    Raises:
        ArgumentError: not a configuration, or one without patterns; capacity or headroom is out of range.
        UnsupportedError: a model with layers of another kind than attention.
    """

    def __init__(self, config: PreTrainedConfig, capacity: int | None = None, headroom: int = 0) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise ArgumentError(f"config is {type(config).__name__}: give the model's configuration, model.config")
        config = config.get_text_config(decoder=True)
        capacity = getattr(config, "max_position_embeddings", None) if capacity is None else capacity
        if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1:
            raise ArgumentError(f"capacity={capacity!r}: give the most tokens of a row, a whole number of at least 1")
        others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if others:
            raise UnsupportedError(
                f"this model has layers that keep something else than keys and values ({', '.join(sorted(others))}): "
                "use the cache that transformers makes for it"
            )
        patterns = [pattern_of(layer_text(config, layer)) for layer in range(config.num_hidden_layers)]
        super().__init__(patterns, capacity, headroom, [_Layer(self, layer) for layer in range(len(patterns))])
        self.sizes["num_heads"] = config.num_attention_heads
        self._fed = 0
        self._chunk: ChunkShift | None = None

    def attend(
        self,
        q: Tensor,
        held: HeldKeys,
        v: Tensor,
        pattern: Pattern,
        facts: Facts,
        scale: float | None,
        backend: str | None,
    ) -> Tensor:
        """Attention of a layer's new tokens to themselves and to what is kept; the last layer ends the step.

        Args:
            q, v: [batch, heads or kv_heads, q_len, ...] of the new tokens.
            held: their keys, as the layer's `update` marked them.
            pattern, scale, backend: as in `attention_cached`.
            facts: which tokens are real.

        Returns:
            [batch, heads, q_len, v_head_dim].
        """
        k, layer = held.plain(), held.layer
        if self.rows is None:
            self.sizes |= {"num_kv_heads": k.shape[1], "head_dim": k.shape[3], "v_head_dim": v.shape[3]}
        # Rotary positions may come back in float32 where autocast has the values in fewer bits.
        rows = self.rows_for(len(k), autocast(k)[0].dtype if autocast_on(k) else k.dtype, k.device)
        if self._fed == 0:
            self._chunk = None
            if facts.real is not None:
                self._chunk = ChunkShift(facts.real, rows.lengths, self.seen, facts.q_len)
        shift, counts = (None, None) if self._chunk is None else (self._chunk.shift, self._chunk.counts)
        if shift is not None:
            q, k, v = (_along_length(shift.roll, x) for x in (q, k, v))
        out = attention_cached(q, k, v, pattern, rows, layer=layer, counts=counts, scale=scale, backend=backend)
        if shift is not None:
            out = _along_length(shift.unroll, out)
        self._fed += 1
        if self._fed == len(self.layers):
            self._fed = 0
            self.advance(facts.q_len)
        return out

    def reset(self) -> None:
        self._fed = 0
        super().reset()


def _along_length(move: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`move` of [batch, length, ...] for [batch, heads, length, ...]."""
    return move(x.transpose(1, 2)).transpose(1, 2)


class _Layer(GenerationCacheLayer):
    """A layer that hands the new tokens through to the attention function, with the cache that they belong to."""

    def __init__(self, cache: SparsifiedCache, layer: int) -> None:
        super().__init__(cache)
        self.layer = layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return HeldKeys.of(key_states, self.cache, self.layer), value_states


class HeldKeys(Tensor):
    """The keys of new tokens, on their way from a cache's `update` to this package's attention, and to no other.

    Any other operation on them fails: another attention would take them for all the keys that there are.
    """

    cache: SparsifiedCache
    layer: int

    @classmethod
    def of(cls, keys: Tensor, cache: Any, layer: int) -> HeldKeys:
        held = keys.as_subclass(cls)
        held.cache, held.layer = cache, layer
        return held

    def plain(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "__get__":  # shape, dtype, device
            return super().__torch_function__(func, types, args, kwargs or {})
        raise UnsupportedError(
            "a SparsifiedCache gives no dense keys and values: its model must attend along patterns "
            "(longstride.sparsify), hand its keys from the cache to its attention as they are, and not be compiled; "
            "call generate() of another with cache_implementation='dynamic'"
        )
