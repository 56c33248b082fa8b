"""The optimizer's step on distinct rows in Triton: each row's gradient, state and weights pass through once.

Shape suffixes: U distinct rows, D width of the table.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from dmt_compile.kernels.triton_support import AheadCase
from dmt_compile.kernels.update_rows.reference import Hyper

WIDEST = 1024  # columns of a block; wider rows take several
ELEMENTS = 2048  # of a block: 16 a thread, four loads of 16 bytes of each operand in float32
SGD, ADAGRAD, SPARSE_ADAM, ROW_WISE_ADAGRAD = (tl.constexpr(kind) for kind in range(4))
_KINDS = ("sgd", "adagrad", "sparse_adam", "row_wise_adagrad")


@triton.jit
def _mixed(words):
    """Scramble 32-bit words, as the reference does."""
    words = (words ^ (words >> 16)) * 0x7FEB352D
    words = (words ^ (words >> 15)) * 0x846CA68B
    return words ^ (words >> 16)


@triton.jit
def _rounded(values_UD, row_U, columns_D, key, type: tl.constexpr):
    """Round to bfloat16 or float16 at random, as the reference does."""
    low = (row_U & 0xFFFFFFFF).to(tl.uint32)
    of_rows_U = _mixed(_mixed(low ^ (key.to(tl.uint32) + 0x80000000)) + (row_U >> 32).to(tl.uint32))
    words_UD = _mixed(of_rows_U[:, None] + columns_D.to(tl.uint32)[None, :] * 0x9E3779B9)
    dropped: tl.constexpr = 0xFFFF if type == tl.bfloat16 else 0x1FFF
    bits_UD = (values_UD.to(tl.uint32, bitcast=True) + (words_UD & dropped)) & (0xFFFFFFFF - dropped)
    random_UD = bits_UD.to(tl.float32, bitcast=True)
    if type == tl.float16:
        spaced_UD = tl.floor(tl.abs(values_UD) * 16777216.0 + (words_UD >> 19).to(tl.float32) / 8192.0) / 16777216.0
        spaced_UD = tl.where(values_UD < 0, -spaced_UD, spaced_UD)
        random_UD = tl.where(tl.abs(values_UD) < 0.00006103515625, spaced_UD, random_UD)
    random_UD = random_UD.to(type)
    finite = (tl.abs(random_UD.to(tl.float32)) < float("inf")) & (tl.abs(values_UD) < float("inf"))
    return tl.where(finite, random_UD, values_UD.to(type))


@triton.jit
def _gradients(grads, u_U, there_U, columns_D, WIDTH: tl.constexpr):
    """Return a block of the gradients in float32, zero beyond rows and columns."""
    there_UD = there_U[:, None] & (columns_D < WIDTH)[None, :]
    return tl.load(grads + u_U[:, None] * WIDTH + columns_D[None, :], mask=there_UD, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["count", "key"])  # they differ from step to step
def update_rows_kernel(
    table,
    state,
    second_state,
    rows,
    grads,
    count,
    rate,
    eps,
    new_share,  # 1 - betas
    new_share_of_squares,
    key,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Update BLOCK_U rows."""
    # WIDTH and STRIDE are constants so that Triton sees how rows are aligned, and takes 16 bytes at once.
    u_U = tl.program_id(0).to(tl.int64) * BLOCK_U + tl.arange(0, BLOCK_U)
    there_U = u_U < count
    row_U = tl.load(rows + u_U, mask=there_U, other=0).to(tl.int64)
    ONCE: tl.constexpr = WIDTH <= BLOCK_D
    if ONCE:
        g_UD = _gradients(grads, u_U, there_U, tl.arange(0, BLOCK_D), WIDTH)
    if KIND == ROW_WISE_ADAGRAD:
        if ONCE:
            squares_U = tl.sum(g_UD * g_UD, axis=1)
        else:
            squares_U = tl.zeros([BLOCK_U], tl.float32)
            for first in range(0, WIDTH, BLOCK_D):
                of_block_UD = _gradients(grads, u_U, there_U, first + tl.arange(0, BLOCK_D), WIDTH)
                squares_U += tl.sum(of_block_UD * of_block_UD, axis=1)
        sums_U = tl.load(state + row_U, mask=there_U, other=0.0).to(tl.float32) + tl.div_rn(squares_U, WIDTH * 1.0)
        tl.store(state + row_U, sums_U.to(state.dtype.element_ty), mask=there_U)
        factor_U = tl.div_rn(tl.zeros_like(sums_U) + rate, tl.sqrt_rn(sums_U) + eps)
    for first in range(0, WIDTH, BLOCK_D):
        columns_D = first + tl.arange(0, BLOCK_D)
        there_UD = there_U[:, None] & (columns_D < WIDTH)[None, :]
        if not ONCE:
            g_UD = _gradients(grads, u_U, there_U, columns_D, WIDTH)
        place_UD = row_U[:, None] * STRIDE + columns_D[None, :]
        new_UD = tl.load(table + place_UD, mask=there_UD, other=0.0).to(tl.float32)
        of_state_UD = row_U[:, None] * WIDTH + columns_D[None, :]
        if KIND == SGD:
            new_UD -= rate * g_UD
        elif KIND == ADAGRAD:
            sums_UD = tl.load(state + of_state_UD, mask=there_UD, other=0.0).to(tl.float32) + g_UD * g_UD
            tl.store(state + of_state_UD, sums_UD.to(state.dtype.element_ty), mask=there_UD)
            new_UD -= rate * tl.div_rn(g_UD, tl.sqrt_rn(sums_UD) + eps)
        elif KIND == SPARSE_ADAM:
            m_UD = tl.load(state + of_state_UD, mask=there_UD, other=0.0).to(tl.float32)
            v_UD = tl.load(second_state + of_state_UD, mask=there_UD, other=0.0).to(tl.float32)
            m_UD += new_share * (g_UD - m_UD)
            v_UD += new_share_of_squares * (g_UD * g_UD - v_UD)
            tl.store(state + of_state_UD, m_UD.to(state.dtype.element_ty), mask=there_UD)
            tl.store(second_state + of_state_UD, v_UD.to(second_state.dtype.element_ty), mask=there_UD)
            new_UD -= rate * tl.div_rn(m_UD, tl.sqrt_rn(v_UD) + eps)
        else:
            new_UD -= factor_U[:, None] * g_UD
        if STOCHASTIC:
            tl.store(table + place_UD, _rounded(new_UD, row_U, columns_D, key, table.dtype.element_ty), mask=there_UD)
        else:
            tl.store(table + place_UD, new_UD.to(table.dtype.element_ty), mask=there_UD)


