"""How the command line tells of mistakes: one line on stderr, and exit status 2."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from chunkcache.errors import ChunkCacheError


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn chunkcache's errors into one line on stderr and exit status 2.

    Its warnings are held back meanwhile: what they say is in the error or in a report.
    """
    logger = logging.getLogger("chunkcache")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except ChunkCacheError as error:
        typer.echo(f"chunkcache: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error
    finally:
        logger.setLevel(level)
