"""Plans: how a pattern is computed at given lengths, as disjoint parts, and how parts are cut into tiles or cached."""

from longstride.plan.layout import Layout, layout
from longstride.plan.parts import KINDS, Part, Plan, plan
from longstride.plan.shapes import Dense, Grid, Listed, Masked, Shifts, Tile, Window
from longstride.plan.tiles import tiles

__all__ = [
    "KINDS",
    "Dense",
    "Grid",
    "Layout",
    "Listed",
    "Masked",
    "Part",
    "Plan",
    "Shifts",
    "Tile",
    "Window",
    "layout",
    "plan",
    "tiles",
]
