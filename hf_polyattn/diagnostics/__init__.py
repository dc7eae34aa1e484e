"""What the attention of a model looks like on real inputs, patched or not.

`attention_statistics` measures every head in one pass and never holds the weights of more than a block of rows;
`weight_norms` is ‖A‖_F / sqrt(N) alone, from the weights that the model returns.
"""

from .figure import draw_heads, draw_statistics
from .measuring import attention_statistics
from .norms import weight_norms
from .report import AttentionReport, read_reports
from .row_map import RowMap
from .statistics import STATISTICS

__all__ = [
    "STATISTICS",
    "AttentionReport",
    "RowMap",
    "attention_statistics",
    "draw_heads",
    "draw_statistics",
    "read_reports",
    "weight_norms",
]
