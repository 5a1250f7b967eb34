"""AdamW over the selected entries of any number of tensors, in two launches.

What the host says, in tables of int64:

- ``table``, a row of addresses a tensor (`PARAM` and so on), with its encoding last;
- ``gradients``, a row of two a tensor: the address, 0 if it has none; 1 if the gradient is compact, else 0;
- ``rows``, a row of four a program of `update`: ``tensor * 65536 + count``, the element where its block begins, its
  place in the index, its first compact entry.

`advance` leaves `update` eight fp32 scalars a tensor. So neither a new learning rate nor another step count compiles
anything anew, and no number changes its type on the way: a Python float is fp32 to a compiled kernel, but stays double
in Triton's interpreter.
"""

import triton
import triton.language as tl

WARPS = 8
COLUMNS = tl.constexpr(9)
PARAM, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, MASTER, STEP, INDEX, RANKS, ENCODING = (tl.constexpr(n) for n in range(9))
RUNS, BITS, OFFSETS = (tl.constexpr(n) for n in range(3))
SCALARS = tl.constexpr(8)
SIGN, DECAY, BLEND, BETA2, ONE_MINUS_BETA2, STEP_SIZE, INVERSE_CORRECTION, EPS = (tl.constexpr(n) for n in range(8))


@triton.jit(
    do_not_specialize=["tensors"],
    do_not_specialize_on_alignment=["found_inf_ptr", "lr_ptr", "beta1_ptr", "beta2_ptr"],
)
def advance(
    table_ptr, gradients_ptr, scalars_ptr, found_inf_ptr, lr_ptr, beta1_ptr, beta2_ptr, tensors,
    lr: tl.float64, beta1: tl.float64, beta2: tl.float64, weight_decay: tl.float64, eps: tl.float64, sign: tl.float64,
    LR_ON_DEVICE: tl.constexpr, BETAS_ON_DEVICE: tl.constexpr, MAY_SKIP: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    """``t += 1`` for every tensor that has a gradient, and the scalars of its step.

    In double: in single, ``1 - beta2**t`` has lost half its digits for small t.
    """
    i = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
    live = i < tensors
    live &= tl.load(gradients_ptr + 2 * i, live, other=0) != 0
    if LR_ON_DEVICE:
        lr = tl.load(lr_ptr).to(tl.float64)
    if BETAS_ON_DEVICE:
        beta1 = tl.load(beta1_ptr).to(tl.float64)
        beta2 = tl.load(beta2_ptr).to(tl.float64)
    step_ptr = tl.load(table_ptr + i * COLUMNS + STEP, live, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, live, other=0.0) + 1.0
    if MAY_SKIP:
        step -= tl.minimum(tl.load(found_inf_ptr), 1.0)
    tl.store(step_ptr, step, live)

    t = tl.maximum(step, 1.0).to(tl.float64)  # 0 if the first step is skipped: its scalars are not read
    ones = tl.full((TENSORS,), 1.0, tl.float64)
    rest1 = 1.0 - tl.exp(t * tl.log(tl.maximum(beta1 * ones, 1e-300)))  # a beta may be 0
    rest2 = 1.0 - tl.exp(t * tl.log(tl.maximum(beta2 * ones, 1e-300)))
    scalars = scalars_ptr + i * SCALARS
    tl.store(scalars + SIGN, (sign * ones).to(tl.float32), live)
    tl.store(scalars + DECAY, (1.0 - lr * weight_decay * ones).to(tl.float32), live)
    # As torch.lerp, `update` blends from whichever end is nearer; a negative weight means from the gradient.
    tl.store(scalars + BLEND, tl.where(beta1 > 0.5, 1.0 - beta1, -beta1 * ones).to(tl.float32), live)
    tl.store(scalars + BETA2, (beta2 * ones).to(tl.float32), live)
    tl.store(scalars + ONE_MINUS_BETA2, (1.0 - beta2 * ones).to(tl.float32), live)
    tl.store(scalars + STEP_SIZE, (lr / rest1).to(tl.float32), live)
    tl.store(scalars + INVERSE_CORRECTION, (1.0 / tl.sqrt(rest2)).to(tl.float32), live)
    tl.store(scalars + EPS, (eps * ones).to(tl.float32), live)


@triton.jit
def _count_bits(word):
    """How many bits of uint32 are set: LLVM knows this form and makes it one instruction."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return ((((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _locate(entry, at, count, BLOCK: tl.constexpr):
    """For each lane of a block: its element, its compact entry (both from the block's first) and whether it has one.

    Lanes are the compact entries of a run or of offsets, but the elements of a tile of bits: there the entry is a
    lane's rank among the selected, from the counts of the words before it and the bits below it.
    """
    lane = tl.arange(0, BLOCK)
    element, rank, live = lane, lane, lane < count
    encoding = tl.load(entry + ENCODING)
    if encoding == BITS:
        words = (tl.load(entry + INDEX) + at).to(tl.pointer_type(tl.uint32))
        ranks = (tl.load(entry + RANKS) + at // 2).to(tl.pointer_type(tl.int16))
        bit = (lane % 32).to(tl.uint32)
        # Not `&` with the mask below: a comparison of scalars makes it integers in the interpreter of Triton 3.9.
        word = tl.where(count > 0, tl.load(words + lane // 32), 0)
        below = word & ((bit * 0 + 1 << bit) - 1)
        rank = tl.load(ranks + lane // 32).to(tl.int32) + _count_bits(below)
        live = (word >> bit) & 1 != 0
    elif encoding == OFFSETS:
        offsets = tl.load(entry + INDEX).to(tl.pointer_type(tl.uint16))
        element = tl.load(offsets + at + lane, live, other=0).to(tl.int32)
    return element, rank, live


@triton.jit
def _adamw(p, g, m, v, top, scalars, AMSGRAD: tl.constexpr):
    """``m += (1 - beta1)(g - m); v = beta2 v + (1 - beta2) g²; p = decay p - step_size m / (√v / correction + eps)``.

    ``correction``, √(1 - beta2ᵗ), comes as its inverse: a product costs less than a division.
    """
    blend, step_size = tl.load(scalars + BLEND), tl.load(scalars + STEP_SIZE)
    beta2, one_minus_beta2 = tl.load(scalars + BETA2), tl.load(scalars + ONE_MINUS_BETA2)
    inverse_correction, eps = tl.load(scalars + INVERSE_CORRECTION), tl.load(scalars + EPS)
    p *= tl.load(scalars + DECAY)
    m = tl.where(blend > 0, m, g) + blend * (g - m)
    v = v * beta2 + one_minus_beta2 * g * g
    top = tl.maximum(top, v, propagate_nan=tl.PropagateNan.ALL) if AMSGRAD else v
    p -= tl.div_rn(step_size * m, tl.sqrt_rn(top) * inverse_correction + eps)
    return p, m, v, top


@triton.jit(do_not_specialize_on_alignment=["grad_scale_ptr", "found_inf_ptr"])
def update(
    rows_ptr, table_ptr, gradients_ptr, scalars_ptr, grad_scale_ptr, found_inf_ptr,
    TYPE: tl.constexpr, GRADIENT: tl.constexpr, STATE: tl.constexpr, HAS_MASTER: tl.constexpr,
    AMSGRAD: tl.constexpr, HAS_GRAD_SCALE: tl.constexpr, MAY_SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of selected entries of one tensor: gather, AdamW, scatter; all is read before the first square root.

    The trick is in what is *not* said: nothing about alignment. With ``multiple_of`` on these pointers Triton gives a
    thread 8 adjacent entries, spreads each gather over 32 cache lines and converts layouts through shared memory;
    without, a warp reads 32 neighbours, and misaligned views step as well. ``master`` is used where it rounds to the
    parameter: where it does not, the parameter was loaded or edited since the last step, and wins.
    """
    row = rows_ptr + tl.program_id(0).to(tl.int64) * 4
    packed, base, at, first = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    tensor, count = packed >> 16, packed & 0xFFFF
    entry, scalars = table_ptr + tensor * COLUMNS, scalars_ptr + tensor * SCALARS
    gradient, compact = tl.load(gradients_ptr + tensor * 2), tl.load(gradients_ptr + tensor * 2 + 1) != 0
    skipped = gradient == 0
    if MAY_SKIP:
        skipped |= tl.load(found_inf_ptr) != 0.0
    element, rank, live = _locate(entry, at, tl.where(skipped, 0, count).to(tl.int32), BLOCK)
    g_ptr = gradient.to(tl.pointer_type(GRADIENT)) + tl.where(compact, first, base) + tl.where(compact, rank, element)
    p_ptr = tl.load(entry + PARAM).to(tl.pointer_type(TYPE)) + base + element
    m_ptr = tl.load(entry + EXP_AVG).to(tl.pointer_type(STATE)) + first + rank
    v_ptr = tl.load(entry + EXP_AVG_SQ).to(tl.pointer_type(STATE)) + first + rank
    stored = tl.load(p_ptr, live, other=0.0)
    g = tl.load(g_ptr, live, other=0.0).to(tl.float32) * tl.load(scalars + SIGN)
    m = tl.load(m_ptr, live, other=0.0).to(tl.float32)
    v = tl.load(v_ptr, live, other=0.0).to(tl.float32)
    p, top = stored.to(tl.float32), v
    if HAS_MASTER:
        master_ptr = tl.load(entry + MASTER).to(tl.pointer_type(tl.float32)) + first + rank
        master = tl.load(master_ptr, live, other=0.0)
        p = tl.where(master.to(TYPE) == stored, master, p)
    if AMSGRAD:
        top_ptr = tl.load(entry + MAX_EXP_AVG_SQ).to(tl.pointer_type(STATE)) + first + rank
        top = tl.load(top_ptr, live, other=0.0).to(tl.float32)
    if HAS_GRAD_SCALE:
        g = tl.div_rn(g, tl.load(grad_scale_ptr))
    p, m, v, top = _adamw(p, g, m, v, top, scalars, AMSGRAD)
    tl.store(p_ptr, p.to(TYPE), live)
    tl.store(m_ptr, m.to(STATE), live)
    tl.store(v_ptr, v.to(STATE), live)
    if AMSGRAD:
        tl.store(top_ptr, top.to(STATE), live)
    if HAS_MASTER:
        tl.store(master_ptr, p, live)
