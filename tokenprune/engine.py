"""Earlier names of what adapters work with."""

from tokenprune.hooks import Hook, Swap
from tokenprune.methods.base import Method as LayerReducer
from tokenprune.methods.base import Method as Reducer
from tokenprune.session import Session as Engine

__all__ = ["Engine", "Hook", "LayerReducer", "Reducer", "Swap"]
