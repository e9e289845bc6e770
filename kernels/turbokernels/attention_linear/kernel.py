"""Linear attention in Triton: forward, tangent and backward (SLA, arXiv 2509.24006; method.md section 3, step 5).

Everything that queries and keys exchange is one small state per head, so each pass reads its operands once and memory
is the limit (S1, one head dim of 128: 2 tensors in the state pass, 2 to 3 in the apply pass, 9 in the backward):

    state   S = phi(k)^T v, z = sum phi(k)           keys; partial sums per program, added in a fixed order
    apply   o = phi(q) S / (phi(q) . z + 1e-5)       queries; optionally + a base and a bias (SLA's sum of branches)
    query gradient   dq
    state gradient   dS, dz: sums over the queries, as in the state pass
    key gradient     dk, dv from dS, dz

A projection P of the output acts on each row, so it is folded into the state: (phi(q) S) P^T = phi(q) (S P^T). States are
float32; where they enter a matrix product in 16 bits they are scaled by their largest entry, so that float16 cannot
overflow. Of float32 operands (EXACT), exponentials and quotients are exact and the row sums that whole rows depend on
(phi(q) . z and do . o) are in float64: with few tokens gradients are differences of nearly equal terms.

Shape suffixes: G batch * heads, D head dim (of keys and of values); blocks: [T, D] tokens by channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from turbokernels.attention_tiles import dot_rows, exp_exact, head_offset

LOG2E = tl.constexpr(1.4426950408889634)
EPS = tl.constexpr(1e-5)


@triton.jit
def features(b_x, FEATURE_MAP: tl.constexpr, EXACT: tl.constexpr):
    """phi of float32 rows [T, D]: softmax over D, elu + 1, or relu. NaN stays NaN."""
    if FEATURE_MAP == "softmax":
        b_x -= tl.max(b_x, 1)[:, None]
        if EXACT:
            b_phi = exp_exact(b_x)
            b_phi = tl.div_rn(b_phi, tl.sum(b_phi, 1)[:, None])
        else:
            b_phi = tl.exp2(b_x * LOG2E)
            b_phi *= (1.0 / tl.sum(b_phi, 1))[:, None]
    elif FEATURE_MAP == "elu":
        b_phi = tl.where(b_x > 0.0, b_x + 1.0, exp_exact(b_x) if EXACT else tl.exp2(b_x * LOG2E))
    else:
        b_phi = tl.where(b_x < 0.0, 0.0, b_x)
    return b_phi


@triton.jit
def apply_jacobian(b_phi, b_t, FEATURE_MAP: tl.constexpr):
    """phi'(x) t from phi(x), [T, D]. The Jacobians are symmetric, so this serves tangents and gradients."""
    if FEATURE_MAP == "softmax":
        b_scaled = b_phi * b_t
        b_out = b_scaled - b_phi * tl.sum(b_scaled, 1)[:, None]
    elif FEATURE_MAP == "elu":
        b_out = tl.where(b_phi > 1.0, 1.0, b_phi) * b_t  # elu' = exp(x) = phi below 0
    else:
        b_out = tl.where(b_phi == 0.0, 0.0, b_t)
    return b_out


@triton.jit
def load_state(p_state, D: tl.constexpr, dtype: tl.constexpr):
    """S [D, D] divided by its largest magnitude, in `dtype`; that magnitude; z [D] in float32. Float32 needs no scale."""
    i_d = tl.arange(0, D)
    b_s = tl.load(p_state + i_d[:, None] * D + i_d[None, :])
    b_scale = 1.0
    if dtype != tl.float32:
        b_scale = tl.max(tl.max(tl.abs(b_s), 1), 0)
        b_scale = tl.where(b_scale > 0.0, b_scale, 1.0)
        b_s = (b_s / b_scale).to(dtype)
    return b_s, b_scale, tl.load(p_state + D * D + i_d)


