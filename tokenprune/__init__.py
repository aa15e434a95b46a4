"""tokenprune: one line makes a vision-language model faster and smaller at inference by pruning its visual tokens."""

from tokenprune.api import list_families, list_methods, patch, unpatch
from tokenprune.decoder.visual_mask import visual_tokens
from tokenprune.errors import (
    BackendError,
    InputError,
    OptionError,
    TokenPruneError,
    UnknownMethodError,
    UnsupportedModelError,
)
from tokenprune.methods import AIM, DivPrune, FastV, Method, PyramidDrop, Random, SpAtten, ToMe, Uniform
from tokenprune.report.report import Report
from tokenprune.session import Session
from tokenprune.signals import Trace

__version__ = "0.1.0"

__all__ = [
    "AIM",
    "BackendError",
    "DivPrune",
    "FastV",
    "InputError",
    "Method",
    "OptionError",
    "PyramidDrop",
    "Random",
    "Report",
    "Session",
    "SpAtten",
    "ToMe",
    "TokenPruneError",
    "Trace",
    "Uniform",
    "UnknownMethodError",
    "UnsupportedModelError",
    "list_families",
    "list_methods",
    "patch",
    "unpatch",
    "visual_tokens",
]
