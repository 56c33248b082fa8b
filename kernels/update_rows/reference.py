"""The meaning of an optimizer's step on some rows of a table, in plain PyTorch.

Each step does what PyTorch's optimizer of that name does with a coalesced sparse gradient, operation by operation.

Shape suffixes: U distinct rows, D width of the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

Rows = torch.Tensor
_WORD = 0xFFFFFFFF
_ODD = 0x9E3779B9  # 2^32 over the golden ratio: columns start far from each other
_SUBNORMAL = 2.0**-24  # the smallest float16


class Hyper(NamedTuple):
    """The numbers of one step.

    Args:
        lr: learning rate.
        step: number of this step, from 1.
        eps: added to a denominator; unused by ``"sgd"``.
        lr_decay: of ``"adagrad"``.
        betas: of ``"sparse_adam"``.
        stochastic_rounding: round the new rows up or down at random, right on average; rows narrower than float32 only.
        seed: of the random numbers, which are a function of seed, step, row and column.
    """

    lr: float
    step: int
    eps: float = 0.0
    lr_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    stochastic_rounding: bool = False
    seed: int = 0

    @property
    def rate(self) -> float:
        """The learning rate of this step of ``"adagrad"``."""
        return self.lr / (1 + (self.step - 1) * self.lr_decay)

    @property
    def corrected_rate(self) -> float:
        """The learning rate of this step of ``"sparse_adam"``, free of the bias of averages that began at zero."""
        beta1, beta2 = self.betas
        return self.lr * math.sqrt(1 - beta2**self.step) / (1 - beta1**self.step)

    @property
    def key(self) -> int:
        """What seed and step give to the random numbers, a 32-bit word."""
        return _mixed(_mixed(self.seed & _WORD) + self.step & _WORD)


def sgd(rows_UD: Rows, grads_UD: Rows, states: Sequence[Rows], hyper: Hyper) -> tuple[Rows, ...]:
    """Return rows - lr g."""
    return (torch.add(rows_UD, grads_UD, alpha=-hyper.lr),)


def adagrad(rows_UD: Rows, grads_UD: Rows, states: Sequence[Rows], hyper: Hyper) -> tuple[Rows, ...]:
    """Return rows - rate g / (sqrt(sum) + eps) and sum, to which g^2 was added."""
    sums_UD = states[0] + grads_UD.pow(2)
    return torch.add(rows_UD, grads_UD / sums_UD.sqrt().add_(hyper.eps), alpha=-hyper.rate), sums_UD


def sparse_adam(rows_UD: Rows, grads_UD: Rows, states: Sequence[Rows], hyper: Hyper) -> tuple[Rows, ...]:
    """Return rows - rate m / (sqrt(v) + eps), and m and v: moving averages of g and g^2, over a row's own steps."""
    (averages_UD, squares_UD), (beta1, beta2) = states, hyper.betas
    change_UD = grads_UD.sub(averages_UD).mul_(1 - beta1)
    change_of_squares_UD = grads_UD.pow(2).sub_(squares_UD).mul_(1 - beta2)
    averages_UD, squares_UD = averages_UD + change_UD, squares_UD + change_of_squares_UD
    moved_UD = averages_UD / squares_UD.sqrt().add_(hyper.eps)
    return rows_UD + -hyper.corrected_rate * moved_UD, averages_UD, squares_UD


def row_wise_adagrad(rows_UD: Rows, grads_UD: Rows, states: Sequence[Rows], hyper: Hyper) -> tuple[Rows, ...]:
    """Return rows - lr / (sqrt(sum) + eps) g and sum, (U, 1), to which the mean of a row's g^2 was added."""
    sums_U1 = states[0] + grads_UD.pow(2).mean(1, keepdim=True)
    return rows_UD - hyper.lr / sums_U1.sqrt().add_(hyper.eps) * grads_UD, sums_U1


