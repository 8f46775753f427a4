"""Values that hurt: what a tensor may be filled with so that overflow, ties, cancellation or a lost NaN show.

A pattern takes what ``make_inputs`` drew and a generator, and returns a tensor of the same shape and dtype. Where it
can it keeps the drawn signs and ratios, so that a domain such as "positive" stays what it was. Equal values are short
in binary: their sums are exact in every order, and what differs between two kernels is then an error, not rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from kernbench.spec import Values

Pattern = Callable[[Tensor, torch.Generator], Tensor]
PLAIN = "as drawn"


def _as_drawn(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return tensor.clone()


def _zeros(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.zeros_like(tensor)


def _negative_zeros(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.full_like(tensor, -0.0)


def _all_equal(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """The first element, cut to three significant bits, everywhere."""
    return _short(tensor.reshape(-1)[:1]).expand(tensor.numel()).reshape(tensor.shape).to(tensor.dtype)


def _tied(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Signed powers of two of the drawn numbers, four sizes at most: every value occurs many times."""
    peak = _peak(tensor)
    if peak == 0.0:
        return tensor.clone()
    top = math.floor(math.log2(peak))
    exponents = tensor.double().abs().clamp(min=2.0 ** (top - 3)).log2().floor()
    return _fitting(tensor.double().sign() * exponents.exp2(), tensor.dtype)


def _alternating(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Each number at an odd place is the one before it with the other sign, so that sums cancel."""
    flat = tensor.clone().reshape(-1)
    odd = flat[1::2]
    odd.copy_(-flat[0::2][: odd.numel()])
    return flat.reshape(tensor.shape)


def _one_huge(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """One element is as large as the others would have to be for their squares to be lost beside it."""
    factor = 2.0 / torch.finfo(tensor.dtype).eps if tensor.dtype != torch.float16 else 2.0**9
    return _at_one_place(tensor, generator, lambda drawn: drawn * factor)


def _peak_at(exponent: Callable[[torch.dtype], float]) -> Pattern:
    """The drawn numbers times what puts the largest at two to the ``exponent`` of the dtype."""

    def scale(tensor: Tensor, generator: torch.Generator) -> Tensor:
        peak = _peak(tensor)
        return _fitting(tensor.double() * (2.0 ** exponent(tensor.dtype) / peak if peak else 0.0), tensor.dtype)

    return scale


def _placed(*values: float) -> Pattern:
    """The drawn numbers but for one place for each of ``values``, as far as there are places."""

    def place(tensor: Tensor, generator: torch.Generator) -> Tensor:
        flat = tensor.clone().reshape(-1)
        places = torch.randperm(flat.numel(), generator=generator)[: len(values)].to(flat.device)
        flat[places] = torch.tensor(values, dtype=tensor.dtype, device=tensor.device)[: len(places)]
        return flat.reshape(tensor.shape)

    return place


def _largest_exponent(dtype: torch.dtype) -> float:
    return round(math.log2(torch.finfo(dtype).max))


def _smallest_exponent(dtype: torch.dtype) -> float:
    return round(math.log2(torch.finfo(dtype).tiny))


FINITE: Mapping[str, Pattern] = MappingProxyType(
    {
        PLAIN: _as_drawn,
        "zero": _zeros,
        "all equal": _all_equal,
        "tied": _tied,
        "alternating": _alternating,
        "with one huge element": _one_huge,
        # Squares of these still fit, those of huge ones do not; sums of the ones near the largest do not either.
        "large": _peak_at(lambda dtype: 7 * _largest_exponent(dtype) // 16),
        "huge": _peak_at(lambda dtype: 9 * _largest_exponent(dtype) // 16),
        "near overflow": _peak_at(lambda dtype: _largest_exponent(dtype) - 1),
        "tiny": _peak_at(lambda dtype: _smallest_exponent(dtype) + 4),
        "subnormal": _peak_at(lambda dtype: _smallest_exponent(dtype) - 2),
        "negative zero": _negative_zeros,
    }
)
"""Patterns that any argument takes, simplest first."""
EXTREME = frozenset({"large", "huge", "near overflow", "tiny", "subnormal", "with one huge element"})
"""Patterns near the ends of a dtype, where two right ways of computing may overflow or underflow at other places."""
NONFINITE: Mapping[str, Pattern] = MappingProxyType(
    {
        "with a NaN": _placed(math.nan),
        "with an infinity": _placed(math.inf),
        "with both infinities and a NaN": _placed(math.inf, -math.inf, math.nan),
    }
)
"""Patterns for arguments whose contract speaks of NaN and infinities."""
PATTERNS: Mapping[str, Pattern] = MappingProxyType({**FINITE, **NONFINITE})


def names_for(values: Values) -> tuple[str, ...]:
    """The patterns that an argument declared so takes, simplest first."""
    if values.fixed:
        return (PLAIN,)
    return (*FINITE, *NONFINITE) if values.nonfinite else tuple(FINITE)


def fill(tensor: Tensor, name: str, values: Values, generator: torch.Generator) -> Tensor:
    """A copy of a floating tensor with a pattern's values, inside the bounds that the declaration gives."""
    drawn = tensor.detach()
    if values.fixed or drawn.numel() == 0:
        return drawn.clone()
    filled = PATTERNS[name](drawn.contiguous(), generator)
    # In float64, because a bound may be beyond a short dtype.
    bounded = _fitting(filled.double().clamp(min=values.least, max=values.most), drawn.dtype)
    if drawn.dtype == torch.bfloat16 and not drawn.is_cuda:
        # The interpreter of Triton 3.9 casts subnormal bfloat16 numbers to quite other ones.
        bounded = torch.where(bounded.abs() < torch.finfo(drawn.dtype).tiny, 0.0, bounded)
    return torch.where(filled.isfinite(), bounded, filled)


def _at_one_place(tensor: Tensor, generator: torch.Generator, change: Callable[[Tensor], Tensor]) -> Tensor:
    flat = tensor.clone().reshape(-1)
    place = int(torch.randint(flat.numel(), (), generator=generator))
    flat[place] = _fitting(change(flat[place].double()), tensor.dtype)
    return flat.reshape(tensor.shape)


def _short(number: Tensor) -> Tensor:
    """Numbers cut to three significant bits."""
    mantissa, exponent = torch.frexp(number.double())
    return torch.ldexp((mantissa * 8).trunc() / 8, exponent)


def _peak(tensor: Tensor) -> float:
    return float(torch.where(tensor.isfinite(), tensor, 0.0).abs().max()) if tensor.numel() else 0.0


def _fitting(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 numbers in ``dtype``, none of which becomes an infinity."""
    largest = torch.finfo(dtype).max
    return numbers.clamp(min=-largest, max=largest).to(dtype)
