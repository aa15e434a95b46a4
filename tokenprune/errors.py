"""Errors of tokenprune.

Every error says what was asked, what was found and what would work. Each child also subclasses the builtin that a
caller who does not know this library would catch.
"""


class TokenPruneError(Exception):
    """Base of every error that this library raises on purpose."""


class OptionError(TokenPruneError, ValueError):
    """An option is out of range, unknown, or not to be combined with another one."""


class UnknownMethodError(TokenPruneError, KeyError):
    """A method was asked for by a name that is not registered."""

    def __str__(self) -> str:
        """Undo ``KeyError``'s quoting, so that the sentence reads as written."""
        return str(self.args[0]) if self.args else ""


class UnsupportedModelError(TokenPruneError, TypeError):
    """The model, its cache or its state is of a kind that cannot be pruned; nothing was touched."""


class InputError(TokenPruneError, ValueError):
    """A tensor that reached a site or an op has a wrong shape, dtype or value (NaN, for instance)."""


class BackendError(TokenPruneError, RuntimeError):
    """An explicitly chosen backend is not available here; it never falls back to another one."""
