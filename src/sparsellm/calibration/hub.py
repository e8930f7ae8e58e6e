"""Text from the Hugging Face Hub, through the optional package ``datasets``. No code from the Hub is run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsellm.calibration.sources import SOURCES, Split, Text
from sparsellm.errors import DataError, one_line, shown


@SOURCES.register("hub", paper="https://huggingface.co/docs/datasets")
def read_hub(argument: str, split: Split) -> Text:
    """Any data set with a column 'text', as hub:owner/name[:config[:split]]; by default split train, or test.

    A named split is used for calibration and evaluation alike, so name different ones for the two.

    Raises:
        DataError: see :func:`hub_column`; or no data set is named.
    """
    name, _, rest = argument.partition(":")
    config, _, chosen = rest.partition(":")
    if not name or ":" in chosen:
        raise DataError(f"source {shown(f'hub:{argument}')} names no data set; write hub:owner/name[:config[:split]]")
    default = "train" if split == "calibration" else "test"
    return Text(hub_column(f"hub:{argument}", name, config or None, split=chosen or default))


def hub_column(source: str, *arguments: Any, column: str = "text", **settings: Any) -> Sequence[str]:
    """One column of a data set; the other arguments are those of ``datasets.load_dataset``.

    Args:
        source: the source string that the user typed, for error messages.

    Raises:
        DataError: ``datasets`` is not installed, the data set cannot be loaded, or it has no such column.
    """
    instead = "or give a file of your own (.txt, .jsonl, .parquet), or 'pydoc', which needs no download"
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"source {source!r} needs the package 'datasets': pip install 'sparsellm[hub]', {instead}"
        ) from error
    try:
        data = datasets.load_dataset(*arguments, **settings)
    except Exception as error:  # errors of network, Hub and format, from several packages without a common base class
        raise DataError(
            f"source {source!r} cannot be loaded: {one_line(error)}; check name and network, {instead}"
        ) from error
    if column not in data.column_names:
        raise DataError(f"source {source!r} has no column {column!r}; its columns: {', '.join(data.column_names)}")
    texts: Sequence[str] = data[column]
    return texts
