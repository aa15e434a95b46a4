"""Methods that take part inside the blocks of a vision encoder."""

from tokenprune.methods.base import Method
from tokenprune.session import Session

SITE = "encoder_block"


def methods_of(session: Session) -> tuple[Method, ...]:
    """The methods of a session that take part there, in order."""
    return session.reducers(SITE)


def restores(session: Session) -> bool:
    """Whether what leaves the encoder gets all its tokens back."""
    return all(method.restore for method in methods_of(session))
