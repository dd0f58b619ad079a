"""The one exception for mistakes a user can mend: shown without a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# The errors that reading a malformed file can raise: a missing key, a wrong type, bytes that are no
# text, nesting without end, a number or a path that the system cannot take.
MALFORMED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError, OSError)


class UserError(ValueError):
    """Names the file, key, line or value at fault, what was expected and what to do about it."""


@contextlib.contextmanager
def refusing(what: str, remedy: str = "") -> Iterator[None]:
    """A context that turns any error of a malformed file into a UserError: `what` is wrong (with the file), why, `remedy`."""
    try:
        yield
    except UserError:
        raise
    except MALFORMED as error:
        raise UserError(f"{what} ({type(error).__name__}: {str(error)[:300]}){remedy}") from None
