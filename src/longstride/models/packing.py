"""Packed batches: documents one after another in a row, each computed as if it stood alone.

Boundaries are said in either of the two ways that are customary in transformers: by ``position_ids`` that begin at 0
again, or by the ``cu_seq_lens_q`` and ``max_length_q`` of its attention arguments, which cost no look at the device.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from longstride.errors import ArgumentError
from longstride.nn import Documents


def packed_documents(
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    max_length_q: int | None,
    *,
    batch: int,
    length: int,
    longest: int,
) -> Documents | None:
    """The documents of a batch; None where every row is one sequence.

    Args:
        position_ids: int64[batch or 1, length]; a 0 behind a row's first place begins a document. A graph that is
            being compiled cannot look at them: there they say nothing, and `check_positions` holds them to that.
        cu_seq_lens_q: int32 or int64[documents + 1]: offsets in the batch's tokens, row after row, from 0 to
            batch * length; position_ids are then not looked at.
        max_length_q: the tokens of the longest document, or more; read from cu_seq_lens_q unless given.
        longest: the most tokens that a document may have.

    Raises:
        ArgumentError: positions that do not count up from 0 in every document; a max_length_q without offsets; a
            document that is too long.
    """
    if cu_seq_lens_q is not None:
        if cu_seq_lens_q.dim() != 1 or len(cu_seq_lens_q) < 2:
            raise ArgumentError(
                f"cu_seq_lens_q has shape {tuple(cu_seq_lens_q.shape)}: it must be [documents + 1], at least [2]"
            )
        if max_length_q is None:
            max_length_q = int(cu_seq_lens_q.diff().max())
        return Documents(cu_seq_lens_q, _checked(int(max_length_q), longest))
    if max_length_q is not None:
        raise ArgumentError(f"max_length_q={max_length_q} without cu_seq_lens_q: give where the documents begin, too")
    if (
        position_ids is None
        or torch.compiler.is_compiling()
        or position_ids.shape not in ((batch, length), (1, length))
    ):
        return None
    positions = position_ids.expand(batch, length)
    if not (positions[:, 1:] == 0).any():
        return None
    total = batch * length
    begins = (positions == 0).flatten().nonzero().flatten()
    # Empty documents at the end, up to a power of two: compiled blocks then meet few numbers of documents.
    offsets = pad(begins, (0, power_of_two(len(begins)) + 1 - len(begins)), value=total).to(torch.int32)
    if begins[0] or not torch.equal(document_positions(offsets, total), positions.flatten()):
        raise ArgumentError(
            "position_ids of packed documents must begin with 0 in every row and count 0, 1, 2, ... in every document"
        )
    return Documents(offsets, min(power_of_two(_checked(int(offsets.diff().max()), longest)), length, longest))


def _checked(tokens: int, longest: int) -> int:
    if tokens > longest:
        raise ArgumentError(
            f"a packed document has {tokens} tokens and max_position_embeddings={longest}: shorten it, or train a "
            "model with a longer context"
        )
    return tokens


def power_of_two(number: int) -> int:
    """The least power of two that is at least ``number``.

    >>> power_of_two(5), power_of_two(8)
    (8, 8)
    """
    return 1 << (number - 1).bit_length()


def document_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """Every token's position in its own document: int64[total].

    >>> document_positions(torch.tensor([0, 3, 3, 5]), 5).tolist()
    [0, 1, 2, 0, 1]
    """
    tokens = torch.arange(total, device=cu_seqlens.device)
    # The last of equal offsets: an empty document has no tokens.
    document = torch.searchsorted(cu_seqlens, tokens.to(cu_seqlens.dtype), right=True) - 1
    return tokens - cu_seqlens[document]
