"""What can be recorded as a CUDA graph; tests/gpu replays it."""

import pytest
import torch

from longstride.errors import UnsupportedError
from longstride.models import DecodeGraph, SparseTransformerCache, graph_obstacle


def test_a_model_on_the_cpu_is_not_recorded(make_model):
    model = make_model(dtype=torch.float32)
    cache = SparseTransformerCache(model.config)
    assert "graphs are for CUDA devices" in graph_obstacle(model, cache)
    with pytest.raises(UnsupportedError, match="no CUDA graph of a step: the model is on cpu"):
        DecodeGraph(model, cache)


def test_what_stands_in_the_way_on_a_cuda_device(make_model, tokens, monkeypatch):
    model = make_model(dtype=torch.float32)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    cache = SparseTransformerCache(model.config)
    assert "the cache is empty" in graph_obstacle(model, cache)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    assert graph_obstacle(model, cache) is None
    model.config.attention_backend = "torch"
    assert "layer 0 is decoded by torch" in graph_obstacle(model, cache)
    model.config.attention_backend = "reference"
    assert "layer 0 is decoded by reference" in graph_obstacle(model, cache)
