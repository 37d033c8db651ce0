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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, as Python, torch on a GPU or torch on the CPU say it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def out_of_memory(error: BaseException) -> FedkitError:
    """The sentence for an error that ``is_out_of_memory``."""
    said = str(error).splitlines()
    what = f" ({said[0]})" if said else ""
    return FedkitError(
        f"Memory ran out{what}: take a smaller model, batch-size or public set, or another --device."
    )


def where_raised(error: BaseException) -> str:
    """File and line of the user's own code that an error came through last; else where it was raised.

    The line that called a library says more than the line inside where it ended.
    """
    import sysconfig
    import traceback
    from pathlib import Path

    frames = traceback.extract_tb(error.__traceback__)
    others = (str(Path(__file__).parent), sysconfig.get_path("stdlib"), "<frozen")
    own = [
        frame
        for frame in frames
        if not frame.filename.startswith(others) and "site-packages" not in frame.filename
    ]
    last = own[-1] if own else frames[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def error_of(exit_code: int, sentence: str) -> FedkitError:
    """The error that ends a process with ``exit_code`` and says ``sentence``."""
    return UsageError(sentence) if exit_code == UsageError.exit_code else FedkitError(sentence)
