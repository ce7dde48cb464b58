"""Pictures: patterns in a terminal and as PNG, schedules of patterns over layers, loss curves, checks of a model."""

from longstride.plotting.checked import plot_loss_by_context, plot_retrieval
from longstride.plotting.loss import plot_loss
from longstride.plotting.pictures import plot_family, plot_pattern, plot_schedule
from longstride.plotting.terminal import draw_terminal

__all__ = [
    "draw_terminal",
    "plot_family",
    "plot_loss",
    "plot_loss_by_context",
    "plot_pattern",
    "plot_retrieval",
    "plot_schedule",
]
