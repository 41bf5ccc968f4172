"""What every command shares: one clear line for bad input, exit code 2, a traceback only with --debug."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from .errors import EfficientLLMError

NOISY_LOGGERS = ("torchao", "torch.utils._pytree")
"""transformers imports torchao where it is installed, which then warns of CUDA libraries that a CPU build lacks."""


def run_command(body: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run `body(argv)`; an EfficientLLMError or an OS error becomes one line on stderr and exit code 2.

    `--debug`, accepted by every command, is taken out of argv and lets the traceback through.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    for name in () if debug else NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return body(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except (EfficientLLMError, OSError) as error:
        if debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
