"""The child module `polyattn` of a patched attention module: its tensors, how they start, what it computes."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .activations import check_activation, default_start, frobenius_gain, start_gain
from .config import PolyAttentionConfig
from .ops import NORMALIZED, attend, rms_normalize
from .ops.masks import build_keep
from .ops.one_row import attend_row
from .ops.recurrent import Past, absorb, new_past

_NAMES = {"alpha", "beta", "gain"}


class PolyAttentionState(nn.Module):
    """Holds alpha, beta, gain [heads] and coefficients [heads, degree + 1]; computes the attention of one module.

    A tensor is a Parameter when the config says it is learned and a persistent buffer otherwise, so that either kind
    travels in the checkpoint. `heads` counts the patched heads only; the other heads of the module stay softmax.

    Args:
        config: what to compute.
        num_heads: query heads of the host module.
        chosen: indices of the patched heads, None for all.
        spread: expected root mean square of the host's scores before training; see `analytic_alpha`.
        like: dtype and device of the host's parameters.
    """

    alpha: torch.Tensor
    beta: torch.Tensor
    gain: torch.Tensor
    coefficients: torch.Tensor
    """Not there when phi has none; see `has_coefficients`."""

    def __init__(
        self,
        config: PolyAttentionConfig,
        num_heads: int,
        *,
        chosen: tuple[int, ...] | None = None,
        spread: float = 1.0,
        like: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.activation = check_activation(config)
        self.num_heads = num_heads
        self.chosen = chosen
        self.rest = tuple(h for h in range(num_heads) if h not in (chosen or range(num_heads)))
        self.spread = spread
        # calibration puts a function of the same signature as `_attend` here while it measures
        self.observer: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] | None = None
        # see `_attend_row`: the config that the plan was made for, and what it says
        self._row_config: PolyAttentionConfig | None = None
        self._row_plan = (False, False, False)
        heads = num_heads if chosen is None else len(chosen)
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device} if like is not None else {}
        for name, learned in (
            ("alpha", config.learn_affine),
            ("beta", config.learn_affine),
            ("gain", config.learn_gain),
        ):
            self._put(name, torch.empty(heads, **options), learned)
        if self.has_coefficients:
            start = torch.empty(heads, config.degree + 1, **options)
            self._put("coefficients", start, config.coefficients == "learnable")
        self.reset_parameters()

    def _put(self, name: str, tensor: torch.Tensor, learned: bool) -> None:
        if learned:
            self.register_parameter(name, nn.Parameter(tensor))
        else:
            self.register_buffer(name, tensor)

    @property
    def heads(self) -> tuple[int, ...]:
        """Indices of the patched heads, in the order of the tensors' rows."""
        return self.chosen if self.chosen is not None else tuple(range(self.num_heads))

    @property
    def has_coefficients(self) -> bool:
        return self.activation.is_polynomial and self.config.coefficients != "monomial"

    @property
    def found(self) -> list[str]:
        """Names of the tensors that training or calibration may have moved off what the config says."""
        config = self.config
        may_have = {
            "coefficients": self.has_coefficients and config.coefficients == "learnable",
            "alpha": config.learn_affine or config.alpha == "auto",
            "beta": config.learn_affine,
            "gain": config.learn_gain or config.gain == "auto",
        }
        return [name for name, may in may_have.items() if may]

    @property
    def is_plain_power(self) -> bool:
        """Whether phi is a bare s^p of an unshifted score; beta is not read then."""
        config = self.config
        fixed_shift = config.beta == 0 and not config.learn_affine
        bare = self.activation.is_polynomial and not self.has_coefficients
        return bare and fixed_shift and config.normalization not in NORMALIZED

    @property
    def _unscaled(self) -> bool:
        config = self.config
        return (config.alpha, config.beta, config.gain) == (1, 0, 1) and not (config.learn_gain or config.learn_affine)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The documented start: `analytic_alpha`, `analytic_gain`, `default_start` coefficients.

        Goes through Transformers' guarded init functions, so that what a checkpoint has loaded is left alone.
        """
        config = self.config
        alpha = self.analytic_alpha() if config.alpha == "auto" else config.alpha
        gain = self.analytic_gain() if config.gain == "auto" else config.gain
        init.constant_(self.alpha, alpha)
        init.constant_(self.beta, config.beta)
        init.constant_(self.gain, gain)
        if self.has_coefficients:
            row = torch.tensor(self.start, dtype=self.coefficients.dtype, device=self.coefficients.device)
            init.copy_(self.coefficients, row.expand_as(self.coefficients))

    @property
    def start(self) -> tuple[float, ...]:
        """c_0 ... c_p before training."""
        config = self.config
        if not isinstance(config.coefficients, str):
            return config.coefficients
        return config.init_coefficients or default_start(config.degree)

    @torch.no_grad()
    def keep(self, old: "PolyAttentionState", *, calibrated: bool) -> set[str]:
        """Takes the numbers that mean the same here from an earlier state of the same module, head by head.

        Coefficients of the same activation and the same start; alpha, beta and gain of the same function, where the
        config does not name another value. calibrated: what is "auto" will be measured, and is not taken.

        Returns:
            the names of the tensors that were taken.
        """
        config, before = self.config, old.config
        names = []
        if config.computes_like(before):
            names = [name for name in ("alpha", "beta", "gain") if getattr(config, name) == getattr(before, name)]
            names = [name for name in names if not (calibrated and getattr(config, name) == "auto")]
        same = config.activation == before.activation and config.coefficients == before.coefficients
        if same and self.has_coefficients and self.start == old.start:
            names.append("coefficients")
        mine, theirs = self.heads, old.heads
        common = [head for head in mine if head in theirs]
        for name in names:
            tensor, source = getattr(self, name), getattr(old, name)
            tensor[[mine.index(head) for head in common]] = source[[theirs.index(head) for head in common]].to(tensor)
        return set(names)

    @torch.no_grad()
    def reuse_parameters(self, old: "PolyAttentionState") -> None:
        """Puts the numbers of this state into the Parameters of an earlier one of the same module, where they fit.

        An optimizer, and whoever else holds these Parameters, goes on with the model then.
        """
        for name, mine in list(self.named_parameters(recurse=False)):
            theirs = old._parameters.get(name)
            if theirs is None or (theirs.shape, theirs.dtype, theirs.device) != (mine.shape, mine.dtype, mine.device):
                continue
            theirs.copy_(mine)
            self.register_parameter(name, theirs)

    def analytic_alpha(self) -> float:
        """One over the root of the spread; under "sqrt_length" over the whole, for the scores `analytic_gain` assumes.

        `docs/definition.md` says why. Calibration puts one over the measured spread in its place.
        """
        return 1 / self.spread if self.config.normalization == "sqrt_length" else self.spread**-0.5

    def analytic_gain(self) -> float:
        """What makes ‖A‖_F^2 = N for unit Gaussian scores under "sqrt_length"; 1 elsewhere and for given coefficients.

        Under "length" the start of learnable coefficients has rows that sum to 1 already where the scores that phi
        sees have a spread of 1.
        """
        config = self.config
        if config.normalization != "sqrt_length" or not self.activation.is_polynomial:
            return 1.0
        if not self.has_coefficients:
            return frobenius_gain(config.degree)
        default = config.coefficients == "learnable" and config.init_coefficients is None
        return start_gain(config.degree) if default else 1.0

    def forward(
        self,
        query: torch.Tensor,  # [B, H, T, D]
        key: torch.Tensor,  # [B, Hk, S, D]
        value: torch.Tensor,  # [B, Hk, S, Dv]
        *,
        keep: torch.Tensor | None,
        bias: torch.Tensor | None,
        is_causal: bool,
        scaling: float,
        dropout: float,
        softcap: float | None = None,
        sliding_window: int | None = None,
        return_weights: bool = False,
        past: Past | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the output [B, H, T, Dv] and, when asked for, the weights [B, H, T, S].

        past: keys before these, summed up; takes these in. For modules without softmax heads.
        """
        special = dropout or return_weights or bias is not None or softcap is not None or past is not None
        plain = self.observer is self.chosen is None and not torch.compiler.is_compiling()
        if query.shape[2] == 1 and plain and not special:
            row = self._attend_row(query, key, value, keep, scaling, sliding_window)
            if row is not None:
                return row, None
        masking: dict[str, Any] = {
            "keep": keep,
            "bias": bias,
            "is_causal": is_causal,
            "sliding_window": sliding_window,
        }
        masking |= {"scaling": scaling, "dropout": dropout, "softcap": softcap, "return_weights": return_weights}
        polynomial = self._attend if self.observer is None else self.observer
        if past is not None:
            return self._attend(query, key, value, past=past, **masking)
        if self.chosen is None:
            return polynomial(query, key, value, **masking)
        parts = []
        for heads, compute in ((self.chosen, polynomial), (self.rest, softmax_attention)):
            index = torch.tensor(heads, device=query.device)
            shared = index // (query.shape[1] // key.shape[1])
            masking |= {"keep": _pick(keep, index), "bias": _pick(bias, index)}
            parts.append(compute(query[:, index], key[:, shared], value[:, shared], **masking))
        back = torch.tensor((*self.chosen, *self.rest), device=query.device).argsort()
        outputs, weights = zip(*parts, strict=True)
        return torch.cat(outputs, 1)[:, back], torch.cat(weights, 1)[:, back] if return_weights else None

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, return_weights: bool, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        config = self.config
        gain, affine = self.gain, (self.alpha, self.beta) if not self.is_plain_power else None
        if self.is_plain_power:
            # (alpha s)^p = alpha^p s^p: kernels then take their bare power, without an affine score; wide, because
            # alpha^p leaves float16's range long before the weights do
            wide = torch.promote_types(gain.dtype, torch.float32)
            gain = gain.to(wide) * self.alpha.to(wide) ** config.degree
        if config.activation == "softmax" and self._unscaled:
            if config.qk_norm:
                query, key = rms_normalize(query), rms_normalize(key)
            return softmax_attention(query, key, value, return_weights=return_weights, **options)
        polynomial = self.activation.is_polynomial
        out = attend(
            query,
            key,
            value,
            degree=config.degree if polynomial and not self.has_coefficients else None,
            coefficients=self.coefficients if self.has_coefficients else None,
            phi=self.activation.phi,
            exponential=self.activation.exponential,
            normalization=config.normalization,
            gain=gain,
            affine=affine,
            qk_norm=config.qk_norm,
            backend=config.backend,
            return_weights=return_weights,
            **options,
        )
        return out if isinstance(out, tuple) else (out, None)

    def _attend_row(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keep: torch.Tensor | None,
        scaling: float,
        sliding_window: int | None,
    ) -> torch.Tensor | None:
        """A decoding step as `_attend` computes it, without what that has to decide; None where it must decide."""
        config = self.config
        if self._row_config is not config:
            # read once: these properties take longer than a short step
            able = self.activation.is_polynomial and not config.qk_norm and config.backend in ("auto", "cpu")
            self._row_plan = (able, self.has_coefficients, not self.is_plain_power)
            self._row_config = config
        able, has_coefficients, has_shift = self._row_plan
        # not as attributes, each of which takes a module half a microsecond to find
        tensors = self._buffers | self._parameters
        if not able or not tensors.keys() >= _NAMES:
            return None
        return attend_row(
            query,
            key,
            value,
            degree=config.degree,
            coefficients=tensors["coefficients"] if has_coefficients else None,
            alpha=tensors["alpha"],
            beta=tensors["beta"] if has_shift else None,
            gain=tensors["gain"],
            normalization=config.normalization,
            scaling=scaling,
            keep=keep,
            sliding_window=sliding_window,
        )

    @property
    def has_all_powers(self) -> bool:
        """Whether the polynomial that the operation sees has all powers of the score, up to the degree."""
        return not self.is_plain_power

    @torch.no_grad()
    def past_of(self, key: torch.Tensor, value: torch.Tensor, key_keep: torch.Tensor | None) -> Past:
        """What keys [B, Hk, S, D] and values leave behind; key_keep: bool [B or 1, S], None = all."""
        config = self.config
        if config.qk_norm:
            key = rms_normalize(key)
        polynomial: dict[str, Any] = {"degree": config.degree, "has_coefficients": self.has_all_powers}
        past = new_past(key, value, normalization=config.normalization, **polynomial)
        absorb(past, key, value, key_keep=key_keep, **polynomial)
        return past

    def extra_repr(self) -> str:
        config = self.config
        heads = f"{self.num_heads}" if self.chosen is None else f"{list(self.chosen)} of {self.num_heads}"
        return f"{config.activation}, degree={config.degree}, normalization={config.normalization}, heads={heads}"


def softmax_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    keep: torch.Tensor | None,
    bias: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
    dropout: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    return_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What heads and layers outside the patch compute: torch's SDPA, or the same written out where SDPA cannot.

    Rows that may attend to nothing give 0, as everywhere here.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    plain = not return_weights and softcap is None and bias is None
    if plain and sliding_window is None:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=keep, dropout_p=dropout, is_causal=is_causal, scale=scaling
        )
        return out, None
    shape = (query.shape[2], key.shape[2])
    keep = build_keep(shape, query.device, keep=keep, is_causal=is_causal, sliding_window=sliding_window)
    if plain:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=keep, dropout_p=dropout, scale=scaling)
        return out, None
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = scaling * (query.to(wide) @ key.to(wide).transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(wide)
    weights = scores.masked_fill(~keep, -torch.inf).softmax(-1).masked_fill(~keep, 0)
    out = F.dropout(weights, dropout) @ value.to(wide)
    return out.to(query.dtype), weights.to(query.dtype) if return_weights else None


def _pick(mask: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
    """The rows of a mask that belong to some heads; masks shared by all heads stay as they are."""
    return mask if mask is None or mask.ndim < 4 or mask.shape[1] == 1 else mask[:, index]
