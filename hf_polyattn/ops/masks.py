"""The keep mask: which keys each row may attend to. One rule: the mask decides everything, lengths included."""

import functools
from dataclasses import dataclass

import torch

ROWS = 1024  # of a mask that are compared at a time


@dataclass(frozen=True)
class Masking:
    """All restrictions of one call, as `build_keep` takes them, and whether they come down to a choice of keys."""

    shape: tuple[int, int]
    keep: torch.Tensor | None = None
    is_causal: bool = False
    key_lengths: torch.Tensor | None = None
    sliding_window: int | None = None

    @functools.cached_property
    def by_key(self) -> "tuple[bool, torch.Tensor | None] | str":
        """(is_causal, bool [B or 1, S] or None: the keys that are kept), or why the rows differ in more than that.

        A mask of T rows is read, and its values decide: that of a padded causal batch is such a product.
        """
        queries, keys = self.shape
        if self.sliding_window is not None and self.sliding_window < max(queries, keys):
            return "rows have a sliding window"
        is_causal, kept = self.is_causal, None
        if self.keep is not None:
            keep = unexpand(self.keep)
            if keep.shape[1] > 1:
                return "the keep mask differs between heads"
            keep = keep[:, 0].expand(-1, -1, keys)
            kept = keep[:, -1] if keep.shape[1] else None
            if kept is not None and keep.shape[1] > 1:
                shapes = [shape for shape in (True, False) if _is_product(keep, kept, shape)]
                if not shapes:
                    return "its rows differ in more than the causal order and the keys that are padding"
                is_causal = is_causal or shapes[0]
        if self.key_lengths is not None:
            lengths = self.key_lengths if kept is None else self.key_lengths.to(kept.device)
            there = torch.arange(keys, device=lengths.device) < lengths[:, None]
            kept = there if kept is None else kept & there
        return is_causal, kept


def _is_product(keep: torch.Tensor, kept: torch.Tensor, is_causal: bool) -> bool:
    """Whether keep [B, T, S] is kept [B, S] in every row, up to the row's position where causal."""
    queries, keys = keep.shape[1:]
    columns = torch.arange(keys, device=keep.device)
    for start in range(0, queries, ROWS):
        rows = torch.arange(start, min(start + ROWS, queries), device=keep.device)[:, None]
        expected = kept[:, None] & (columns <= rows + (keys - queries)) if is_causal else kept[:, None]
        block = keep[:, start : start + ROWS]
        if not torch.equal(block, expected.expand_as(block)):
            return False
    return True


def unexpand(x: torch.Tensor) -> torch.Tensor:
    """Four dimensions, those of stride 0 back to size 1: an expanded mask is one row, not many."""
    x = x[(None,) * (4 - x.ndim)]
    for dim in range(4):
        if x.stride(dim) == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x


def build_keep(
    shape: tuple[int, int],
    device: torch.device,
    *,
    keep: torch.Tensor | None = None,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Joins all restrictions into one bool mask broadcastable to [B, H, T, S]; True = may attend.

    Args:
        shape: (T, S). Row i stands at position S - T + i, so that a block of new queries ends where the keys end.
        keep: bool, broadcastable to [B, H, T, S].
        key_lengths: [B] integers; keys from that index on are padding.
        sliding_window: keys at a distance of that many positions or more are out of reach.
    """
    queries, keys = shape
    rows = torch.arange(queries, device=device)[:, None] + (keys - queries)
    columns = torch.arange(keys, device=device)[None, :]
    keep = torch.ones((), dtype=torch.bool, device=device) if keep is None else keep
    # as wide as the keys, so that its sum is the row length
    out = keep.expand(torch.broadcast_shapes(keep.shape, (1, 1, 1, keys)))
    if is_causal:
        out = out & (columns <= rows)
    if sliding_window is not None:
        out = out & ((rows - columns).abs() < sliding_window)
    if key_lengths is not None:
        out = out & (columns < key_lengths.to(device).view(-1, 1, 1, 1))
    return out


def split_mask(mask: torch.Tensor, masked_below: float = -9e3) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Reads any mask that people pass: (keep, bias).

    bool: True = may attend. Integers: non-zero = may attend. Floats are additive: -inf, finfo.min of any dtype and the
    old -10000 (-9984 in bf16) all mean "may not"; what lies above is a bias on the score, returned when there is any.
    """
    if mask.dtype == torch.bool:
        return mask, None
    if not mask.is_floating_point():
        return mask != 0, None
    keep = mask > masked_below
    bias = mask.masked_fill(~keep, 0)
    if not torch.compiler.is_compiling() and not bias.any():
        return keep, None
    return keep, bias
