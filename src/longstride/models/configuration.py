"""The configuration of a Sparse Transformer: everything that its mathematics needs, saved with the weights."""

import math
from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig

from longstride.errors import ArgumentError
from longstride.models.memory import check_memory
from longstride.models.schedule import pattern_stride, read_patterns, tables_to_json
from longstride.nn import default_axes, global_tokens
from longstride.patterns import Pattern

BLOCKS = ("sparse_transformer", "modern")
GLOBAL_PROJECTIONS = ("shared", "separate")


class SparseTransformerConfig(PreTrainedConfig):
    """What a Sparse Transformer is built from. The defaults are the paper's enwik8 model in size.

    The attention patterns are part of the configuration, as text, so a saved model comes back with them from a plain
    ``from_pretrained``; ``attn_implementation`` does not change them.

    Args:
        vocab_size: number of tokens; 256 for bytes.
        hidden_size: model width d.
        num_hidden_layers: number of residual blocks N.
        num_attention_heads: heads; must divide hidden_size and qk_hidden_size.
        max_position_embeddings: longest sequence that is given at once, in tokens.
        patterns: pattern texts (or patterns), cycled over the layers; one text stands for a list of one.
            ``["Local(128)", "Strided(128)"]`` alternates, ``"Local(128) | Strided(128)"`` merges,
            ``"per_head(Local(128), Strided(128))"`` splits the heads. All must be causal in a language model
            (:class:`SparseTransformerForCausalLM`), and all must look ahead in an encoder
            (:class:`SparseTransformerForMaskedLM`, :class:`SparseTransformerForSequenceClassification`).
        pattern_tables: the tables that BlockSparse patterns name, bool[(heads,) query blocks, key blocks], as tensors,
            nested lists or row texts; kept as row texts, ``{"table_0123456789ab": ["10", "11"]}``, named by their
            content. Patterns that are given as values bring theirs along.
        block: ``"sparse_transformer"``, the paper's residual block with learned position embeddings, or ``"modern"``:
            RMSNorm, SwiGLU, normalised queries and keys, rotary positions (`longstride.nn.ModernBlock`).
        intermediate_size: width of the feed-forward network; unless given, 4 * hidden_size, and in the modern block,
            whose network has three maps, 8/3 * hidden_size rounded up to a multiple of 8.
        qk_hidden_size: width of queries and keys, all heads together; hidden_size unless given.
        position_axes: sizes of the position embeddings' axes, slowest first, for example (32, 32, 3) for the rows,
            columns and channels of an image; their product is at least max_position_embeddings. Unless given,
            (ceil(max_position_embeddings / stride), stride) with the patterns' first stride (or block). None in the
            modern block, which has no position embeddings.
        global_projections: ``"shared"``: global tokens have the projections of all others; ``"separate"``, in encoders:
            they read the sequence by queries, keys and values of their own, as Longformer's do
            (`longstride.nn.GlobalProjections`), and every pattern must name some.
        memory: tokens of earlier segments that a layer may read, for a model that is trained and evaluated by segments
            (`SegmentMemory`); 0 for none. It needs the modern block: a learned position embedding says which place of
            a segment a token has, and the keys of earlier segments would say the same of other tokens.
        rotary_base: the modern block's longest wavelength is about 2 pi rotary_base tokens.
        dropout: probability of dropping an element of a branch where it is added to the residual stream.
        layer_norm_eps: added to the variance in the layer norms, to the mean square in RMSNorm.
        initializer_scale: weights start with standard deviation initializer_scale / sqrt(fan-in).
        attention_backend: backend of :func:`longstride.attention` by name; None takes the fastest that supports the
            request. Saved like the rest: give ``attention_backend=None`` to ``from_pretrained`` where a named backend
            is not available.
        tie_word_embeddings: use the token embeddings as logit weights. Off in the paper, whose logit weights
            start at zero.
        use_cache: always True, whatever was given, because the Trainer writes False into the configurations of the
            models that it trains: ``generate()`` keeps a cache unless it is called with ``use_cache=False``.
        bos_token_id, eos_token_id, pad_token_id: as everywhere in transformers; None unless given.

    Raises:
        ArgumentError: a value is out of range or does not fit another.
        UnsupportedError: a memory with patterns that do not repeat.
        PatternError: a pattern text is not legal, does not split over the heads, does not serve every length up to
            max_position_embeddings, or names no global tokens although they have projections of their own.

    Source: Child, Gray, Radford, Sutskever 2019, sections 5 and 6.
    """

    model_type = "sparse_transformer"

    vocab_size: int = 256
    hidden_size: int = 512
    num_hidden_layers: int = 30
    num_attention_heads: int = 8
    max_position_embeddings: int = 12288
    patterns: list[str] | str = field(default_factory=lambda: ["Local(128)", "Strided(128)"])
    pattern_tables: dict[str, list] | None = None
    block: str = "sparse_transformer"
    intermediate_size: int | None = None
    qk_hidden_size: int | None = None
    position_axes: list[int] | None = None
    global_projections: str = "shared"
    memory: int = 0
    rotary_base: float = 10000.0
    dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    initializer_scale: float = 0.125
    attention_backend: str | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.resolve()
        super().__post_init__(**kwargs)

    def resolve(self) -> None:
        """Fill in what was left to be derived and check everything; models call it again before they are built.

        Raises:
            ArgumentError, PatternError: as the class says.
        """
        self.use_cache = True
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            _check_count(name, getattr(self, name))
        if self.block not in BLOCKS:
            raise ArgumentError(f"block={self.block!r}: it must be one of {', '.join(map(repr, BLOCKS))}")
        if self.intermediate_size is None:
            gated = -(-self.hidden_size // 3) * 8
            self.intermediate_size = gated if self.block == "modern" else 4 * self.hidden_size
        if self.qk_hidden_size is None:
            self.qk_hidden_size = self.hidden_size
        for name in ("intermediate_size", "qk_hidden_size"):
            _check_count(name, getattr(self, name))
        for name in ("hidden_size", "qk_hidden_size"):
            width, heads = getattr(self, name), self.num_attention_heads
            if width % heads:
                raise ArgumentError(
                    f"{name}={width} is not divisible by num_attention_heads={heads}: take a multiple of {heads}, "
                    f"such as {max(1, width // heads) * heads}"
                )
        if self.block == "modern" and (self.qk_hidden_size // self.num_attention_heads) % 2:
            raise ArgumentError(
                f"qk_hidden_size={self.qk_hidden_size} gives {self.num_attention_heads} heads of "
                f"{self.qk_hidden_size // self.num_attention_heads}: rotary positions need heads of even width"
            )
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ArgumentError(f"dropout={self.dropout!r}: it must be a number from 0 up to, but not including, 1")
        for name in ("layer_norm_eps", "initializer_scale", "rotary_base"):
            value = getattr(self, name)
            if not _is_number(value) or not value > 0:
                raise ArgumentError(f"{name}={value!r}: it must be a number greater than 0")
        if self.attention_backend is not None and not isinstance(self.attention_backend, str):
            raise ArgumentError(
                f"attention_backend={self.attention_backend!r}: give a backend's name, such as 'torch', or None to "
                "choose automatically"
            )
        if self.global_projections not in GLOBAL_PROJECTIONS:
            raise ArgumentError(
                f"global_projections={self.global_projections!r}: it must be one of "
                f"{', '.join(map(repr, GLOBAL_PROJECTIONS))}"
            )
        cycle = self._resolve_patterns()
        if self.global_projections == "separate":
            for pattern in cycle:
                global_tokens(pattern)
        self._resolve_position_axes(cycle)
        if self.memory != 0:
            if self.block != "modern":
                raise ArgumentError(
                    f"memory={self.memory} with block={self.block!r}: learned position embeddings cannot tell "
                    "an earlier segment's tokens from the present one's; take block='modern', whose positions are "
                    "distances"
                )
            check_memory(cycle, self.memory)

    def _resolve_patterns(self) -> tuple[Pattern, ...]:
        given = [self.patterns] if isinstance(self.patterns, (str, Pattern)) else list(self.patterns or ())
        wrong = [entry for entry in given if not isinstance(entry, (str, Pattern))]
        if not given or wrong:
            raise ArgumentError(
                f"patterns={self.patterns!r}: give at least one pattern text, such as ['Local(128)', 'Strided(128)']"
            )
        tables = tables_to_json(self.pattern_tables or {})
        for pattern in given:
            if isinstance(pattern, Pattern):
                tables |= tables_to_json(pattern.tables())
        cycle = read_patterns(
            [str(pattern) for pattern in given], tables, self.num_attention_heads, self.max_position_embeddings
        )
        # Kept as the patterns write themselves, so that equal patterns make equal configurations.
        self.patterns = [str(pattern) for pattern in cycle]
        self.pattern_tables = {name: rows for p in cycle for name, rows in tables_to_json(p.tables()).items()} or None
        return cycle

    def _resolve_position_axes(self, cycle: tuple[Pattern, ...]) -> None:
        axes = self.position_axes
        if self.block == "modern":
            if axes is not None:
                raise ArgumentError(
                    f"position_axes={axes}: the modern block has rotary positions and no position embeddings; leave "
                    "it out"
                )
            return
        if axes is None:
            axes = default_axes(self.max_position_embeddings, pattern_stride(cycle))
        axes = [axes] if isinstance(axes, int) else list(axes)
        if not axes:
            raise ArgumentError("position_axes=[]: give at least one axis, or None to derive them from the patterns")
        for position, axis in enumerate(axes):
            _check_count(f"position_axes[{position}]", axis)
        if math.prod(axes) < self.max_position_embeddings:
            raise ArgumentError(
                f"position_axes={axes} cover {math.prod(axes)} positions, fewer than max_position_embeddings="
                f"{self.max_position_embeddings}: enlarge an axis, or give None to derive them"
            )
        self.position_axes = axes


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name}={value!r}: it must be a whole number of at least 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