Step = Callable[[Rows, Rows, Sequence[Rows], Hyper], tuple[Rows, ...]]
STEPS: Mapping[str, Step] = {
    "sgd": sgd,
    "adagrad": adagrad,
    "sparse_adam": sparse_adam,
    "row_wise_adagrad": row_wise_adagrad,
}


def update_rows(
    kind: str,
    table: torch.Tensor,
    states: Sequence[torch.Tensor],
    rows_U: torch.Tensor,
    grads_UD: torch.Tensor,
    hyper: Hyper,
) -> None:
    """Do an optimizer's step on some rows, in place.

    Args:
        kind: a key of ``STEPS``.
        table: (rows, D).
        states: of the step, each (rows, D), of ``"row_wise_adagrad"`` (rows, 1).
        rows_U: distinct, int64.
        grads_UD: their gradients.
        hyper: the numbers of the step.
    """
    wide = wide_type(table)
    old_UD = table.index_select(0, rows_U).to(wide)
    old_states = [state.index_select(0, rows_U).to(wide) for state in states]
    new_UD, *new_states = STEPS[kind](old_UD, grads_UD.to(wide), old_states, hyper)
    table.index_copy_(0, rows_U, rounded(new_UD, table.dtype, rows_U, hyper))
    for state, new in zip(states, new_states, strict=True):
        state.index_copy_(0, rows_U, new.to(state.dtype))


def wide_type(table: torch.Tensor) -> torch.dtype:
    """Return the type in which a step is computed."""
    return torch.promote_types(table.dtype, torch.float32)


def rounded(values_UD: torch.Tensor, dtype: torch.dtype, rows_U: torch.Tensor, hyper: Hyper) -> torch.Tensor:
    """Return new rows in their table's type.

    At random where ``hyper`` asks for it: down with a probability that makes the mean right, up otherwise. What would
    become infinite is rounded to nearest.
    """
    nearest_UD = values_UD.to(dtype)
    if not hyper.stochastic_rounding or dtype not in (torch.bfloat16, torch.float16):
        return nearest_UD
    words_UD = random_words(hyper.key, rows_U, values_UD.shape[1])
    dropped = 16 if dtype is torch.bfloat16 else 13  # bits of a float32 that the type has no room for
    low = (1 << dropped) - 1
    bits_UD = values_UD.contiguous().view(torch.int32).long() + (words_UD & low) & ~low
    random_UD = bits_UD.to(torch.int32).view(torch.float32)
    if dtype is torch.float16:  # its smallest numbers are evenly spaced; 13 random bits, for sums that float32 holds
        spaced_UD = torch.floor(values_UD.abs() / _SUBNORMAL + (words_UD >> 19) * 2.0**-13) * _SUBNORMAL
        random_UD = torch.where(values_UD.abs() < 2.0**-14, spaced_UD.copysign(values_UD), random_UD)
    random_UD = random_UD.to(dtype)
    return torch.where(random_UD.isfinite() & values_UD.isfinite(), random_UD, nearest_UD)


def random_words(key: int, rows_U: torch.Tensor, width: int) -> torch.Tensor:
    """Return a random 32-bit word for each element of the rows, (U, D) int64: a function of key, row and column."""
    of_rows_U = _mixed_words((rows_U & _WORD) ^ key) + (rows_U >> 32)
    columns_D = torch.arange(width, device=rows_U.device) * _ODD
    return _mixed_words(_mixed_words(of_rows_U & _WORD).unsqueeze(1) + columns_D & _WORD)


def _mixed_words(words: torch.Tensor) -> torch.Tensor:
    """Scramble 32-bit words (the ``lowbias32`` hash); each bit given turns about half of the bits returned."""
    words = (words ^ words >> 16) * 0x7FEB352D & _WORD
    words = (words ^ words >> 15) * 0x846CA68B & _WORD
    return words ^ words >> 16


def _mixed(word: int) -> int:
    return int(_mixed_words(torch.tensor(word)))
