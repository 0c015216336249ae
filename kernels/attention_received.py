"""How much attention every token receives, in Triton, without the map.

received_kernel   sum over queries of exp(scale * q k^T - lse), per head: the column sums of a softmax
                  whose row sums are known. One pass of q k^T, half the matrix work of attention and
                  the same number of exponentials; nothing of N x M is written.
lse_kernel        those row sums, if the caller has none: one pass of q k^T more, online.

Reads k once and q once for every tile of keys (L2 hits: tiles of one head run side by side), writes
4 bytes a key and head. Limited by the tensor cores and the exponential units. A program owns a tile
of keys, which are the rows of the product, so that the sum over queries stays inside a warp (sums
down the columns would cross warps through shared memory), and loops over tiles of queries, pipelined.
Each head writes partial sums of its own, added in order afterwards: no atomics, equal bits every time.

A head of d channels is cut into the largest power of two in it and a tail of 16 or more: 72 = 64 + 16
costs 80 columns of product, where padding to 128 would cost 128. Queries beyond the last have a
log-sum-exp of infinity, which makes their weight an exact zero without a mask on the product.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(start, tokens, token_stride, limit, columns, D: tl.constexpr):
    """Rows `tokens` of a head, columns beyond D and rows beyond the limit zero."""
    mask = (tokens < limit)[:, None] & (columns < D)[None, :]
    return tl.load(start + tokens[:, None] * token_stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _product(rows, rows_tail, columns, columns_tail, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """rows columns^T in fp32, the tail's share included."""
    product = tl.dot(rows, tl.trans(columns), input_precision=PRECISION)
    if TAIL > 0:
        product = tl.dot(rows_tail, tl.trans(columns_tail), product, input_precision=PRECISION)
    return product


@triton.jit
def received_kernel(
    q,
    k,
    lse,
    partial,
    N,
    M,
    factor,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    UNIT: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of keys of one head. Grid: (key tiles, H, B). partial [B, H, M]; factor scales the logits."""
    b, h, heads = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    keys = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    columns, tail_columns = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL if TAIL > 0 else 16)
    k_start = tl.multiple_of(k + b * k_batch * UNIT + h * k_head * UNIT, ALIGN)
    q_start = tl.multiple_of(q + b * q_batch * UNIT + h * q_head * UNIT, ALIGN)
    own = _tile(k_start, keys.to(tl.int64), k_token * UNIT, M, columns, D)
    own_tail = _tile(k_start, keys.to(tl.int64), k_token * UNIT, M, tail_columns, D) if TAIL > 0 else own
    sums = lse + (b * heads + h) * N
    total = tl.zeros([KEYS], tl.float32)
    for first in tl.range(0, N, QUERIES, num_stages=STAGES):
        queries = first + tl.arange(0, QUERIES)
        other = _tile(q_start, queries.to(tl.int64), q_token * UNIT, N, columns, D)
        other_tail = (
            _tile(q_start, queries.to(tl.int64), q_token * UNIT, N, tail_columns, D) if TAIL > 0 else other
        )
        own_sum = tl.load(sums + queries, mask=queries < N, other=float("inf")).to(tl.float32) * LOG2E
        logits = _product(own, own_tail, other, other_tail, TAIL, PRECISION)
        total += tl.sum(tl.exp2(logits * (factor * LOG2E) - own_sum[None, :]), 1)
    tl.store(partial + (b * heads + h) * M + keys, total, mask=keys < M)


@triton.jit
def lse_kernel(
    q,
    k,
    lse,
    N,
    M,
    factor,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    UNIT: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Log-sum-exp of the scaled logits of one tile of queries of one head. Grid: (query tiles, H, B). lse [B,
    H, N].
    """
    b, h, heads = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    queries = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    columns, tail_columns = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL if TAIL > 0 else 16)
    k_start = tl.multiple_of(k + b * k_batch * UNIT + h * k_head * UNIT, ALIGN)
    q_start = tl.multiple_of(q + b * q_batch * UNIT + h * q_head * UNIT, ALIGN)
    own = _tile(q_start, queries.to(tl.int64), q_token * UNIT, N, columns, D)
    own_tail = _tile(q_start, queries.to(tl.int64), q_token * UNIT, N, tail_columns, D) if TAIL > 0 else own
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for first in tl.range(0, M, KEYS, num_stages=STAGES):
        keys = first + tl.arange(0, KEYS)
        other = _tile(k_start, keys.to(tl.int64), k_token * UNIT, M, columns, D)
        other_tail = (
            _tile(k_start, keys.to(tl.int64), k_token * UNIT, M, tail_columns, D) if TAIL > 0 else other
        )
        logits = _product(own, own_tail, other, other_tail, TAIL, PRECISION) * (factor * LOG2E)
        logits = tl.where((keys < M)[None, :], logits, float("-inf"))
        new = tl.maximum(largest, tl.max(logits, 1))
        base = tl.where(
            new == float("-inf"), 0.0, new
        )  # of logits that are all -inf: exp2(-inf - -inf) would be NaN
        total = total * tl.exp2(largest - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        largest = new
    tl.store(lse + (b * heads + h) * N + queries, (largest + tl.log2(total)) / LOG2E, mask=queries < N)
