"""From a text source that a user names to windows of token ids. A new source is one decorated function."""

from sparsellm.calibration import corpora, files, hub  # noqa: F401  (each registers its sources)
from sparsellm.calibration.self_generated import self_generated_windows
from sparsellm.calibration.sources import SOURCES, Split, Text, read_source
from sparsellm.calibration.windows import calibration_windows, check_seq_len, evaluation_windows

__all__ = [
    "SOURCES",
    "Split",
    "Text",
    "calibration_windows",
    "check_seq_len",
    "evaluation_windows",
    "read_source",
    "self_generated_windows",
]
