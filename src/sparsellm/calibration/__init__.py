"""Turns the text source that a user names into windows of token ids. A new source is one decorated function."""

from sparsellm.calibration import corpora, hub, text_files  # noqa: F401  (each registers its sources)
from sparsellm.calibration.given import TextGiven, as_text, settle_calibration
from sparsellm.calibration.self_generated import Author, self_generated_windows
from sparsellm.calibration.sources import SOURCES, Split, Text, check_source, read_source
from sparsellm.calibration.windows import (
    calibration_windows,
    check_seq_len,
    evaluation_windows,
    leading_token,
    windows_of_ids,
)

__all__ = [
    "SOURCES",
    "Author",
    "Split",
    "Text",
    "TextGiven",
    "as_text",
    "calibration_windows",
    "check_seq_len",
    "check_source",
    "evaluation_windows",
    "leading_token",
    "read_source",
    "self_generated_windows",
    "settle_calibration",
    "windows_of_ids",
]
