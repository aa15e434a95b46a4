"""Methods that take part inside the blocks of a vision encoder."""

from tokenprune.engine import Engine
from tokenprune.methods.base import Method

SITE = "encoder_block"
BlockReducer = Method


def reducers_of(engine: Engine) -> tuple[BlockReducer, ...]:
    """The methods of a session that take part there, in order."""
    return engine.reducers(SITE)


def is_proportional(reducers: tuple[BlockReducer, ...]) -> bool:
    """Whether attention is to count a token by its size."""
    return any(reducer.proportional for reducer in reducers)


def restores(reducers: tuple[BlockReducer, ...]) -> bool:
    """Whether what leaves the encoder gets all its tokens back."""
    return all(reducer.restore for reducer in reducers)


def is_scored(reducers: tuple[BlockReducer, ...]) -> bool:
    """Whether a method goes by the attention that tokens gather."""
    return any(reducer.uses_attention_scores for reducer in reducers)
