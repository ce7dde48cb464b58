"""What a pattern costs, or does not, on a model that exists: loss by context, needles, and a search for a schedule.

A `Subject` is any causal language model in the Hugging Face conventions, ours or not, and its reading of text.
"""

from longstride.checks.attending import attending, read_schedule, schedule_of
from longstride.checks.context_loss import ContextRange, LossByContext, context_table, loss_by_context
from longstride.checks.needle import Haystack, Retrieval, find_needles, shortest_length
from longstride.checks.schedule_file import write_schedule
from longstride.checks.search import LayerCost, Search, Suggestion, default_candidates, suggest_schedule
from longstride.checks.subject import Subject, load_causal_lm, load_subject
from longstride.checks.tolerance import Tolerance

__all__ = [
    "ContextRange",
    "Haystack",
    "LayerCost",
    "LossByContext",
    "Retrieval",
    "Search",
    "Subject",
    "Suggestion",
    "Tolerance",
    "attending",
    "context_table",
    "default_candidates",
    "find_needles",
    "load_causal_lm",
    "load_subject",
    "loss_by_context",
    "read_schedule",
    "schedule_of",
    "shortest_length",
    "suggest_schedule",
    "write_schedule",
]
