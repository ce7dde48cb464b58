"""Multi-head self-attention along a pattern."""

from torch import Tensor, nn

from longstride.attention import BACKENDS, attention
from longstride.attention_cached import attention_cached
from longstride.cache import PatternCache
from longstride.errors import ArgumentError
from longstride.nn.initialization import ResidualProjection
from longstride.patterns import Pattern


class PatternAttention(nn.Module):
    """What self-attention layers share: the maps to heads and back, and attention along a pattern between them.

    The maps have no biases, as in equations 4 and 5 of the paper. Queries, keys and values come from one linear map
    and are read where it wrote them: the heads are views of its output.

    Args:
        pattern: which pairs attend; one for all heads or ``per_head(...)``.
        hidden_size: model width d; the values have it in all heads together.
        num_heads: number of heads; must divide hidden_size and qk_hidden_size.
        qk_hidden_size: width of the queries, and of the keys, in all heads together; hidden_size unless given
            (the paper's image models use half of it).
        backend: name of the attention backend; None takes the fastest that supports the request.

    Raises:
        ArgumentError: num_heads does not divide a width, or the backend's name is unknown.

    Source: Child et al. 2019, section 4.1; section 6 for the half-size queries and keys.
    """

    def __init__(
        self,
        pattern: Pattern,
        *,
        hidden_size: int,
        num_heads: int,
        qk_hidden_size: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        qk_hidden_size = hidden_size if qk_hidden_size is None else qk_hidden_size
        for name, width in (("hidden_size", hidden_size), ("qk_hidden_size", qk_hidden_size)):
            if width % num_heads:
                raise ArgumentError(
                    f"{name}={width} is not divisible by num_heads={num_heads}: take a multiple of {num_heads}"
                )
        if backend is not None and backend not in BACKENDS:
            raise ArgumentError(
                f"backend={backend!r}: known backends are {', '.join(map(repr, BACKENDS))}; None chooses by itself"
            )
        self.pattern = pattern
        self.num_heads = num_heads
        self.backend = backend
        self.widths = [qk_hidden_size, qk_hidden_size, hidden_size]
        self.qkv_proj = nn.Linear(hidden_size, sum(self.widths), bias=False)
        self.out_proj = ResidualProjection(hidden_size, hidden_size, bias=False)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values float[batch, num_heads, length, head_dim] of hidden[batch, length, hidden_size]."""
        batch, length, _ = hidden.shape
        q, k, v = (
            projected.view(batch, length, self.num_heads, width // self.num_heads).transpose(
                1, 2
            )  # [B, H, T, head_dim]
            for projected, width in zip(self.qkv_proj(hidden).split(self.widths, dim=-1), self.widths, strict=True)
        )
        return q, k, v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: PatternCache | None, layer: int, counts: Tensor | None
    ) -> Tensor:
        """The layer's output float[batch, length, hidden_size] of projected tokens; the rest is `forward`'s."""
        if cache is None:
            attended = attention(q, k, v, self.pattern, backend=self.backend)
        else:
            attended = attention_cached(q, k, v, self.pattern, cache, layer=layer, counts=counts, backend=self.backend)
        assert isinstance(attended, Tensor)  # a pair comes with return_lse alone
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        backend = "automatic" if self.backend is None else self.backend
        return f"pattern={self.pattern}, num_heads={self.num_heads}, backend={backend}"


class SelfAttention(PatternAttention):
    """W_p attend(x, pattern): project to heads, attend along the pattern, project back; [B, T, d] to [B, T, d].

    Source: Child et al. 2019, section 4.1.
    """

    def forward(
        self, hidden: Tensor, cache: PatternCache | None = None, layer: int = 0, counts: Tensor | None = None
    ) -> Tensor:
        """Attend within [B, T, d], or with a cache also to the tokens that it was given before.

        Args:
            hidden: float[batch, length, hidden_size].
            cache: what is kept of earlier tokens; it takes the new ones. The caller ends the step with its `advance`.
            layer: which of the cache's layers this is.
            counts: int64[batch]: with a cache, how many of each row's tokens there are, the first ones.
        """
        return self.attend(*self.project(hidden), cache, layer, counts)
