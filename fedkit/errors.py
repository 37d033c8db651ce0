"""What goes wrong, in one sentence and with an exit code.

An error message says what is wrong, where, and what to do. Nobody but ``--debug`` sees a traceback.
"""

LONGEST = 500


class FedkitError(Exception):
    """The world answered otherwise than hoped (exit code 1): a service manager may try again."""

    exit_code = 1


class UsageError(FedkitError):
    """What was typed cannot be meant (exit code 2): trying again does not help."""

    exit_code = 2


def plain(text: str | None) -> str:
    """What a stranger wrote, fit for a line of a log or a screen: printable, and not for ever."""
    return "".join(letter if letter.isprintable() else " " for letter in (text or "")[:LONGEST])


def error_of(exit_code: int, sentence: str) -> FedkitError:
    """The error that ends a process with ``exit_code`` and says ``sentence``."""
    return UsageError(sentence) if exit_code == UsageError.exit_code else FedkitError(sentence)