@triton.jit
def row_dots(b_x, b_y, EXACT: tl.constexpr):
    """Sums over D of x y, [T], float32; EXACT: float64."""
    if EXACT:
        b_sum = tl.sum(b_x.to(tl.float64) * b_y.to(tl.float64), 1)
    else:
        b_sum = tl.sum(b_x * b_y, 1)
    return b_sum


@triton.jit
def apply_state(b_x, b_s, b_scale, EXACT: tl.constexpr):
    """x S [T, D] of a state from `load_state`."""
    if EXACT:
        b_xs = dot_rows(b_x, tl.trans(b_s), EXACT)
    else:
        b_xs = tl.dot(b_x, b_s, input_precision="ieee") * b_scale
    return b_xs


@triton.jit
def apply_transposed(b_x, b_s, b_scale, EXACT: tl.constexpr):
    """x S^T [T, D] of a state from `load_state`."""
    if EXACT:
        b_xs = dot_rows(b_x, b_s, EXACT)
    else:
        b_xs = tl.dot(b_x, tl.trans(b_s), input_precision="ieee") * b_scale
    return b_xs


@triton.jit
def store_partial(p_partial, b_st, b_z, D: tl.constexpr):
    """Write S [D, D], given transposed, and z [D] of one program."""
    i_d = tl.arange(0, D)
    tl.store(p_partial + i_d[:, None] * D + i_d[None, :], tl.trans(b_st))
    tl.store(p_partial + D * D + i_d, b_z)


