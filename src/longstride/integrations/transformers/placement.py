"""Where the rows of a batch stand: what transformers' mask functions are asked, as data instead of a mask.

transformers asks a mask function once a forward pass, and hands what it returns to every layer. For a pattern that is
not a mask of T x T but where queries and keys begin, which tokens are real, and where packed documents begin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from longstride.errors import ArgumentError, UnsupportedError


@dataclass(frozen=True, eq=False)
class Facts:
    """What a `Placement` carries. A slot is a column of the padded batch, counted from the sequences' beginning.

    Attributes:
        q_len, kv_len: queries and keys of this step; the keys of a StaticCache reach past the tokens that are there.
        q_offset: the slot of the first query; None where only the device knows.
        device_offset: the same as an int64 tensor [], where a StaticCache counts on the device: a compiled step reads
            this one, so that it is compiled once for all positions.
        kv_offset: the slot of the first key: more than 0 where a sliding-window cache has forgotten some.
        real: bool [batch, slots], False at padding; None where every token is real.
        documents: int64 [documents + 1], where whole sequences with padding, or packed ones, begin and end when the
            batch is laid out as batch * q_len tokens; padding is a document of its own, which nobody reads.
        restarts: bool [batch, q_len], True where a packed document begins; kept when a step is being compiled, and
            what it says cannot be looked at.
        is_causal: whether the model asked for a causal mask.
    """

    q_len: int
    kv_len: int
    q_offset: int | None
    device_offset: Tensor | None
    kv_offset: int
    real: Tensor | None
    documents: Tensor | None
    restarts: Tensor | None
    is_causal: bool

    @cached_property
    def slots(self) -> tuple[Tensor, int, int]:
        """Of padded rows: the slot of each row's n-th real token, int64 [batch, slots], and the positions from which
        and to which some row has queries. What stands behind a row's last real token means nothing.
        """
        assert self.real is not None
        assert self.q_offset is not None
        there = self.real[:, : self.q_offset + self.q_len]
        order = (~there).int().argsort(dim=1, stable=True)
        first = int(there[:, : self.q_offset].sum(1).min())
        return order, first, max(first + 1, int(there.sum(1).max()))

    def on(self, device: torch.device) -> Facts:
        """These facts on another device."""
        tensors = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors) if any(x is not getattr(self, name) for name, x in tensors.items()) else self


class Placement(Tensor):
    """`Facts` in the shape of a mask, [batch, 1, q_len, 0]: transformers passes on tensors of four dimensions as they
    are, through caches, checkpoints and compiled graphs. It has no elements.
    """

    facts: Facts | None = None

    @classmethod
    def of(cls, batch: int, facts: Facts, device: torch.device | str) -> Placement:
        made = torch.empty((batch, 1, facts.q_len, 0), dtype=torch.bool, device=device).as_subclass(cls)
        made.facts = facts
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Facts stay with what is the same tensor, such as what checkpoints detach, and with nothing else."""
        made = super().__torch_function__(func, types, args, kwargs or {})
        if getattr(func, "__name__", "") in _SAME and isinstance(made, Placement) and args[0].facts is not None:
            made.facts = args[0].facts.on(made.device)
        return made


#: The operations, of torch or of tensors, whose result is the same mask.
_SAME = {"detach", "clone", "contiguous", "to", "cuda", "cpu"}


