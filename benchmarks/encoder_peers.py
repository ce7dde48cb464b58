"""The attention layers of transformers' Longformer and BigBird beside ours, with the same weights.

Ours reads any length. Longformer's reads multiples of its window, and is padded to one here, as its model does;
BigBird's reads multiples of its block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BigBirdConfig, LongformerConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

import longstride as ls
from longstride.nn import EncoderSelfAttention, GlobalProjections

#: BigBird draws among the blocks of the longest sequence of its model, whatever the sequence at hand.
BIGBIRD_LONGEST = 4096

#: hidden[batch, length, width] to the same shape.
Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Pair:
    """Two layers that should compute the same.

    Attributes:
        name: for a table.
        pattern: what ours attends along.
        modules: ours and theirs.
        linears: the maps of theirs, in the order in which ours has them stacked.
        prepare_theirs: of hidden (for its shape) and int64[batch] real tokens of each row, the first ones, or None for
            all: their layer with its masks made.
    """

    name: str
    pattern: ls.Pattern
    modules: tuple[EncoderSelfAttention, nn.Module]
    linears: tuple[nn.Linear, ...]
    prepare_theirs: Callable[[Tensor, Tensor | None], Layer]

    def ours(self, hidden: Tensor, counts: Tensor | None = None) -> Tensor:
        return self.modules[0](hidden, counts)

    def theirs(self, hidden: Tensor, counts: Tensor | None = None) -> Tensor:
        return self.prepare_theirs(hidden, counts)(hidden)

    def gradients_of_ours(self) -> list[Tensor]:
        """Of every map's weight and bias, in the order of theirs."""
        ours = self.modules[0]
        stacked = [ours.qkv_proj]
        if ours.global_projections is not None:
            stacked += [ours.global_projections.q_proj, ours.global_projections.kv_proj]
        found = []
        for linear in stacked:
            width = linear.in_features
            parts = zip(linear.weight.grad.split(width), linear.bias.grad.split(width), strict=True)
            found += [x for part in parts for x in part]
        return found

    def gradients_of_theirs(self) -> list[Tensor]:
        return [x.grad for linear in self.linears for x in (linear.weight, linear.bias)]

    def to(self, *where: object) -> Pair:
        """Both layers, moved to a device or dtype."""
        for module in self.modules:
            module.to(*where)
        return self


def longformer_pair(window: int, tokens: int | tuple[int, ...], *, hidden_size: int, num_heads: int) -> Pair:
    """Longformer's attention with an ``attention_window`` and global tokens, which have projections of their own."""
    config = LongformerConfig(
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        attention_window=[window],
        attention_probs_dropout_prob=0.0,
    )
    theirs = LongformerSelfAttention(config, layer_id=0)
    pattern = ls.longformer(window, tokens)
    own = GlobalProjections(pattern, hidden_size=hidden_size, num_heads=num_heads)
    ours = EncoderSelfAttention(pattern, hidden_size=hidden_size, num_heads=num_heads, global_projections=own)
    _take(ours, "qkv_proj", theirs.query, theirs.key, theirs.value)
    _take(own, "q_proj", theirs.query_global)
    _take(own, "kv_proj", theirs.key_global, theirs.value_global)
    ours.out_proj = nn.Identity()

    def prepare(hidden: Tensor, counts: Tensor | None) -> Layer:
        batch, length, _ = hidden.shape
        padded = -length % window
        at = torch.arange(length + padded, device=hidden.device).expand(batch, -1)
        real = at < (length if counts is None else counts[:, None])
        is_global = torch.isin(at, torch.tensor(own.tokens, device=at.device)) & real
        # As LongformerModel has it: below 0 padding, 0 local, above 0 global.
        kinds = torch.where(real, 0.0, -10000.0).to(hidden.dtype).masked_fill(is_global, 10000.0)
        masks = {
            "attention_mask": kinds,
            "is_index_masked": ~real,
            "is_index_global_attn": is_global,
            "is_global_attn": bool(is_global.any()),
        }
        return lambda hidden: theirs(F.pad(hidden, (0, 0, 0, padded)), **masks)[0][:, :length]

    return Pair(
        f"Longformer: window {window}, {len(own.tokens)} global",
        pattern,
        (ours, theirs),
        (theirs.query, theirs.key, theirs.value, theirs.query_global, theirs.key_global, theirs.value_global),
        prepare,
    )


