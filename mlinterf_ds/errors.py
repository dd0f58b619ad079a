"""The one exception for mistakes a user can mend: shown without a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# What reading a file that holds something else than it should can raise: a missing key, a wrong type, bytes that are no
# text, nesting without end, a number or a path that the system cannot take.
MALFORMED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError, OSError)


class UserError(ValueError):
    """Names the file, key, line or value at fault, what was expected and what to do about it."""


@contextlib.contextmanager
def refusing(what: str, remedy: str = "") -> Iterator[None]:
    """Anything that a malformed file raises inside ends as a UserError: `what` (the file, and what it is not), why, `remedy`."""
    try:
        yield
    except UserError:
        raise
    except MALFORMED as error:
        raise UserError(f"{what} ({type(error).__name__}: {str(error)[:300]}){remedy}") from None
