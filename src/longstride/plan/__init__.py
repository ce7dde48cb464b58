"""Plans: how a pattern is computed at given lengths, as disjoint parts, and how parts are cut into tiles."""

from longstride.plan.parts import KINDS, Part, Plan, plan
from longstride.plan.tiles import Dense, Listed, Masked, Shifts, Tile, Window, tiles

__all__ = ["KINDS", "Dense", "Listed", "Masked", "Part", "Plan", "Shifts", "Tile", "Window", "plan", "tiles"]
