"""A training pass as one CUDA graph: recorded once, then launched as a whole.

A host launches a kernel in some microseconds, and a step of ten layers has hundreds. Where a device is done with them
sooner than the host has launched them, it waits for the host at every step. A graph is launched at once, whatever is
in it.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from longstride.errors import UnsupportedError

#: Passes of each shape that run as they are before one is recorded: they compile, tune and allocate.
WARM_UP = 3

Batch = Mapping[str, Tensor]


class StepGraph:
    """Runs a pass as it is at first, then records it and replays the recording, for each shape of batches by itself.

    What runs is the same either way, kernel by kernel. The gradients' memory stays from the first pass on, and that of
    the activations from the first recording on, in a pool of their own. A gradient that an optimizer dropped
    (``zero_grad``) is set to zero before the next pass; one that is there is added to, so that gradients can be
    accumulated.

    Args:
        run: forward and backward pass of a batch on the device: adds to the parameters' gradients and returns the
            loss, detached. Python code in it runs for the first passes and the recording alone, and nothing in it may
            wait for the device. Dropout draws anew at every replay.
        parameters: all whose gradients it adds to.
        pool: memory of `torch.cuda.graph_pool_handle`, to share it with other graphs that run before or after this one;
            one of its own unless given.

    Raises:
        UnsupportedError: when called, where a pass cannot be recorded.
    """

    def __init__(
        self, run: Callable[[Batch], Tensor], parameters: Iterable[torch.nn.Parameter], pool: Any = None
    ) -> None:
        self.run = run
        self.parameters = list(parameters)
        self.pool = pool
        self.passes: dict[Hashable, int] = {}
        self.recordings: dict[Hashable, Callable[[Batch], Tensor]] = {}
        self.gradients: dict[torch.nn.Parameter, Tensor] = {}

    def __call__(self, batch: Batch, *facts: Hashable) -> Tensor:
        """The loss of a batch, a tensor of its own; its gradients are added to the parameters'.

        Args:
            batch: tensors on the device.
            facts: of the host, that the pass depends on: each combination has a recording.
        """
        key = (*((name, x.shape, x.dtype) for name, x in batch.items()), *facts)
        count = self.passes[key] = self.passes.get(key, 0) + 1
        # Streams, recordings and random numbers are the current device's: make it the batch's.
        with torch.cuda.device_of(next(chain(batch.values(), self.parameters))):
            self._hold_gradients()
            if count <= WARM_UP:
                loss = self._aside(batch)
                # Parameters that take no part have no gradient, and keep none.
                self.gradients |= {x: x.grad for x in self.parameters if x.grad is not None and x not in self.gradients}
                return loss
            if key not in self.recordings:
                self.recordings[key] = self._record(batch)
            return self.recordings[key](batch)

    def _hold_gradients(self) -> None:
        """Every gradient where the recordings add to it, already before there is one: it is never there twice."""
        dropped = []
        for parameter, gradient in self.gradients.items():
            if parameter.grad is None:
                dropped.append(gradient)
            elif parameter.grad is not gradient:  # somebody has set another one
                gradient.copy_(parameter.grad)
            parameter.grad = gradient
        if dropped:
            torch._foreach_zero_(dropped)

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """Where passes run before they are recorded, and are recorded: libraries set themselves up by stream."""
        return torch.cuda.Stream()

    def _aside(self, batch: Batch) -> Tensor:
        """The pass as it is, on the stream of the recordings."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self.run(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    def _record(self, batch: Batch) -> Callable[[Batch], Tensor]:
        """A function that replays the pass for other batches of these shapes."""
        if self.pool is None:
            # One for all recordings: no two are replayed at once, and of each nothing is read after the next.
            self.pool = torch.cuda.graph_pool_handle()
        inputs = {name: x.clone() for name, x in batch.items()}
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        random_state = generator.clone_state()
        try:
            # Of this thread alone: another one may be pinning the next batch.
            with torch.cuda.graph(graph, pool=self.pool, stream=self._stream, capture_error_mode="thread_local"):
                loss = self.run(inputs)
        except RuntimeError as error:
            # It still takes itself to be recorded, and would refuse to draw.
            generator.graphsafe_set_state(random_state)
            first = error  # ending what failed may fail, too
            while isinstance(first.__context__, RuntimeError):
                first = first.__context__
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            raise UnsupportedError(
                f"the training pass cannot be recorded as a CUDA graph ({str(first).splitlines()[0]}): something in it "
                "waits for the device; run it without one (run.cuda_graph=false)"
            ) from first

        def replay(batch: Batch) -> Tensor:
            for name, x in batch.items():
                inputs[name].copy_(x, non_blocking=True)
            graph.replay()
            return loss.clone()

        return replay
