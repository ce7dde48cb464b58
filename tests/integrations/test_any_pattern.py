"""Whatever the pattern, the padding and the steps: each row is what the dense mask makes of it alone."""

import functools
import itertools

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.integrations.conftest import GROUPED, SMALL
from tests.strategies import patterns

import longstride as ls
from longstride.integrations.transformers import SparsifiedCache

LENGTH = 18


@functools.cache
def small(name):
    torch.manual_seed(0)
    if name == "llama":
        config = transformers.LlamaConfig(**(GROUPED | {"num_hidden_layers": 1, "max_position_embeddings": 48}))
        return transformers.LlamaForCausalLM(config).double().eval()
    config = transformers.BertConfig(**(SMALL | {"num_hidden_layers": 1, "max_position_embeddings": 48}))
    return transformers.BertModel(config, add_pooling_layer=False).double().eval()


def assert_row(found, model, pattern, ids):
    """`found` is what the sparsified model makes of the row alone, and the dense one under the pattern's mask."""
    torch.testing.assert_close(found, ls.sparsify(model, pattern)(ids)[0][0], rtol=1e-9, atol=1e-9)
    mask = pattern.mask(ids.shape[1], heads=4)
    # Where a head may read nothing it has 0 by a pattern, and something else by a mask.
    something = mask.any(-1).all(0)
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)[None]
    bias[..., ~something, :] = 0.0
    attention = next(module for module in model.modules() if hasattr(module, "is_causal"))
    hook = attention.register_forward_pre_hook(
        lambda _module, args, given: (args, given | {"attention_mask": bias}), with_kwargs=True
    )
    dense = ls.sparsify(model, None)(ids)[0][0]
    hook.remove()
    torch.testing.assert_close(found[something], dense[something], rtol=1e-9, atol=1e-9)


@st.composite
def steps(draw):
    """Where a sequence of LENGTH is cut."""
    cuts = draw(st.sets(st.integers(1, LENGTH - 1), max_size=6))
    edges = [0, *sorted(cuts), LENGTH]
    return list(itertools.pairwise(edges))


CACHES = {
    "dynamic": lambda _config: transformers.DynamicCache(),
    "static": lambda config: transformers.StaticCache(config=config, max_cache_len=24),
    "sparsified": lambda config: SparsifiedCache(config, 24),
}


@pytest.mark.parametrize("cache", CACHES)
@settings(max_examples=6)
@given(pattern=patterns(), cuts=steps(), pads=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_decoding(cache, pattern, cuts, pads):
    model = small("llama")
    pattern = pattern & ls.Causal()
    try:
        ls.sparsify(model, pattern)
    except ls.PatternError:
        assume(False)
    ids = torch.randint(1, 31, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(LENGTH) >= torch.tensor(pads)[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    held = CACHES[cache](model.config)
    with torch.no_grad():
        outs = [
            model(
                ids[:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, begin:end],
                past_key_values=held,
            ).logits
            for begin, end in cuts
        ]
        found = torch.cat(outs, 1)
        for row, pad in enumerate(pads):
            assert_row(found[row, pad:], model, pattern, ids[row : row + 1, pad:])


@settings(max_examples=12)
@given(pattern=patterns(), pads=st.tuples(st.integers(0, 9), st.integers(0, 8)))
def test_encoding(pattern, pads):
    model = small("bert")
    ls.sparsify(model, pattern)
    ids = torch.randint(1, 31, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    slots, (left, right) = torch.arange(LENGTH), pads
    mask = torch.stack([slots >= left, (slots >= left) & (slots < LENGTH - right)]).long()
    with torch.no_grad():
        found = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))[0]
        for row in range(2):
            real = mask[row].bool()
            assert_row(found[row, real], model, pattern, ids[row : row + 1, real])
