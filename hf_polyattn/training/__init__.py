"""What the recipes share: tokens and blocks, model building, optimizer, checkpoints, tracking.

The loops themselves are written out in `recipes/`; these are the pieces that a loop would otherwise repeat.
Conversion, evaluation and the commands take some of them too. The arguments are in `hf_polyattn_arguments`.
"""