@triton.jit(do_not_specialize=("length", "tiles_per_program"))
def state_kernel(
    p_k,
    p_v,
    p_tk,
    p_tv,
    p_partial,  # float32 (G, programs, 1 or 2, D + 1, D): S and z, then their tangents
    p_largest,  # float32 (G, programs, D): |v|, written if LARGEST
    stride_kb,
    stride_kl,
    stride_kn,
    stride_vb,
    stride_vl,
    stride_vn,
    stride_tkb,
    stride_tkl,
    stride_tkn,
    stride_tvb,
    stride_tvl,
    stride_tvn,
    heads,
    length,
    tiles_per_program,
    FEATURE_MAP: tl.constexpr,
    TANGENT: tl.constexpr,
    LARGEST: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    EXACT: tl.constexpr = p_k.dtype.element_ty == tl.float32
    i_program, i_g = tl.program_id(0), tl.program_id(1)
    p_k += head_offset(i_g, heads, stride_kb, stride_kn)
    p_v += head_offset(i_g, heads, stride_vb, stride_vn)
    if TANGENT:
        p_tk += head_offset(i_g, heads, stride_tkb, stride_tkn)
        p_tv += head_offset(i_g, heads, stride_tvb, stride_tvn)
        b_tst = tl.zeros((D, D), tl.float32)
        b_tphis = tl.zeros((BLOCK, D), tl.float32)
    i_d = tl.arange(0, D)
    # S^T = v^T phi: phi comes from registers, and a product takes those as its right operand without transposing them.
    b_st = tl.zeros((D, D), tl.float32)
    b_phis = tl.zeros((BLOCK, D), tl.float32)  # summed over tokens once, at the end
    b_bits = tl.zeros((BLOCK, D), tl.int32)  # of magnitudes: as integers they are ordered, and NaN is the largest

    first = i_program * tiles_per_program
    # The mask of the last tile stays in the loop: memory is the limit here, and it costs no traffic.
    for i_tile in range(first, tl.minimum(first + tiles_per_program, tl.cdiv(length, BLOCK))):
        i_t = (i_tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        m_t = (i_t < length)[:, None]
        b_k = tl.load(p_k + i_t[:, None] * stride_kl + i_d[None, :], mask=m_t, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + i_t[:, None] * stride_vl + i_d[None, :], mask=m_t, other=0.0)
        b_phi = tl.where(m_t, features(b_k, FEATURE_MAP, EXACT), 0.0)  # [T, D]
        if LARGEST:
            b_bits = tl.maximum(b_bits, tl.abs(b_v.to(tl.float32)).to(tl.int32, bitcast=True))
        if TANGENT:
            b_tk = tl.load(p_tk + i_t[:, None] * stride_tkl + i_d[None, :], mask=m_t, other=0.0).to(tl.float32)
            b_tv = tl.load(p_tv + i_t[:, None] * stride_tvl + i_d[None, :], mask=m_t, other=0.0)
            b_tphi = apply_jacobian(b_phi, b_tk, FEATURE_MAP).to(b_v.dtype)
            b_tphis += b_tphi.to(tl.float32)
            b_tst = tl.dot(tl.trans(b_v), b_tphi, b_tst, input_precision="ieee")
        b_phi = b_phi.to(b_v.dtype)
        # z sums what the product sums, rounded alike: o stays an average of v.
        b_phis += b_phi.to(tl.float32)
        b_st = tl.dot(tl.trans(b_v), b_phi, b_st, input_precision="ieee")
        if TANGENT:
            b_tst = tl.dot(tl.trans(b_tv), b_phi, b_tst, input_precision="ieee")

    if LARGEST:
        p_largest += (i_g.to(tl.int64) * tl.num_programs(0) + i_program) * D + i_d
        tl.store(p_largest, tl.max(b_bits, 0).to(tl.float32, bitcast=True))
    i_state = (i_g.to(tl.int64) * tl.num_programs(0) + i_program) * (2 if TANGENT else 1)
    store_partial(p_partial + i_state * (D + 1) * D, b_st, tl.sum(b_phis, 0), D)
    if TANGENT:
        store_partial(p_partial + (i_state + 1) * (D + 1) * D, b_tst, tl.sum(b_tphis, 0), D)


@triton.jit
def load_tokens(p_x, i_t, end, stride_l, D: tl.constexpr):
    """[T, D] of the tokens i_t (int64) before `end`, zero beyond."""
    return tl.load(p_x + i_t[:, None] * stride_l + tl.arange(0, D)[None, :], mask=(i_t < end)[:, None], other=0.0)


@triton.jit(do_not_specialize=("length", "tiles_per_program"))
def apply_kernel(
    p_q,
    p_tq,
    p_state,  # float32 (G, 1 or 2, D + 1, D)
    p_base,
    p_tbase,
    p_bias,  # (D,)
    p_o,
    p_to,
    stride_qb,
    stride_ql,
    stride_qn,
    stride_tqb,
    stride_tql,
    stride_tqn,
    stride_baseb,
    stride_basel,
    stride_basen,
    stride_tbaseb,
    stride_tbasel,
    stride_tbasen,
    stride_ob,  # of o and to
    stride_ol,
    stride_on,
    heads,
    length,
    tiles_per_program,
    FEATURE_MAP: tl.constexpr,
    TANGENT: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    EXACT: tl.constexpr = p_q.dtype.element_ty == tl.float32
    i_program, i_g = tl.program_id(0), tl.program_id(1)
    p_q += head_offset(i_g, heads, stride_qb, stride_qn)
    p_o += head_offset(i_g, heads, stride_ob, stride_on)
    i_d = tl.arange(0, D)
    p_state += i_g.to(tl.int64) * ((2 if TANGENT else 1) * (D + 1) * D)
    b_s, b_scale, b_z = load_state(p_state, D, p_q.dtype.element_ty)
    if TANGENT:
        p_tq += head_offset(i_g, heads, stride_tqb, stride_tqn)
        p_to += head_offset(i_g, heads, stride_ob, stride_on)
        b_ts, b_tscale, b_tz = load_state(p_state + (D + 1) * D, D, p_q.dtype.element_ty)
    if HAS_BASE:
        p_base += head_offset(i_g, heads, stride_baseb, stride_basen)
        if TANGENT:
            p_tbase += head_offset(i_g, heads, stride_tbaseb, stride_tbasen)
    if HAS_BIAS:
        b_bias = tl.load(p_bias + i_d).to(tl.float32)

    first = i_program * tiles_per_program
    # Loads are one tile ahead: what stands between them and the next is a product and two reductions.
    i_next = (first * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    end = tl.minimum(length, (first + tiles_per_program) * BLOCK)
    b_next_q = load_tokens(p_q, i_next, end, stride_ql, D)
    if HAS_BASE:
        b_next_base = load_tokens(p_base, i_next, end, stride_basel, D)
    for _ in range(first, tl.minimum(first + tiles_per_program, tl.cdiv(length, BLOCK))):
        i_t = i_next
        i_next += BLOCK
        m_t = (i_t < length)[:, None]
        b_q = b_next_q
        b_next_q = load_tokens(p_q, i_next, end, stride_ql, D)
        if HAS_BASE:
            b_base = b_next_base
            b_next_base = load_tokens(p_base, i_next, end, stride_basel, D)
        b_phi = features(b_q.to(tl.float32), FEATURE_MAP, EXACT)
        if TANGENT:
            b_tq = tl.load(p_tq + i_t[:, None] * stride_tql + i_d[None, :], mask=m_t, other=0.0).to(tl.float32)
            b_tphi = apply_jacobian(b_phi, b_tq, FEATURE_MAP).to(b_q.dtype)
        b_phi = b_phi.to(b_q.dtype)
        b_total = row_dots(b_phi.to(tl.float32), b_z[None, :], EXACT) + EPS  # [T]
        if EXACT:
            b_total = b_total.to(tl.float32)
            b_o = tl.div_rn(apply_state(b_phi, b_s, b_scale, EXACT), b_total[:, None])
        else:
            b_inverse = 1.0 / b_total
            b_o = tl.dot(b_phi, b_s, input_precision="ieee") * (b_scale * b_inverse)[:, None]
        if TANGENT:
            b_to = apply_state(b_tphi, b_s, b_scale, EXACT)
            b_to += apply_state(b_phi, b_ts, b_tscale, EXACT)
            if EXACT:
                b_tz_T = row_dots(b_tphi, b_z[None, :], EXACT) + row_dots(b_phi, b_tz[None, :], EXACT)
                b_to = tl.div_rn(b_to - b_o * b_tz_T.to(tl.float32)[:, None], b_total[:, None])
            else:
                b_tz_T = tl.sum(b_tphi.to(tl.float32) * b_z[None, :] + b_phi.to(tl.float32) * b_tz[None, :], 1)
                b_to = (b_to - b_o * b_tz_T[:, None]) * b_inverse[:, None]
        if HAS_BASE:
            b_o += b_base.to(tl.float32)
        if HAS_BIAS:
            b_o += b_bias[None, :]
        tl.store(p_o + i_t[:, None] * stride_ol + i_d[None, :], b_o.to(b_q.dtype), mask=m_t)
        if TANGENT:
            if HAS_BASE:
                p_tbase_T = p_tbase + i_t[:, None] * stride_tbasel + i_d[None, :]
                b_to += tl.load(p_tbase_T, mask=m_t, other=0.0).to(tl.float32)
            tl.store(p_to + i_t[:, None] * stride_ol + i_d[None, :], b_to.to(b_q.dtype), mask=m_t)


@triton.jit(do_not_specialize=("length", "tiles_per_program"))
def query_gradient_kernel(
    p_q,
    p_do,
    p_state,  # float32 (G, D + 1, D), projected if there is a projection
    p_dq,
    p_rows,  # float32 (G, 2, L): r and do . o of each query, for `state_gradient_kernel`
    stride_qb,
    stride_ql,
    stride_qn,
    stride_dob,
    stride_dol,
    stride_don,
    stride_dqb,
    stride_dql,
    stride_dqn,
    heads,
    length,
    tiles_per_program,
    FEATURE_MAP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d phi(q) = r (g - (do . o) z), with r = 1 / (phi(q) . z + eps) and g = do S^T.

    do . o = r phi(q) . g: neither o nor phi(q) S is needed.
    """
    EXACT: tl.constexpr = p_q.dtype.element_ty == tl.float32
    i_program, i_g = tl.program_id(0), tl.program_id(1)
    p_q += head_offset(i_g, heads, stride_qb, stride_qn)
    p_do += head_offset(i_g, heads, stride_dob, stride_don)
    p_dq += head_offset(i_g, heads, stride_dqb, stride_dqn)
    p_rows += i_g.to(tl.int64) * 2 * length
    i_d = tl.arange(0, D)
    b_s, b_scale, b_z = load_state(p_state + i_g.to(tl.int64) * ((D + 1) * D), D, p_q.dtype.element_ty)

    first = i_program * tiles_per_program
    for i_tile in range(first, tl.minimum(first + tiles_per_program, tl.cdiv(length, BLOCK))):
        i_t = (i_tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        m_t = i_t < length
        b_q = tl.load(p_q + i_t[:, None] * stride_ql + i_d[None, :], mask=m_t[:, None], other=0.0)
        b_do = tl.load(p_do + i_t[:, None] * stride_dol + i_d[None, :], mask=m_t[:, None], other=0.0)
        b_phi = features(b_q.to(tl.float32), FEATURE_MAP, EXACT)
        # As the forward rounded it: r belongs to the same denominator.
        b_total = row_dots(b_phi.to(b_q.dtype).to(tl.float32), b_z[None, :], EXACT) + EPS
        b_inverse = 1.0 / b_total
        b_g = apply_transposed(b_do, b_s, b_scale, EXACT)  # [T, D]
        b_delta = (row_dots(b_phi, b_g, EXACT) * b_inverse).to(tl.float32)  # [T]
        b_inverse = b_inverse.to(tl.float32)
        b_dphi = (b_g - b_delta[:, None] * b_z[None, :]) * b_inverse[:, None]
        b_dq = apply_jacobian(b_phi, b_dphi, FEATURE_MAP)
        tl.store(p_dq + i_t[:, None] * stride_dql + i_d[None, :], b_dq.to(b_q.dtype), mask=m_t[:, None])
        tl.store(p_rows + i_t, b_inverse, mask=m_t)
        tl.store(p_rows + length + i_t, b_delta, mask=m_t)


@triton.jit(do_not_specialize=("length", "tiles_per_program"))
def state_gradient_kernel(
    p_q,
    p_do,
    p_state,  # float32 (G, D + 1, D): only z is read, for its magnitude
    p_rows,  # float32 (G, 2, L) from `query_gradient_kernel`
    p_partial,  # float32 (G, programs, D + 1, D): dS and dz
    stride_qb,
    stride_ql,
    stride_qn,
    stride_dob,
    stride_dol,
    stride_don,
    heads,
    length,
    tiles_per_program,
    FEATURE_MAP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dS = sum r phi(q)^T do;  dz = -sum r (do . o) phi(q). A kernel of its own: with dq the registers would not do."""
    EXACT: tl.constexpr = p_q.dtype.element_ty == tl.float32
    i_program, i_g = tl.program_id(0), tl.program_id(1)
    p_q += head_offset(i_g, heads, stride_qb, stride_qn)
    p_do += head_offset(i_g, heads, stride_dob, stride_don)
    p_rows += i_g.to(tl.int64) * 2 * length
    i_d = tl.arange(0, D)
    # r phi(q) is of the order of 1 / tokens: times the largest z it keeps its bits in float16.
    b_zmax = 1.0
    if not EXACT:
        b_zmax = tl.max(tl.load(p_state + i_g.to(tl.int64) * ((D + 1) * D) + D * D + i_d), 0)
        b_zmax = tl.where(b_zmax > 0.0, b_zmax, 1.0)
    b_dst = tl.zeros((D, D), tl.float32)
    b_dphis = tl.zeros((BLOCK, D), tl.float32)

    first = i_program * tiles_per_program
    for i_tile in range(first, tl.minimum(first + tiles_per_program, tl.cdiv(length, BLOCK))):
        i_t = (i_tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        m_t = i_t < length
        b_q = tl.load(p_q + i_t[:, None] * stride_ql + i_d[None, :], mask=m_t[:, None], other=0.0)
        b_do = tl.load(p_do + i_t[:, None] * stride_dol + i_d[None, :], mask=m_t[:, None], other=0.0)
        b_weight = tl.load(p_rows + i_t, mask=m_t, other=0.0) * b_zmax  # 0: rows past the end add nothing
        b_delta = tl.load(p_rows + length + i_t, mask=m_t, other=0.0)
        b_phi = features(b_q.to(tl.float32), FEATURE_MAP, EXACT) * b_weight[:, None]
        b_dphis += b_phi * b_delta[:, None]
        b_dst = tl.dot(tl.trans(b_do), b_phi.to(b_q.dtype), b_dst, input_precision="ieee")

    p_partial += (i_g.to(tl.int64) * tl.num_programs(0) + i_program) * ((D + 1) * D)
    store_partial(p_partial, b_dst / b_zmax, -tl.sum(b_dphis, 0) / b_zmax, D)


@triton.jit(do_not_specialize=("length", "tiles_per_program"))
def key_gradient_kernel(
    p_k,
    p_v,
    p_dstate,  # float32 (G, D + 1, D): dS and dz
    p_dk,
    p_dv,
    stride_kb,
    stride_kl,
    stride_kn,
    stride_vb,
    stride_vl,
    stride_vn,
    stride_db,  # of dk and dv
    stride_dl,
    stride_dn,
    heads,
    length,
    tiles_per_program,
    FEATURE_MAP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dv = phi(k) dS;  d phi(k) = v dS^T + dz."""
    EXACT: tl.constexpr = p_k.dtype.element_ty == tl.float32
    i_program, i_g = tl.program_id(0), tl.program_id(1)
    p_k += head_offset(i_g, heads, stride_kb, stride_kn)
    p_v += head_offset(i_g, heads, stride_vb, stride_vn)
    p_dk += head_offset(i_g, heads, stride_db, stride_dn)
    p_dv += head_offset(i_g, heads, stride_db, stride_dn)
    i_d = tl.arange(0, D)
    b_ds, b_scale, b_dz = load_state(p_dstate + i_g.to(tl.int64) * ((D + 1) * D), D, p_k.dtype.element_ty)

    first = i_program * tiles_per_program
    for i_tile in range(first, tl.minimum(first + tiles_per_program, tl.cdiv(length, BLOCK))):
        i_t = (i_tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        m_t = (i_t < length)[:, None]
        b_k = tl.load(p_k + i_t[:, None] * stride_kl + i_d[None, :], mask=m_t, other=0.0)
        b_v = tl.load(p_v + i_t[:, None] * stride_vl + i_d[None, :], mask=m_t, other=0.0)
        b_phi = features(b_k.to(tl.float32), FEATURE_MAP, EXACT)
        b_dv = apply_state(b_phi.to(b_k.dtype), b_ds, b_scale, EXACT)
        tl.store(p_dv + i_t[:, None] * stride_dl + i_d[None, :], b_dv.to(b_k.dtype), mask=m_t)
        b_dphi = apply_transposed(b_v, b_ds, b_scale, EXACT) + b_dz[None, :]
        b_dk = apply_jacobian(b_phi, b_dphi, FEATURE_MAP)
        tl.store(p_dk + i_t[:, None] * stride_dl + i_d[None, :], b_dk.to(b_k.dtype), mask=m_t)
