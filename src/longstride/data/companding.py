"""Mu-law: audio samples as 256 levels that are fine near silence and coarse where it is loud.

With mu = 255, a sample x in [-1, 1] becomes y = sign(x) ln(1 + mu |x|) / ln(1 + mu), and the level is y put on 256
evenly spaced values from -1 (level 0) to 1 (level 255). It is the continuous law that ITU-T G.711 approximates by eight
straight segments, as WaveNet (van den Oord et al. 2016, section 2.2) and the Sparse Transformer use it: the error of a
sample is at most (|x| + 1 / mu) * (256^(1 / 255) - 1), about 2.2 % of its size.
"""

import math

import numpy as np

from longstride.errors import DataError

MU = 255
LEVELS = 256


def compress(samples: np.ndarray) -> np.ndarray:
    """float[any] in [-1, 1] to uint8[any]; what is louder is clipped.

    Raises:
        DataError: a sample is not a number.
    """
    if not np.isfinite(samples).all():
        raise DataError("a sample is infinite or not a number: audio samples are finite, and from -1 to 1")
    x = np.clip(samples.astype(np.float64), -1, 1)
    y = np.sign(x) * np.log1p(MU * np.abs(x)) / math.log1p(MU)
    return np.rint((y + 1) / 2 * (LEVELS - 1)).astype(np.uint8)


def expand(levels: np.ndarray) -> np.ndarray:
    """int[any], 0 to 255, to float64[any] in [-1, 1]: the middle of what `compress` takes to each level."""
    y = levels.astype(np.float64) / (LEVELS - 1) * 2 - 1
    return np.sign(y) * np.expm1(np.abs(y) * math.log1p(MU)) / MU


def largest_error(samples: np.ndarray) -> np.ndarray:
    """How far `expand` of `compress` may be from each of ``samples``, float[any] in [-1, 1].

    Levels are 2 / 255 apart in y, so y is off by at most 1 / 255, and |x| + 1 / mu, which is exponential in y, by at
    most that factor.
    """
    return (np.abs(samples) + 1 / MU) * (LEVELS ** (1 / (LEVELS - 1)) - 1)
