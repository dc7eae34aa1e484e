"""What the recipes share: arguments, tokens and blocks, model building, optimizer, checkpoints, tracking.

The loops themselves are written out in `recipes/`; these are the pieces that a loop would otherwise repeat.
"""