def place(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,  # noqa: ARG001 - what other attentions want to know
) -> Placement:
    """The mask function that is registered with transformers; its arguments are those of ``sdpa_mask`` there.

    Raises:
        UnsupportedError: the model lays a mask of its own over the causal one; cross-attention.
        ArgumentError: padding between the real tokens of a row.
    """
    # Only the functions for masks in both directions pass this argument, whatever its value.
    is_causal = allow_is_bidirectional_skip is None
    if use_vmap:
        raise UnsupportedError(
            "this model lays a mask of its own over the usual one (or_mask_function, and_mask_function), which a "
            "pattern cannot take in: keep its attention dense"
        )
    if not is_causal and q_length != kv_length:
        raise UnsupportedError(
            f"{q_length} queries and {kv_length} keys without a causal order: cross-attention has no pattern; "
            "sparsify models that attend to themselves alone, and give an attention_mask of all their tokens"
        )
    compiling = torch.compiler.is_compiling()
    if isinstance(q_offset, Tensor):
        # A copy: it is the cache's own count, which goes on before the layers look at it.
        first, device_offset = None if compiling else int(q_offset), q_offset.clone()
    else:
        first, device_offset = q_offset, None
    given = q_length if first is None else first + q_length
    real = None if attention_mask is None else _real(attention_mask, batch_size, given, kv_offset + kv_length)
    if real is not None and not compiling and first is not None and real[:, : first + q_length].all():
        real = None
    documents, restarts = None, None
    whole = first == 0 and kv_offset == 0
    if whole and real is not None:
        documents = _padded_documents(real[:, :q_length])
    elif whole and is_causal and mask_function is not causal_mask_function and attention_mask is None:
        restarts = _restarts(mask_function, batch_size, q_length, device)
        if not compiling:
            documents, restarts = _packed_documents(restarts), None
    facts = Facts(q_length, kv_length, first, device_offset, kv_offset, real, documents, restarts, is_causal)
    return Placement.of(batch_size, facts, device)


def _real(attention_mask: Tensor, batch: int, given: int, slots: int) -> Tensor:
    """bool [batch, slots]: the mask may end before the memory of a StaticCache does."""
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch:
        raise ArgumentError(
            f"attention_mask has shape {list(attention_mask.shape)}: it must be [batch, length], the batch {batch}"
        )
    if attention_mask.shape[1] < given:
        raise ArgumentError(
            f"attention_mask of {attention_mask.shape[1]} tokens for {given}: it must say of all tokens which are "
            "real, those that the cache has seen included"
        )
    missing = slots - attention_mask.shape[1]
    real = attention_mask != 0
    return torch.nn.functional.pad(real, (0, missing)) if missing > 0 else real


def _padded_documents(real: Tensor) -> Tensor:
    """Offsets int64 [3 * batch + 1]: each row is its left padding, its content and its right padding, or less."""
    batch, length = real.shape
    # argmax takes the first of equals: the first real token, and 0 in a row of padding.
    first = real.int().argmax(1)
    after = first + real.sum(1)
    slots = torch.arange(length, device=real.device)
    together = ((slots >= first[:, None]) & (slots < after[:, None])) == real
    check(
        together.all(),
        "attention_mask has padding between the real tokens of a row: real tokens must stand together; pad on the "
        "left to generate, on the left or the right otherwise",
    )
    begins = torch.arange(batch, device=real.device) * length
    offsets = torch.stack([begins, begins + first, begins + after], 1).flatten()
    return torch.nn.functional.pad(offsets, (0, 1), value=batch * length)


def _restarts(mask_function: Callable, batch: int, length: int, device: torch.device | str) -> Tensor:
    """Where a token does not see the one before it: the model found position_ids that begin again there."""
    rows = torch.arange(batch, device=device)[:, None]
    token = torch.arange(length, device=device)[None]
    head = torch.zeros((), dtype=torch.int64, device=device)
    before, behind = (token - 1).clamp(min=0), (token + 1).clamp(max=length - 1)
    ahead = mask_function(rows, head, token, behind).expand(batch, length) & (behind > token)
    check(
        ~ahead.any(),
        "this model lets some tokens see later ones (images or prefixes, say), which a causal pattern cannot take in: "
        "keep its attention dense",
    )
    return ~mask_function(rows, head, token, before).expand(batch, length)


def _packed_documents(restarts: Tensor) -> Tensor | None:
    """Offsets int64 [documents + 1] of packed documents; None where every row is one."""
    if not restarts[:, 1:].any():
        return None
    begins = restarts.clone()
    begins[:, 0] = True
    return torch.nn.functional.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=begins.numel())


def check(condition: Tensor, message: str) -> None:
    """Raise an ArgumentError, or where a graph is compiled have the device fail, unless `condition` holds."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not condition:
        raise ArgumentError(message)
