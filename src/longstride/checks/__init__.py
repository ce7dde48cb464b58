"""What a pattern costs, or does not, on a model that exists: loss by context, needles, and a search for a schedule.

A `Subject` is any causal language model in the Hugging Face conventions, ours or not, and its reading of text.
"""

from longstride.checks.attending import attending, read_schedule, schedule_of
from longstride.checks.context_loss import ContextRange, LossByContext, context_table, loss_by_context
from longstride.checks.needle import Haystack, Retrieval, find_needles, shortest_length
from longstride.checks.subject import Subject, load_causal_lm, load_subject

__all__ = [
    "ContextRange",
    "Haystack",
    "LossByContext",
    "Retrieval",
    "Subject",
    "attending",
    "context_table",
    "find_needles",
    "load_causal_lm",
    "load_subject",
    "loss_by_context",
    "read_schedule",
    "schedule_of",
    "shortest_length",
]
