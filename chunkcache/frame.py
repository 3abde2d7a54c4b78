"""Rows of a report as a pandas DataFrame, for those who have pandas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas


def data_frame(rows: Sequence[Any], columns: Sequence[str]) -> pandas.DataFrame:
    """The rows, under these columns even if there are none.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_dataframe() needs the package pandas: pip install pandas") from error
    return pandas.DataFrame(rows, columns=list(columns))
