"""What a checkpoint is worth: loss on a text, metrics on labelled rows, tasks of the evaluation harness."""

from .scores import Evaluation, Score, difference

__all__ = ["Evaluation", "Score", "difference"]
