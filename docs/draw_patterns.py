"""Draws docs/patterns.png, the family of patterns that the README shows: ``python docs/draw_patterns.py``."""

from pathlib import Path

import longstride as ls
from longstride.plotting import plot_family

LENGTH = 48

FAMILY = {
    "Causal()": ls.Causal(),
    "Local(8)": ls.Local(8),
    "Dilated(6, 4)": ls.Dilated(6, 4),
    "Strided(8)": ls.Strided(8),
    "Local(8) | Strided(8)": ls.Local(8) | ls.Strided(8),
    "BlockLocal(8)": ls.BlockLocal(8),
    "Summary(8, 2)": ls.Summary(8, 2),
    "Fixed(8, 2)": ls.Fixed(8, 2),
    "LogSparse()": ls.LogSparse(),
    "RandomBlocks(6, 2)": ls.RandomBlocks(6, 2),
    "longformer(12, 3)": ls.longformer(12, 3),
    "bigbird(6, random_blocks=2)": ls.bigbird(6, random_blocks=2),
}

if __name__ == "__main__":
    print(plot_family(FAMILY, LENGTH, Path(__file__).with_name("patterns.png")))
