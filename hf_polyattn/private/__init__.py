"""Private inference: attention that an encrypted evaluator can compute, of additions and multiplications only.

For models evaluated under homomorphic encryption or secure multiparty computation, where exp, max, comparisons and
divisions are what is expensive. See docs/private_inference.md.
"""

from .compute import computing_privately, export_attention
from .graph import Depth, check_graph, depth_of, operations
from .mode import make_private
from .operation import PrivateAttention
from .penalty import score_range_penalty
from .report import PrivateReport, private_report

__all__ = [
    "Depth",
    "PrivateAttention",
    "PrivateReport",
    "check_graph",
    "computing_privately",
    "depth_of",
    "export_attention",
    "make_private",
    "operations",
    "private_report",
    "score_range_penalty",
]
