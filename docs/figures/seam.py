"""Draws what patch_model changes in a model: python docs/figures/seam.py docs/figures/seam.png"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

KEPT, CHANGED = "#dfe5ec", "#f6c667"

# name, what it is, left, bottom, width, height, changed
BOXES = [
    ("model", "GPT2LMHeadModel → PolyGPT2LMHeadModel", 0.2, 0.2, 6.0, 6.3, None),
    ("embeddings", "", 0.6, 5.2, 5.2, 0.6, False),
    ("block", "each block", 0.6, 1.3, 5.2, 3.6, None),
    ("attention", "GPT2Attention: its own forward", 0.9, 2.2, 4.6, 2.2, False),
    ("state", "polyattn: alpha, beta, gain,\ncoefficients [heads, p + 1]", 1.1, 2.45, 3.2, 0.95, True),
    ("mlp", "layer norms, MLP", 0.9, 1.5, 4.6, 0.5, False),
    ("head", "language model head", 0.6, 0.5, 5.2, 0.6, False),
    ("config", "config: model_type polyattn_gpt2,\nblock polyattn, auto_map", 6.9, 5.35, 3.9, 0.95, True),
    ("registry", 'Transformers looks up "polyattn"\nin AttentionInterface', 6.9, 3.35, 3.9, 0.95, False),
    ("function", "one attention function\nand one mask function", 6.9, 1.75, 3.9, 0.95, True),
    ("forms", "a form: cpu, fused, tiled,\nrecurrent, naive", 6.9, 0.3, 3.9, 0.95, True),
]
ARROWS = [
    ((5.5, 3.8), (6.9, 3.8)),
    ((8.85, 3.35), (8.85, 2.7)),
    ((8.85, 1.75), (8.85, 1.25)),
    ((6.9, 2.2), (4.3, 2.8)),
]


def main(path: str) -> None:
    figure, axes = plt.subplots(figsize=(9, 5.6), dpi=130)
    axes.set(xlim=(0, 11), ylim=(0, 7.2))
    axes.axis("off")
    for name, text, left, bottom, width, height, changed in BOXES:
        color = "none" if changed is None else CHANGED if changed else KEPT
        box = FancyBboxPatch(
            (left, bottom), width, height, boxstyle="round,pad=0.02", facecolor=color, edgecolor="#444"
        )
        axes.add_patch(box)
        # a box around others has its words at the top
        y, anchor = (bottom + height - 0.08, "top") if height > 1 else (bottom + height / 2, "center")
        axes.text(left + width / 2, y, text or name, ha="center", va=anchor, fontsize=9.5)
    for start, end in ARROWS:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#444", "lw": 1.2})
    axes.text(6.55, 3.85, "asks", fontsize=8, ha="center", va="bottom")
    axes.text(6.55, 2.42, "reads", fontsize=8, ha="center", va="bottom")
    for x, color, text in ((0.4, CHANGED, "ours"), (1.8, KEPT, "as it was")):
        axes.add_patch(
            FancyBboxPatch((x, 6.85), 0.25, 0.15, boxstyle="round,pad=0.02", facecolor=color, edgecolor="#444")
        )
        axes.text(x + 0.4, 6.92, text, fontsize=9, va="center")
    figure.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    main(sys.argv[1])
