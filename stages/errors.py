"""The one exception for a user's mistake, and the one place that turns it into a line.

Whatever a user can get wrong (a path, a setting, a damaged file) raises `UserError` with one sentence that says what,
where and what to do. `exit_with_one_line` prints it and exits with 1; every other exception is a bug of ours and keeps
its traceback.
"""

from __future__ import annotations

import functools
import gc
import os
import pickle
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress


class UserError(Exception):
    """A mistake that the user can fix. The message is one line: what, where, what to do."""


@contextmanager
def without_collection():
    """Suspends garbage collection while torch and numba are imported: they make long-lived objects, and scanning them takes a fifth of the import."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()  # without gc.freeze(), after which triton's modules report at exit that they were never freed


@contextmanager
def loading_kernels():
    """For the first use of compiled kernels: UserError where the files in which numba keeps them are damaged."""
    try:
        yield
    except (EOFError, pickle.UnpicklingError):
        from kernels.compiled import cache_directory

        raise UserError(f"{cache_directory()}: compiled kernels that numba keeps there are damaged; delete all files *.nbi and *.nbc under it "
                        "and run again") from None


def exit_with_one_line(main: Callable[..., None]) -> Callable[..., None]:
    """Decorates a stage's `main`: `UserError` becomes one line on standard error and exit status 1."""

    @functools.wraps(main)
    def wrapper(*arguments, **keywords):
        if not gc.isenabled():  # see stages/__init__.py; what was imported stays
            gc.freeze()
            gc.enable()
        for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show must not end the run
            with suppress(AttributeError, ValueError):
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(*arguments, **keywords)
        except UserError as error:
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
            sys.exit(1)
        except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except KeyboardInterrupt:
            print("error: interrupted; run the same command again to go on", file=sys.stderr)
            sys.exit(130)
        except OSError as error:
            if error.errno is None:
                raise
            where = "".join(f" {name!r}" for name in (error.filename, error.filename2) if name)
            print(f"error: {error.strerror}{where}: refused by the operating system; fix the cause and run again",
                  file=sys.stderr)
            sys.exit(1)

    return wrapper
