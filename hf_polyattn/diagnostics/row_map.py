"""The map from the scores of a row to its weights, and the size of its Jacobian, in closed form.

    a_j = g v_j / Z        v_j = phi(alpha s_j + beta)        j: the n keys that the row keeps

Where Z does not depend on the scores (`length`, `sqrt_length`, `none`, a number) the Jacobian da_j / ds_k is diagonal.
Under `sum`, `l1` and `l2` it is a diagonal minus a product of two vectors,

    J_jk = g (u_j [j = k] - w_j z_k)        u = v' / Z        w = v / Z        z_k = (dZ / ds_k) / Z
    ‖J‖_F^2 = g^2 (sum_j u_j^2 - 2 sum_j u_j w_j z_j + sum_j w_j^2 sum_k z_k^2)

so its Frobenius norm costs no more than the weights themselves, at any length. Softmax is phi = exp under `sum`:
J = diag(a) - a a'.
"""

from dataclasses import dataclass

import torch

from ..activations import Phi, get_activation, horner, power
from ..ops.normalization import NORMALIZED, row_scale
from ..state import PolyAttentionState


@dataclass(frozen=True)
class Rows:
    """What a row map makes of scores [B, H, T, S]."""

    weights: torch.Tensor
    """a_ij, [B, H, T, S], 0 at masked keys."""
    slopes: torch.Tensor
    """da_ij / ds_ij, the diagonal of each row's Jacobian, [B, H, T, S]."""
    jacobian_squares: torch.Tensor
    """‖da_i / ds_i‖_F^2 of each row, [B, H, T]."""
    lengths: torch.Tensor
    """n_i >= 1, broadcastable to [B, H, T, 1]."""


@dataclass(frozen=True)
class RowMap:
    """Scores -> weights of some heads, as `ops.naive` defines it.

    phi: of (scores, row lengths); None for a polynomial. coefficients: [H, p + 1]; None for a bare power. gain, alpha,
    beta: [H], or None for 1, 1 and 0. exponential: subtract the row's maximum first. qk_norm: whether queries and keys
    are normalised before they become scores; `__call__` does not read it.
    """

    phi: Phi | None = None
    degree: int = 1
    coefficients: torch.Tensor | None = None
    normalization: str | float = "sqrt_length"
    gain: torch.Tensor | None = None
    alpha: torch.Tensor | None = None
    beta: torch.Tensor | None = None
    exponential: bool = False
    qk_norm: bool = False

    @classmethod
    def softmax(cls) -> "RowMap":
        return cls(get_activation("softmax").phi, normalization="sum", exponential=True)

    @classmethod
    def of_state(cls, state: PolyAttentionState) -> "RowMap":
        """That of the patched heads of one attention module."""
        config, activation = state.config, state.activation
        return cls(
            activation.phi,
            config.degree,
            state.coefficients.detach() if state.has_coefficients else None,
            config.normalization,
            state.gain.detach(),
            state.alpha.detach(),
            state.beta.detach(),
            activation.exponential,
            config.qk_norm,
        )

    @torch.no_grad()
    def __call__(self, scores: torch.Tensor, keep: torch.Tensor | None = None) -> Rows:
        """Weights and Jacobian of scores [B, H, T, S].

        keep: bool, broadcastable to the scores and as wide as they are; None: all.
        """
        if keep is None:
            keep = torch.ones(1, 1, 1, scores.shape[-1], dtype=torch.bool, device=scores.device)
        alpha = 1.0 if self.alpha is None else self.alpha.to(scores.dtype).view(-1, 1, 1)
        gain = 1.0 if self.gain is None else self.gain.to(scores.dtype).view(-1, 1, 1)
        if self.alpha is not None:
            scores = scores * alpha
        if self.beta is not None:
            scores = scores + self.beta.to(scores.dtype).view(-1, 1, 1)
        # the order of ops.naive: masked scores must not reach phi
        scores = scores.masked_fill(~keep, -1e30 if self.exponential else 0)
        if self.exponential and scores.shape[-1]:
            scores = scores - scores.amax(-1, keepdim=True)
        lengths = keep.sum(-1, keepdim=True).clamp(min=1)
        values, slopes = (x.masked_fill(~keep, 0) for x in self._values_and_slopes(scores, lengths))
        scale = row_scale(values, lengths, self.normalization)
        w, u = values / scale, alpha * slopes / scale
        if self.normalization not in NORMALIZED:
            slopes = gain * u
            return Rows(gain * w, slopes, slopes.square().sum(-1), lengths)
        match self.normalization:
            case "sum":
                z = u
            case "l1":
                z = values.sign() * u
            case _:
                z = w * u
        diagonal = u - w * z
        # the terms off the diagonal, w_j z_k for j != k, are added as squares: nothing cancels
        off = (w.square().sum(-1) * z.square().sum(-1) - (w * z).square().sum(-1)).clamp(min=0)
        squares = diagonal.square().sum(-1) + off
        if self.gain is not None:
            squares = squares * gain.square().squeeze(-1)  # type: ignore[union-attr]
        return Rows(gain * w, gain * diagonal, squares, lengths)

    def _values_and_slopes(self, scores: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """phi(x) and phi'(x)."""
        if self.exponential:
            assert self.phi is not None
            values = self.phi(scores, lengths)
            return values, values
        if self.phi is not None:
            # a registered function has no derivative of its own; it is element-wise, so one sum gives all of them
            with torch.enable_grad():
                leaf = scores.detach().requires_grad_()
                values = self.phi(leaf, lengths)
                (slopes,) = torch.autograd.grad(values.sum(), leaf)
            return values.detach(), slopes
        if self.coefficients is not None:
            powers = torch.arange(self.coefficients.shape[1], device=scores.device)
            derivative = (self.coefficients * powers)[:, 1:]
            return horner(scores, self.coefficients), horner(scores, derivative)
        slopes = self.degree * power(scores, self.degree - 1) if self.degree > 1 else torch.ones_like(scores)
        return power(scores, self.degree), slopes