def bigbird_pair(
    block: int, random_blocks: int, length: int, *, hidden_size: int, num_heads: int, longest: int = BIGBIRD_LONGEST
) -> Pair:
    """BigBird's block-sparse attention as in training, at one length, and ours along the blocks that it drew."""
    config = BigBirdConfig(
        hidden_size=hidden_size,
        num_attention_heads=num_heads,
        block_size=block,
        num_random_blocks=random_blocks,
        max_position_embeddings=longest,
        attention_probs_dropout_prob=0.0,
    )
    theirs = BigBirdBlockSparseAttention(config, seed=0).train()
    table = counted_blocks(theirs, length) > 0
    pattern = ls.BlockSparse(table, block)
    ours = EncoderSelfAttention(pattern, hidden_size=hidden_size, num_heads=num_heads)
    _take(ours, "qkv_proj", theirs.query, theirs.key, theirs.value)
    ours.out_proj = nn.Identity()
    return Pair(
        f"BigBird: blocks of {block}, {random_blocks} random",
        pattern,
        (ours, theirs),
        (theirs.query, theirs.key, theirs.value),
        partial(_prepare_bigbird, theirs),
    )


def counted_blocks(layer: BigBirdBlockSparseAttention, length: int) -> Tensor:
    """int64[heads, query blocks, key blocks]: how often the layer counts a block's keys in its softmax.

    Once or never, but for a length of 1,024: there it draws also from blocks that a row reads anyway, its window and
    the last one, and counts them twice where it does.
    """
    drawn: list[Tensor] = []
    make_mask = layer._create_rand_mask_from_inputs

    def spy(from_mask: Tensor, to_mask: Tensor, blocks: Tensor, *others: int) -> Tensor:
        drawn.append(blocks[0].cpu())
        return make_mask(from_mask, to_mask, blocks, *others)

    weight = layer.query.weight
    layer._create_rand_mask_from_inputs = spy
    try:
        with torch.no_grad():
            nothing = torch.zeros(1, length, weight.shape[1], device=weight.device, dtype=weight.dtype)
            _prepare_bigbird(layer, nothing, None)(nothing)
    finally:
        del layer._create_rand_mask_from_inputs
    blocks = length // layer.block_size
    at = torch.arange(blocks)
    window = (at[:, None] - at).abs() <= 1
    window[:, [0, -1]] = True
    window[[0, -1]] = True
    counted = window.long().repeat(layer.num_attention_heads, 1, 1)
    middle = counted[:, 1:-1]  # [heads, blocks - 2, blocks]; drawn is [heads, blocks - 2, random blocks]
    middle.scatter_add_(2, drawn[0], torch.ones_like(drawn[0]))
    return counted


def draw_once(pair: Pair, length: int) -> None:
    """Have BigBird's layer keep its first draw: it draws the blocks of every head anew, on the host, at every call."""
    layer = pair.modules[1]
    draw = layer._bigbird_block_rand_mask
    kept: dict[int, list] = {}

    def kept_draw(*sizes: int, **options: int) -> object:
        heads = kept.setdefault(length, [])
        if len(heads) < layer.num_attention_heads:
            heads.append(draw(*sizes, **options))
            return heads[-1]
        heads.append(heads.pop(0))  # head after head, and again from the first
        return heads[-1]

    layer._bigbird_block_rand_mask = kept_draw


def _prepare_bigbird(layer: BigBirdBlockSparseAttention, hidden: Tensor, counts: Tensor | None) -> Layer:
    batch, length, _ = hidden.shape
    real = torch.ones(batch, length, device=hidden.device, dtype=hidden.dtype)
    if counts is not None:
        real = (torch.arange(length, device=hidden.device) < counts[:, None]).to(hidden.dtype)
    blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(real, layer.block_size)
    return lambda hidden: layer(hidden, band, from_mask, to_mask, blocked, blocked)[0]


def _take(owner: nn.Module, name: str, *linears: nn.Linear) -> None:
    """Put one map with the stacked weights and biases of several in place of the owner's, which has no biases."""
    stacked = nn.Linear(linears[0].in_features, sum(linear.out_features for linear in linears))
    with torch.no_grad():
        stacked.weight.copy_(torch.cat([linear.weight for linear in linears]))
        stacked.bias.copy_(torch.cat([linear.bias for linear in linears]))
    setattr(owner, name, stacked)
