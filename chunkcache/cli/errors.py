"""How the command line tells of mistakes: one line on stderr, and exit status 2."""

from __future__ import annotations

import logging
import os
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from chunkcache.errors import ChunkCacheError
from chunkcache.tokens.token_text import shown

DEBUG_VARIABLE = "CHUNKCACHE_DEBUG"


class Commands(TyperGroup):
    """Commands whose errors become one line on stderr and exit status 2; 1 is an answer.

    Tracebacks are shown only with `CHUNKCACHE_DEBUG=1`. Warnings are held back: what they say is in
    the error or in a report.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        logger = logging.getLogger("chunkcache")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            return super().invoke(ctx)
        except Exception as error:
            if isinstance(error, typer.Abort | BrokenPipeError) or hasattr(error, "exit_code"):
                raise  # typer's own, which ends these properly
            if os.environ.get(DEBUG_VARIABLE) == "1":
                traceback.print_exc()
            typer.echo(f"chunkcache: {_told(error)}", err=True)
            raise typer.Exit(2) from error
        finally:
            logger.setLevel(level)


def _told(error: Exception) -> str:
    said = shown(" ".join(str(error).split()))
    if isinstance(error, ChunkCacheError):
        return said
    return (
        f"{type(error).__name__}: {said} (a bug, please report it; {DEBUG_VARIABLE}=1 tells where)"
    )
