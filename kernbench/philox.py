"""The random stream of Triton's ``tl.rand`` and ``tl.randn`` in plain PyTorch, on any device.

Philox 4x32-10 is a function of a counter (the offset) and a key (the seed), both 64 bits wide here; the upper half of
the 128-bit counter is zero. An offset of at most 32 bits fills the low word alone, so that -1 as int32 and as int64 are
two different counters. A seed counts modulo 2^64: its low half is the first word of the key.

Integers are exact: products are taken in halves of 16 bits, so that nothing overflows int64. Uniform numbers are exact
too, because a conversion and a product are each rounded once, everywhere alike. Normal numbers go through a logarithm,
a root and a cosine, which libraries round differently: see :func:`randn`.

Source: Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011, section 3.3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
"""The golden ratio and the square root of three minus one, each times 2^32."""
WORD = 0xFFFFFFFF
UNIFORM_SCALE = 4.6566127342e-10
"""Just below 2^-31, so that the largest of 2^31 integers stays below one when the product is rounded to float32."""
LEAST_UNIFORM = 1e-7
"""What the logarithm of the Box-Muller transform is given at least."""
Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor], rounds: int = ROUNDS) -> Words:
    """The block function: int64 tensors with values of 32 bits, that broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _product(c0, MULTIPLIERS[0])
        high1, low1 = _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of a product of two 32-bit words."""
    lower = word * (multiplier & 0xFFFF)
    upper = word * (multiplier >> 16) + (lower >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (lower & 0xFFFF)


def randint4x(seed: int | Tensor, offset: Tensor, rounds: int = ROUNDS) -> Words:
    """Four blocks of random int32, as ``tl.randint4x``.

    Args:
        seed: an integer, counted modulo 2^64, or an integer tensor that broadcasts against ``offset``.
        offset: integer tensor; its dtype says whether it is 32 or 64 bits wide.

    Raises:
        ValueError: ``offset`` or ``seed`` is no integer.
    """
    c0, c1, c2, c3 = _words(seed, offset, rounds)
    return _signed(c0), _signed(c1), _signed(c2), _signed(c3)


def randint(seed: int | Tensor, offset: Tensor, rounds: int = ROUNDS) -> Tensor:
    """Random int32, as ``tl.randint``; arguments and errors as of :func:`randint4x`."""
    return _signed(_words(seed, offset, rounds)[0])


def rand(seed: int | Tensor, offset: Tensor, rounds: int = ROUNDS) -> Tensor:
    """Uniform float32 in [0, 1), as ``tl.rand``; arguments and errors as of :func:`randint4x`."""
    return _uniform(randint(seed, offset, rounds))


def rand4x(seed: int | Tensor, offset: Tensor, rounds: int = ROUNDS) -> Words:
    """Four blocks of uniform float32 in [0, 1), as ``tl.rand4x``."""
    i0, i1, i2, i3 = randint4x(seed, offset, rounds)
    return _uniform(i0), _uniform(i1), _uniform(i2), _uniform(i3)


def randn(seed: int | Tensor, offset: Tensor, rounds: int = ROUNDS, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, as ``tl.randn``; other arguments and errors as of :func:`randint4x`.

    The uniform numbers behind them are Triton's to the bit. The result is not, because libraries round log and cos
    differently in the last place: it agrees within 8 ulp of max(1, |x|), in the interpreter within 4. Both round 2 pi u
    to float32 before the cosine, which near its roots puts them up to 20 ulp from the transform in float64.

    Args:
        dtype: float32, or float64 for an oracle: the transform in full precision of the same float32 uniforms.
    """
    i0, i1, _, _ = randint4x(seed, offset, rounds)
    return _box_muller(_uniform(i0), _uniform(i1), dtype)[0]


def randn4x(seed: int | Tensor, offset: Tensor, rounds: int = ROUNDS, *, dtype: torch.dtype = torch.float32) -> Words:
    """Four blocks of standard normal numbers, as ``tl.randn4x``; exact as far as :func:`randn` is."""
    u0, u1, u2, u3 = rand4x(seed, offset, rounds)
    return (*_box_muller(u0, u1, dtype), *_box_muller(u2, u3, dtype))


def _words(seed: int | Tensor, offset: Tensor, rounds: int) -> Words:
    if not _is_integer(offset):
        raise ValueError(f"Philox counts offsets in integers; they are {offset.dtype}")
    wide = offset.to(torch.int64)
    low = wide & WORD
    high = (wide >> 32) & WORD if offset.dtype.itemsize > 4 else torch.zeros_like(low)
    zero = torch.zeros_like(low)
    return philox4x32((low, high, zero, zero), _key(seed, offset.device), rounds)


def _key(seed: int | Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    if isinstance(seed, Tensor):
        if not _is_integer(seed):
            raise ValueError(f"a seed of Philox is an integer; this one is {seed.dtype}")
        wide = seed.to(device, torch.int64)
        return wide & WORD, (wide >> 32) & WORD
    low, high = seed & WORD, (seed >> 32) & WORD
    return torch.full((), low, device=device), torch.full((), high, device=device)


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _signed(word: Tensor) -> Tensor:
    """A 32-bit word in int64 as the int32 of the same bits."""
    return (word - ((word >> 31) << 32)).to(torch.int32)


def _uniform(drawn: Tensor) -> Tensor:
    """int32 as float32 in [0, 1): negative ones are mirrored by their complement."""
    positive = torch.where(drawn < 0, ~drawn, drawn).to(torch.float32)
    return positive * torch.full((), UNIFORM_SCALE, dtype=torch.float32, device=drawn.device)


def _box_muller(u1: Tensor, u2: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # The bound is a float32 in the kernel too, where both sides of the comparison are.
    u1 = u1.clamp(min=LEAST_UNIFORM).to(dtype)
    radius = (-2.0 * u1.log()).sqrt()
    angle = 2 * math.pi * u2.to(dtype)
    return radius * angle.cos(), radius * angle.sin()
