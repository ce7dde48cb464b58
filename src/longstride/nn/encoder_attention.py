"""Self-attention that may look ahead: along a bidirectional pattern, within each row's real tokens.

A causal layer never reaches padding that stands on the right; one that looks ahead does. So a padded row is taken for
two packed documents, its real tokens and its padding, and neither sees the other: shapes stay as they are, whatever
the mask says, and nothing is read back from the device. What stands at padding means nothing, but is finite.
"""

from typing import Any

import torch
from torch import Tensor, nn

from longstride.attention import attention
from longstride.errors import UnsupportedError
from longstride.nn.global_projections import GlobalProjections
from longstride.nn.rotary import Rotation, rotate
from longstride.nn.self_attention import Documents, PatternAttention
from longstride.patterns import Pattern


def real_documents(counts: Tensor, length: int) -> Documents:
    """Every row as two documents: its first ``counts[row]`` tokens, which are real, and the others, which are padding.

    >>> real_documents(torch.tensor([3, 5]), 5).cu_seqlens.tolist()
    [0, 3, 5, 10, 10]

    Args:
        counts: int64[batch], from 0 to length.
        length: tokens of a row, padding included.
    """
    starts = length * torch.arange(len(counts) + 1, device=counts.device)
    bounds = torch.stack((starts[:-1], starts[:-1] + counts), dim=1).flatten()
    return Documents(torch.cat((bounds, starts[-1:])), length)


class EncoderSelfAttention(PatternAttention):
    """W_p attend(x, pattern) with a pattern that may look ahead; [B, T, d] to [B, T, d].

    Args:
        pattern, options: as :class:`longstride.nn.SelfAttention`'s.
        global_projections: of the pattern's global tokens, where those have projections of their own.
    """

    def __init__(
        self, pattern: Pattern, *, global_projections: GlobalProjections | None = None, **options: Any
    ) -> None:
        super().__init__(pattern, **options)
        self.global_projections = global_projections

    def forward(
        self,
        hidden: Tensor,
        counts: Tensor | None = None,
        documents: Documents | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Attend within each row's real tokens, or within each document.

        Args:
            hidden: float[batch, length, hidden_size].
            counts: int64[batch]: how many of a row's tokens are real, the first ones; None where all are.
            documents: where documents begin that do not see one another, in rows without padding.
            rotation: of the tokens' positions, for a layer that turns queries and keys by them.

        Raises:
            UnsupportedError: documents where global tokens have projections of their own.
        """
        own = self.global_projections
        if own is not None and documents is not None:
            raise UnsupportedError(
                "packed documents with global_projections='separate': the projections of global tokens read whole "
                "rows; give each document a row of its own, padded, with an attention_mask"
            )
        q, k, v = self.project(hidden)
        q, k = self.place(q, k, rotation)
        if counts is not None:
            documents = real_documents(counts, hidden.shape[1])
        if documents is None:
            attended = attention(q, k, v, self.pattern, backend=self.backend)
        else:
            attended = self._attend_within(documents, q, k, v)
        if own is not None:
            index = own.index(hidden.shape[1], hidden.device)
            q, k, v = own(hidden, index)
            q, k = self.place(q, k, rotation, index)
            attended = own.overwrite(attended, q, k, v, index, counts)
        return self.out_proj(attended.transpose(1, 2).flatten(2))

    def place(
        self,
        q: Tensor,
        k: Tensor,
        rotation: Rotation | None,  # noqa: ARG002 (a rotary layer reads it)
        index: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys as they are compared: here as they were projected. ``index`` names the queries' places."""
        return q, k


class RotaryEncoderSelfAttention(EncoderSelfAttention):
    """As :class:`EncoderSelfAttention`, with the normalised and rotated queries and keys of `RotarySelfAttention`.

    Global tokens with projections of their own have their queries and keys normalised by the layer's own two norms, so
    that local and global scores are of one size, and rotated by their positions.

    Args:
        pattern, options: as :class:`EncoderSelfAttention`'s.
        norm_eps: added to the mean square in the two norms.
    """

    def __init__(self, pattern: Pattern, *, norm_eps: float = 1e-5, **options: Any) -> None:
        super().__init__(pattern, **options)
        head_dim = self.widths[0] // self.num_heads
        self.q_norm = nn.RMSNorm(head_dim, eps=norm_eps)
        self.k_norm = nn.RMSNorm(head_dim, eps=norm_eps)

    def place(
        self, q: Tensor, k: Tensor, rotation: Rotation | None, index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalised and rotated."""
        assert rotation is not None
        of_queries = rotation
        if index is not None:
            cos, sin = (table.index_select(-2, index) for table in rotation)
            of_queries = cos, sin
        q, k = (
            # The weight's dtype is float32 under autocast: one rounding, after the rotation.
            rotate(norm(x.to(norm.weight.dtype)), where).to(x.dtype)
            for norm, x, where in ((self.q_norm, q, of_queries), (self.k_norm, k, rotation))
        )
        return q, k
