"""The Philox stream in PyTorch against published vectors, against plain integers, and against Triton itself."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from torch import Tensor

from kernbench import device, philox

DEVICE = device.resolve("auto")
SEEDS = (0, 1, 7, -1, 2**31 - 1, 2**31, -(2**31), 2**40 + 3, 2**63 - 1, -(2**63))
ULP = 2.0**-23

# The known answers of philox4x32-10 in the Random123 library: counter, key, output.
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


def plain_philox(counter: tuple[int, ...], key: tuple[int, ...], rounds: int = 10) -> tuple[int, ...]:
    """The block function as the paper writes it, on Python's integers."""
    left, right = counter[1], counter[3]
    x, z = counter[0], counter[2]
    for index in range(rounds):
        key0 = (key[0] + index * 0x9E3779B9) % 2**32
        key1 = (key[1] + index * 0xBB67AE85) % 2**32
        high0, low0 = divmod(0xD2511F53 * x, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * z, 2**32)
        x, left, z, right = high1 ^ left ^ key0, low1, high0 ^ right ^ key1, low0
    return x, left, z, right


def words(values: tuple[int, ...]) -> list[Tensor]:
    return [torch.tensor([value]) for value in values]


def block(counter: tuple[int, ...], key: tuple[int, ...], rounds: int = 10) -> tuple[int, ...]:
    c0, c1, c2, c3 = words(counter)
    k0, k1 = words(key)
    return tuple(int(word) for word in philox.philox4x32((c0, c1, c2, c3), (k0, k1), rounds))


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]) -> None:
    assert plain_philox(counter, key) == answer
    assert block(counter, key) == answer


@pytest.mark.parametrize("rounds", [1, 7, 10])
def test_random_words_equal_plain_integers(rounds: int) -> None:
    drawn = torch.randint(2**32, (50, 6), generator=torch.Generator().manual_seed(rounds)).tolist()
    for row in drawn:
        assert block(tuple(row[:4]), tuple(row[4:]), rounds) == plain_philox(tuple(row[:4]), tuple(row[4:]), rounds)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_seed_is_the_key_and_the_offset_the_counter(seed: int) -> None:
    for offset in (0, 5, -3, 2**31, 2**33 + 1, -(2**63)):
        key = (seed % 2**32, (seed >> 32) % 2**32)
        expected = plain_philox((offset % 2**32, (offset >> 32) % 2**32, 0, 0), key)
        got = philox.randint4x(seed, torch.tensor([offset]))
        assert tuple(int(word) % 2**32 for word in got) == expected
        assert all(word.dtype == torch.int32 for word in got)


def test_offsets_of_32_bits_leave_the_second_word_zero() -> None:
    narrow, wide = torch.tensor([-1], dtype=torch.int32), torch.tensor([-1])
    assert int(philox.randint(3, narrow)) % 2**32 == plain_philox((2**32 - 1, 0, 0, 0), (3, 0))[0]
    assert int(philox.randint(3, wide)) % 2**32 == plain_philox((2**32 - 1, 2**32 - 1, 0, 0), (3, 0))[0]


def test_seeds_may_be_a_tensor() -> None:
    seeds = torch.tensor(SEEDS)
    got = philox.rand(seeds[:, None], torch.arange(9))
    assert torch.equal(got, torch.stack([philox.rand(seed, torch.arange(9)) for seed in SEEDS]))


def test_a_float_is_neither_seed_nor_offset() -> None:
    with pytest.raises(ValueError, match="counts offsets in integers"):
        philox.rand(0, torch.zeros(3))
    with pytest.raises(ValueError, match="a seed of Philox is an integer"):
        philox.rand(torch.tensor(0.5), torch.arange(3))


def test_uniform_numbers_stay_below_one() -> None:
    extremes = torch.tensor([2**31 - 1, -(2**31), 0, -1], dtype=torch.int32)
    assert philox._uniform(extremes).tolist() == [1 - 2.0**-24, 1 - 2.0**-24, 0.0, 0.0]


def compare_with_triton(count: int, bound_ulp: float) -> None:
    """Narrow and wide offsets: integers and uniforms to the bit, normal numbers within the bound."""
    # Triton must see TRITON_INTERPRET, which resolve sets, when it is first imported.
    from philox_kernel import draw_kernel

    for seed, (first, wide) in zip(SEEDS, cycle(((0, False), (-5, False), (2**33 - 9, True), (-5, True)))):
        integers = torch.empty(4, count, dtype=torch.int32, device=DEVICE)
        uniforms, normals = (torch.empty(4, count, device=DEVICE) for _ in range(2))
        draw_kernel[(count // 1024,)](integers, uniforms, normals, count, seed, first, wide, 1024)
        offset = torch.arange(count, device=DEVICE, dtype=torch.int64 if wide else torch.int32) + first
        assert torch.equal(torch.stack(philox.randint4x(seed, offset)), integers)
        assert torch.equal(torch.stack(philox.rand4x(seed, offset)), uniforms)
        assert torch.equal(philox.rand(seed, offset), uniforms[0])
        expected = torch.stack(philox.randn4x(seed, offset))
        assert torch.equal(philox.randn(seed, offset), expected[0])
        apart = (expected - normals).abs() / expected.abs().clamp(min=1.0) / ULP
        assert float(apart.max()) <= bound_ulp
        exact = torch.stack(philox.randn4x(seed, offset, dtype=torch.float64))
        assert float(((expected - exact).abs() / exact.abs().clamp(min=1.0)).max()) <= 20 * ULP


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter is what runs without a GPU")
def test_the_stream_is_that_of_triton_in_the_interpreter() -> None:
    compare_with_triton(2048, 4.0)


@pytest.mark.gpu
def test_the_stream_is_that_of_triton_on_a_gpu() -> None:
    compare_with_triton(2**20, 8.0)
