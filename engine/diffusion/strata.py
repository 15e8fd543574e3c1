"""Strata of a batch: [0, 1] is cut into n equal slices, and each of the n samples is drawn from its own, the same in every iteration.

Low and high slices alternate over the batch, like the digits of a number read backwards. So every micro-batch of a
power-of-two batch sees all of the law.
"""


def digit_reversal(n: int) -> list[int]:
    """A permutation of 0 … n - 1: digit reversal in the prime factors of n; bit reversal for powers of two."""
    order, p = [0], 2
    while len(order) < n:
        if n // len(order) % p:
            p += 1
        else:  # puts a digit in front of the index, and behind the slice
            order = [digit + p * rest for digit in range(p) for rest in order]
    return order


def strata(total: int, part: int, step: int = 1) -> list[int]:
    """The slice of each of `total` samples, which are cut into parts of `part`: each part has one sample in every 1/part of [0, 1].

    The samples of a part are `step` apart; those between them belong to the parts of other ranks.
    """
    parts = total // part
    assert parts * part == total and parts % step == 0, f"{part} samples every {step} do not divide {total}"
    within, among = digit_reversal(part), digit_reversal(parts)
    block = part * step
    return [within[i % block // step] * parts + among[i // block * step + i % step] for i in range(total)]
