"""What the package's commands share when they are run from a shell."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

__all__ = ["run"]


def run(main: Callable[[], int]) -> NoReturn:
    """Leave with the exit code that ``main`` returns. A reader who has seen enough, as in ``| head``, is no error."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still wants to say on leaving
        code = 0
    sys.exit(code)
