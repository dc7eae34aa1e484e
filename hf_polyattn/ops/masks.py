"""The keep mask: which keys each row may attend to. One rule: the mask decides everything, lengths included."""

import torch


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
