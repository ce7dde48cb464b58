"""Sparse against dense attention on a CUDA device: ``make gpu-bench``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import longstride as ls
from harness import Case, run


def case(batch: int, length: int, stride: int) -> Case:
    local, strided = ls.Local(stride), ls.Strided(stride)
    return Case(batch, 8, length, 64, (strided, local, local | strided, ls.Fixed(stride, 8)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "attention_gpu")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: run this on a machine with one")
    cases = (case(4, 4096, 64), case(4, 12288, 128), case(1, 65536, 256))
    run(cases, "cuda", torch.bfloat16, 2e-2, options.rounds, options.output)


if __name__ == "__main__":
    main()
