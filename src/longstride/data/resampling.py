"""Another sampling rate for audio, exactly rational, block by block, with NumPy alone.

To go from rate F to rate T, let T / F = L / M in lowest terms. Output sample n lies at input time n M / L, and is the
sum of the input samples around it, weighted by a low-pass filter that is centred there: a windowed sinc (Smith,
"Digital Audio Resampling", ccrma.stanford.edu/~jos/resample). Output samples with the same n mod L meet the input
samples at the same fractions, so L sets of weights are all there are, and for each set its outputs are one matrix
product over a strided view of the input.

The filter: 64 zero crossings under a Kaiser window of beta 9 (side lobes below -90 dB), cut off at 0.91 of the lower
Nyquist frequency. What lies below 0.82 of it passes, what lies above it is 80 dB down, far below mu-law's own noise.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np

from longstride.errors import DataError

CROSSINGS = 32
KAISER_BETA = 9.0
CUTOFF = 0.91

LOWEST_HZ, HIGHEST_HZ = 1_000, 384_000


def check_rate(rate_hz: int) -> None:
    """Raises DataError where a sampling rate is none that audio has."""
    if not LOWEST_HZ <= rate_hz <= HIGHEST_HZ:
        raise DataError(f"a sampling rate of {rate_hz:,} Hz: it must be from {LOWEST_HZ:,} to {HIGHEST_HZ:,} Hz")


def resample(blocks: Iterable[np.ndarray], from_hz: int, to_hz: int) -> Iterator[np.ndarray]:
    """Audio at another rate.

    Args:
        blocks: float[any] each, one after another; silence stands before and after them.
        from_hz, to_hz: sampling rates.

    Yields:
        float64[any]; in all, one sample for each 1 / to_hz seconds that the input lasts, the first at the first's time.

    Raises:
        DataError: a rate that audio does not have.
    """
    check_rate(from_hz)
    check_rate(to_hz)
    if from_hz == to_hz:
        yield from (block.astype(np.float64) for block in blocks)
        return
    divisor = math.gcd(from_hz, to_hz)
    up, down = to_hz // divisor, from_hz // divisor
    weights = _weights(up, down)
    # Taps before and after the input sample at or before an output's time.
    reach = weights.shape[1] // 2
    pending = np.zeros(reach - 1)
    # The input time of pending[0] is `first`, in samples; outputs up to number `done` have been given.
    first, done, total = -(reach - 1), 0, 0
    for block in blocks:
        pending = np.concatenate([pending, block.astype(np.float64)])
        total += len(block)
        # Output n needs input up to floor(n M / L) + reach.
        ready = max(((total - 1 - reach) * up + up - 1) // down + 1, done)
        yield _outputs(pending, first, done, ready, up, down, weights)
        done = ready
        passed = min(max(done * down // up - reach + 1 - first, 0), len(pending))
        pending, first = pending[passed:], first + passed
    end = -(-total * up // down)
    pending = np.concatenate([pending, np.zeros(reach + 1)])
    yield _outputs(pending, first, done, end, up, down, weights)


def _weights(up: int, down: int) -> np.ndarray:
    """float64[up, taps]: row r weighs the inputs around outputs n with n % up == r."""
    cutoff = CUTOFF * min(1.0, up / down)
    reach = math.ceil(CROSSINGS / cutoff)
    fraction = (np.arange(up) * down % up / up)[:, None]
    distance = np.arange(-reach + 1, reach + 1) - fraction
    window = np.i0(KAISER_BETA * np.sqrt(np.maximum(1 - (distance / reach) ** 2, 0))) / np.i0(KAISER_BETA)
    weights = cutoff * np.sinc(cutoff * distance) * window
    # A constant stays exactly what it is, at every fraction.
    return weights / weights.sum(axis=1, keepdims=True)


def _outputs(
    pending: np.ndarray, first: int, start: int, stop: int, up: int, down: int, weights: np.ndarray
) -> np.ndarray:
    """Outputs ``start`` to ``stop``, from inputs that begin at number ``first``."""
    outputs = np.empty(stop - start)
    if not len(outputs):
        return outputs
    taps = weights.shape[1]
    windows = np.lib.stride_tricks.sliding_window_view(pending, taps)
    for offset in range(min(up, len(outputs))):
        n = start + offset
        begin = n * down // up - taps // 2 + 1 - first
        # Every up-th output is down inputs further on.
        outputs[offset::up] = windows[begin::down][: len(outputs[offset::up])] @ weights[n % up]
    return outputs
