"""Work in a thread of its own, for which the end of the process does not wait."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def in_thread(make: Callable[[], T]) -> asyncio.Future[T]:
    """What `make` returns or raises; unlike asyncio.to_thread's, the thread is no executor's, whose threads asyncio and
    the interpreter join before they end."""
    loop = asyncio.get_running_loop()
    made: asyncio.Future[T] = loop.create_future()

    def work() -> None:
        try:
            result = make()
        except StopIteration as error:  # which a future cannot hold
            tell(made.set_exception, RuntimeError(f"{error!r} was not caught"))
        except BaseException as error:
            tell(made.set_exception, error)
        else:
            tell(made.set_result, result)

    def tell(settle: Callable[[Any], None], outcome: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(lambda: None if made.done() else settle(outcome))

    threading.Thread(target=work, daemon=True).start()
    return made
