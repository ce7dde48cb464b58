"""``python -m longstride`` is the command ``longstride``."""

from longstride.cli import main

main()
