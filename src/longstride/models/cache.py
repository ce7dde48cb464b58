"""`PatternCache` as Hugging Face's `generate` knows caches: what it asks of a `Cache`, and what it asks of a layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from longstride.cache import PatternCache, cache_bytes
from longstride.errors import ArgumentError, UnsupportedError
from longstride.models.configuration import SparseTransformerConfig
from longstride.models.schedule import layer_patterns
from longstride.patterns import Pattern


def assisted_headroom(generation_config: GenerationConfig) -> int:
    """How many guessed tokens assisted generation can take back: assistants guess 20 at a time, or a few more, and a
    prompt lookup as many as it is told.
    """
    return max(128, generation_config.prompt_lookup_num_tokens or 0)


class GenerationCache(Cache):
    """A `PatternCache` that ``generate()`` can make, ask, reorder and crop; which model feeds it is its subclasses'.

    Memory is taken when the first tokens come, since the batch, the dtype and the device are known then.

    Args:
        patterns: one a layer.
        capacity: the most tokens a row, padding not counted.
        headroom: up to headroom + 1 of the latest tokens can always be taken back by `crop`.
        layers: what transformers sees of the layers, made with this cache.

    Raises:
        ArgumentError: headroom is out of range.
    """

    def __init__(
        self, patterns: Sequence[Pattern], capacity: int, headroom: int, layers: "Sequence[GenerationCacheLayer]"
    ) -> None:
        if not isinstance(headroom, int) or headroom < 0:
            raise ArgumentError(f"headroom={headroom!r}: it must be a whole number of at least 0")
        self.patterns = tuple(patterns)
        self.capacity = capacity
        self.headroom = headroom
        #: The arguments of `PatternCache` that say how large heads are.
        self.sizes: dict[str, int] = {"headroom": headroom}
        #: Tokens that every row was given, padding included.
        self.seen = 0
        self.rows: PatternCache | None = None
        super().__init__(layers=list(layers))

    @property
    def nbytes(self) -> int:
        """Bytes of the memory that it holds now."""
        return 0 if self.rows is None else self.rows.nbytes

    def rows_for(self, batch: int, dtype: torch.dtype, device: torch.device) -> PatternCache:
        """The memory itself, taken at the first call.

        Raises:
            ArgumentError: it was taken for another batch.
        """
        if self.rows is None:
            self.rows = PatternCache(
                self.patterns, capacity=self.capacity, batch=batch, dtype=dtype, device=device, **self.sizes
            )
        if self.rows.batch != batch:
            raise ArgumentError(f"a batch of {batch} rows: this cache holds {self.rows.batch}; make one for each batch")
        return self.rows

    def advance(self, tokens: int) -> None:
        """Count the tokens that every layer was given."""
        assert self.rows is not None
        self.rows.advance()
        self.seen += tokens

    def passed(self, tokens: int) -> None:
        """Note tokens that every layer was given on the device alone, as `PatternCache.passed`."""
        assert self.rows is not None
        self.rows.passed(tokens)
        self.seen += tokens

    # ---- what `generate` asks -------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - all layers have seen the same
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:  # noqa: ARG002
        return self.capacity

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        return self.capacity

    def reset(self) -> None:
        self.seen = 0
        if self.rows is not None:
            self.rows.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back tokens from the end of every row: minus their number, as transformers does.

        Raises:
            ArgumentError: a number above 0, more tokens than there are, or keys that would be read again are evicted.
        """
        if tokens_to_remove > 0:
            raise ArgumentError(
                f"crop({tokens_to_remove}): give minus the number of tokens to take back, as in "
                f"crop(-{tokens_to_remove})"
            )
        if self.rows is not None and tokens_to_remove:
            self.rows.crop(-tokens_to_remove)
            self.seen += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.rows is not None:
            self.rows.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.rows is not None:
            self.rows.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.rows is not None:
            self.rows.repeat(repeats)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.seen} of {self.capacity} tokens seen, {self.rows}>"


class SparseTransformerCache(GenerationCache):
    """The keys and values that a Sparse Transformer may still read; ``generate()`` makes one by itself.

    Args:
        config: the model's.
        capacity: the most tokens a row, padding not counted; config.max_position_embeddings unless given.
        headroom: up to headroom + 1 of the latest tokens can always be taken back by `crop`.

    Raises:
        ArgumentError: capacity or headroom is out of range.
    """

    def __init__(self, config: SparseTransformerConfig, capacity: int | None = None, headroom: int = 0) -> None:
        longest = config.max_position_embeddings
        capacity = longest if capacity is None else capacity
        if not isinstance(capacity, int) or not 1 <= capacity <= longest:
            raise ArgumentError(
                f"capacity={capacity!r}: it must be a whole number from 1 to max_position_embeddings={longest}"
            )
        patterns = layer_patterns(config)
        super().__init__(patterns, capacity, headroom, [SparseTransformerCacheLayer(self) for _ in patterns])
        assert config.qk_hidden_size is not None
        heads = config.num_attention_heads
        self.sizes |= {
            "num_heads": heads,
            "head_dim": config.qk_hidden_size // heads,
            "v_head_dim": config.hidden_size // heads,
        }

    def bytes_for(self, batch: int, dtype: torch.dtype) -> int:
        """The bytes that it takes for so many rows, exactly, whether it has them already or not."""
        return cache_bytes(self.patterns, self.capacity, batch=batch, dtype=dtype, **self.sizes)


class GenerationCacheLayer(CacheLayerMixin):
    """One layer, as far as transformers looks at layers; what it holds is in the cache's `rows`."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: GenerationCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the cache takes its memory by `GenerationCache.rows_for`."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.seen

    def get_max_length(self) -> int:
        return self.cache.capacity


class SparseTransformerCacheLayer(GenerationCacheLayer):
    """A layer that only a Sparse Transformer can feed."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # noqa: ARG002
        raise _not_for_others()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        raise _not_for_others()


def _not_for_others() -> UnsupportedError:
    return UnsupportedError(
        "a SparseTransformerCache gives no dense keys and values: it is for a SparseTransformerForCausalLM, whose "
        "layers read it with longstride.attention_cached"
    )
