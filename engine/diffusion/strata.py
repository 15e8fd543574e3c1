"""Strata of a batch: which of n equal slices of [0, 1] each of its samples is drawn from, the same in every iteration.

Low slices and high ones are dealt out over the batch like the digits of a number read backwards, so that every
micro-batch of a power-of-two batch sees all of the law.
"""


def spread(n: int) -> list[int]:
    """A permutation of 0 … n - 1: digit reversal in the prime factors of n; bit reversal for powers of two."""
    order = [0]
    for p in _factors(n):  # the new leading digit of the index, which changes most slowly, is the slice's last one
        order = [digit + p * rest for digit in range(p) for rest in order]
    return order


def strata(total: int, part: int, step: int = 1) -> list[int]:
    """Slices of `total` samples that are cut into parts of `part` samples: each part has one sample in every 1/part.

    A part's samples are `step` apart, the parts between them being other ranks'.
    """
    parts = total // part
    assert parts * part == total and parts % step == 0, f"{part} samples every {step} do not divide {total}"
    within, among = spread(part), spread(parts)
    block = part * step
    return [within[i % block // step] * parts + among[i // block * step + i % step] for i in range(total)]


def _factors(n: int) -> list[int]:
    found, p = [], 2
    while n > 1:
        while n % p == 0:
            found.append(p)
            n //= p
        p += 1
    return found
