"""A step of decoding as a CUDA graph: one launch by the host in place of some hundreds."""

import torch
from torch import Tensor

from longstride.backends.decode_request import DecodeRequest
from longstride.dispatch.decoding import choose_decoder
from longstride.errors import ArgumentError, UnsupportedError
from longstride.models.cache import SparseTransformerCache
from longstride.models.modeling import SparseTransformerForCausalLM


def graph_obstacle(model: SparseTransformerForCausalLM, cache: SparseTransformerCache) -> str | None:
    """Why a step of this model with this cache cannot be recorded; None where it can."""
    if model.device.type != "cuda":
        return f"the model is on {model.device}, and graphs are for CUDA devices"
    if cache.rows is None or not cache.seen:
        return "the cache is empty: give the model a prompt with it first"
    for layer in range(len(cache.layers)):
        keys, values = cache.rows.keys[layer], cache.rows.values[layer]
        request = DecodeRequest(cache.rows.layouts[layer], keys.shape[2], values.shape[2], keys.dtype, "cuda")
        chosen = choose_decoder(request, model.config.attention_backend)
        if chosen != "triton":
            return f"layer {layer} is decoded by {chosen or model.config.attention_backend}, which looks at lengths"
    return None


class DecodeGraph:
    """One token a row, recorded once and replayed: ``logits = graph.step(tokens)``.

    The cache goes on being the model's own: it can be cropped, reordered and fed by ``model(...)`` between replays, as
    long as its batch stays. Positions and rows are worked out on the device, so a replay is right at any length.

    Args:
        model: on a CUDA device, in evaluation mode.
        cache: with a prompt in it, without padding on the right, and with room for a token.

    Raises:
        UnsupportedError: `graph_obstacle` says why.
        ArgumentError: there is no room for a token.
    """

    def __init__(self, model: SparseTransformerForCausalLM, cache: SparseTransformerCache) -> None:
        if (obstacle := graph_obstacle(model, cache)) is not None:
            raise UnsupportedError(f"no CUDA graph of a step: {obstacle}")
        assert cache.rows is not None
        self.cache = cache
        self.batch = cache.rows.batch
        self.tokens = torch.zeros(self.batch, 1, dtype=torch.int64, device=model.device)
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(model.device):
            # Kernels are compiled and loaded before the recording; the token is taken back, and its rows written again.
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(2):
                    self._run(model)
                    cache.crop(-1)
            torch.cuda.current_stream().wait_stream(beside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self._run(model)
            cache.passed(-1)

    def _run(self, model: SparseTransformerForCausalLM) -> Tensor:
        return model(input_ids=self.tokens, past_key_values=self.cache, logits_to_keep=1).logits[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        """Logits float[batch, vocab_size] after one more token of every row, int64[batch] or [batch, 1].

        They are overwritten by the next step.

        Raises:
            ArgumentError: another batch, or no room.
        """
        rows = self.cache.rows
        if rows is None or rows.batch != self.batch or tokens.numel() != self.batch:
            raise ArgumentError(f"{tokens.numel()} tokens: this graph was recorded for a batch of {self.batch}")
        self.cache.passed(1)
        self.tokens.copy_(tokens.view(self.batch, 1))
        self.graph.replay()
        return self.logits