def update_rows(
    kind: str,
    table: torch.Tensor,
    states: Sequence[torch.Tensor],
    rows_U: torch.Tensor,
    grads_UD: torch.Tensor,
    hyper: Hyper,
) -> None:
    """Do an optimizer's step on some rows, in place; see ``op.update_rows``."""
    count, width = grads_UD.shape
    if not count or not width:
        return
    first, second = (*states, None, None)[:2]
    rate = {"adagrad": hyper.rate, "sparse_adam": hyper.corrected_rate}.get(kind, hyper.lr)
    beta1, beta2 = hyper.betas
    key = hyper.key - 2**31 if hyper.stochastic_rounding else 0  # as 32 bits with a sign
    constants = _constants(kind, width, table.stride(0), hyper.stochastic_rounding and table.dtype.itemsize < 4)
    here = torch.cuda.device(table.device) if table.is_cuda else contextlib.nullcontext()
    with here:
        update_rows_kernel[(triton.cdiv(count, constants["BLOCK_U"]),)](
            table, first, second, rows_U.contiguous(), grads_UD.contiguous(), count, rate, hyper.eps, 1 - beta1,
            1 - beta2, key, **constants,
        )  # fmt: skip


def _constants(kind: str, width: int, stride: int, stochastic: bool) -> dict[str, Any]:
    """Return the constants of a launch."""
    block = min(triton.next_power_of_2(width), WIDEST)
    return {
        "KIND": _KINDS.index(kind),
        "WIDTH": width,
        "STRIDE": stride,
        "STOCHASTIC": stochastic,
        "BLOCK_U": ELEMENTS // block,
        "BLOCK_D": block,
    }


def _ahead(kind: str, width: int, table: str = "fp32", stochastic: bool = False) -> AheadCase:
    states = {"sgd": 0, "sparse_adam": 2}.get(kind, 1)
    names = ("state", "second_state")
    pointers = {"table": f"*{table}", "rows": "*i64", "grads": f"*{table}", **dict.fromkeys(names[:states], "*fp32")}
    numbers = dict.fromkeys(("rate", "eps", "new_share", "new_share_of_squares"), "fp32")
    constants = {**_constants(kind, width, width, stochastic), **dict.fromkeys(names[states:])}
    return AheadCase(
        f"{kind} of {width} {table}{' stochastic' * stochastic}", update_rows_kernel,
        {**pointers, **numbers, "count": "i32", "key": "i32"}, constants, frozenset(pointers),
    )  # fmt: skip


AHEAD = (
    *(_ahead(kind, 128) for kind in _KINDS),
    *(_ahead(kind, 64, "bf16", stochastic=True) for kind in _KINDS),
    _ahead("adagrad", 13),
    _ahead("sparse_adam", 8, "fp16", stochastic=True),
    _ahead("row_wise_adagrad", 4096),
    _ahead("sparse_adam", 1000),
)
