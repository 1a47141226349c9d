// Attention by blocks, with the online softmax: memory grows with the number of tokens, not with its square.
//
//   for each head and block of queries:            keys in blocks of KEYS ──►
//     S = scale Q K^T + bias                     ┌───────┬───────┬───────┐
//     m' = max(m, rows of S)                     │  S    │       │       │  QUERIES rows: S and P stay in the
//     P = exp(S - m')                            └───────┴───────┴───────┘  first-level cache, O in the second
//     l = l exp(m - m') + rows of P
//     O = O exp(m - m') + P V          at the end  y = O / l,  lse = m + log l
//
// Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135. The backward computes P = exp(S - lse)
// again, block by block. All products run on the two micro-kernels of gemm.h: P is written in the blocked layout that
// they read.
#include "gemm.h"
#include "../kernels.h"
#include "pool.h"

namespace minidiff::MINIDIFF_ISA {
namespace {

constexpr int QUERIES = 4 * ROWS;
constexpr int MANY = (QUERIES + VL - 1) / VL * VL;  // room for one number a row, in whole vectors
constexpr int KEYS = 128;  // a multiple of every PANEL and of BLOCK
static_assert(KEYS % PANEL == 0);

INLINE float minus_infinity() { return -__builtin_inff(); }

// Rows of one head as panels over channels, [c/PANEL][row][width]; rows up to `padded` are zero.
void pack_panels(const float* x, long step, int C, int rows, int padded, float* out, long panel) {
  for (int c = 0; c < C; c += PANEL) {
    int width = panel_width(C, c);
    for (int r = 0; r < padded; r++)
      for (int v = 0; v < width; v += VL)
        store(out + c / PANEL * panel + r * width + v, r < rows ? load_first(x + r * step + c + v, C - c - v) : (vf){});
  }
}
// The same with rows PANEL apart, as outer_product reads them.
void pack_wide(const float* x, long step, int C, int rows, float* out, long panel) {
  for (int c = 0; c < C; c += VL)
    for (int r = 0; r < rows; r++)
      store(out + c / PANEL * panel + r * PANEL + c % PANEL, load_first(x + r * step + c, C - c));
}
// Rows transposed, a panel for every PANEL rows: [row/PANEL][c][width]; rows up to a multiple of BLOCK are zero.
void pack_transposed(const float* x, long step, int C, int rows, float* out, long panel) {
  Weights w{x, C, rows, step, true};
  for (int n = 0, padded = (int)round_up(rows, BLOCK); n < padded; n += PANEL) {
    int width = panel_width(padded, n);
    for (int c = 0; c < C; c += BLOCK) pack_block(w, c, n, width, out + n / PANEL * panel + c * width);
  }
}

struct Sizes {
  int db, dvb;                                // blocks of 16 channels in d and dv
  long q_channel, k_panel, v_panel, p_block;  // floats between channel blocks of q, panels of k and v, key blocks of P
  explicit Sizes(const Attention& a)
      : db(blocks(a.d)),
        dvb(blocks(a.dv)),
        q_channel(QUERIES * BLOCK + BLOCK),
        k_panel((long)db * BLOCK * PANEL + BLOCK),
        v_panel((long)KEYS * PANEL + BLOCK),
        p_block(QUERIES * BLOCK + BLOCK) {}
};

// S (rows x KEYS, row-major) = Qpacked Kpacked^T
void scores(const float* q, int rows, const Sizes& s, int d, const float* k, int keys, float* S) {
  int db = blocks(d), last = d - (db - 1) * BLOCK;
  long offsets[MAX_CHANNELS / BLOCK];
  for (int i = 0; i < db; i++) offsets[i] = i * s.q_channel;
  for (int n = 0, padded = (int)round_up(keys, BLOCK); n < padded; n += PANEL) {
    int width = panel_width(padded, n);
    multiply(q, rows, offsets, db, k + n / PANEL * ((long)db * BLOCK * PANEL + BLOCK), width,
             Tile{S + n, 0, KEYS, width, false, nullptr, nullptr, last});
  }
}

// Adds the bias and hides keys that a query may not see (behind the last, or later than the query if causal).
void mask_row(const Attention& a, int b, int h, int i, int j0, int keys, float* S) {
  if (a.bias) {
    const float* p = a.bias + b * a.bias_strides[0] + h * a.bias_strides[1] + i * a.bias_strides[2];
    if (a.bias_strides[3] == 1)
      for (int j = 0; j < keys; j += VL) store(S + j, load(S + j) + load_first(p + j0 + j, keys - j));
    else
      for (int j = 0; j < keys; j++) S[j] += p[(j0 + j) * a.bias_strides[3]];
  }
  int seen = a.causal ? least(keys, i - j0 + 1) : keys;
  for (int j = most(0, seen); j < (int)round_up(keys, BLOCK); j++) S[j] = minus_infinity();
}

const float* head(const float* x, int b, int L, int first, int heads, int d, int h) {
  return x + ((long)b * L + first) * heads * d + (long)h * d;
}

}  // namespace

void attention_forward(const Attention& a) {
  if ((long)a.B * a.heads * a.Lq == 0) return;
  Sizes s(a);
  int T = num_threads(), HB = a.B * a.heads, qblocks = (a.Lq + QUERIES - 1) / QUERIES;
  int kblocks = (a.Lk + KEYS - 1) / KEYS, vp = panels(a.dv);
  int parts = HB >= 2 * T ? 1 : least(qblocks, (2 * T + HB - 1) / HB);
  long lane_size = s.db * s.q_channel + (KEYS / PANEL) * s.k_panel + vp * s.v_panel + QUERIES * KEYS +
                   (KEYS / BLOCK) * s.p_block + QUERIES * round_up(a.dv, PANEL) + (VL + 3) * MANY;
  // K and V of a head are packed block by block for each block of queries: with few queries a block that costs as much
  // as the products, so several blocks of queries share it.
  constexpr int TOGETHER = 4;
  lane_size += (TOGETHER - 1) * (s.db * s.q_channel + (long)QUERIES * round_up(a.dv, PANEL) + (VL + 1) * MANY);
  lane_size = round_up(lane_size, BLOCK);
  float* lanes = scratch(T * lane_size);
  parallel(HB * parts, [&](int task, int lane) {
    int b = task / parts / a.heads, h = task / parts % a.heads;
    int first = (long)qblocks * (task % parts) / parts, last = (long)qblocks * (task % parts + 1) / parts;
    long o_row = round_up(a.dv, PANEL);
    float* q = lanes + lane * lane_size;
    float* k = q + TOGETHER * s.db * s.q_channel;
    float* v = k + (KEYS / PANEL) * s.k_panel;
    float* S = v + vp * s.v_panel;
    float* P = S + QUERIES * KEYS;
    float* O = P + (KEYS / BLOCK) * s.p_block;
    float* m = O + TOGETHER * QUERIES * o_row;
    float* l = m + TOGETHER * MANY;  // VL partial sums a row
    float* shrink = l + TOGETHER * MANY * VL;
    float* base = shrink + MANY;
    long p_offsets[KEYS / BLOCK];
    for (int i = 0; i < KEYS / BLOCK; i++) p_offsets[i] = i * s.p_block;
    for (int group = first; group < last; group += TOGETHER) {
      int count = least(TOGETHER, last - group);
      for (int g = 0; g < count; g++) {
        int i0 = (group + g) * QUERIES, rows = least(QUERIES, a.Lq - i0);
        pack_rows(head(a.q, b, a.Lq, i0, a.heads, a.d, h), (long)a.heads * a.d, a.d, rows, a.scale,
                  q + g * s.db * s.q_channel, s.q_channel);
      }
      for (int i = 0; i < count * MANY; i++) m[i] = minus_infinity();
      for (int kb = 0; kb < kblocks; kb++) {
        int j0 = kb * KEYS, keys = least(KEYS, a.Lk - j0), padded = (int)round_up(keys, BLOCK);
        if (a.causal && j0 > (group + count) * QUERIES - 1) break;
        pack_transposed(head(a.k, b, a.Lk, j0, a.heads, a.d, h), (long)a.heads * a.d, a.d, keys, k, s.k_panel);
        pack_panels(head(a.v, b, a.Lk, j0, a.heads, a.dv, h), (long)a.heads * a.dv, a.dv, keys, padded, v, s.v_panel);
        for (int g = 0; g < count; g++) {
          int i0 = (group + g) * QUERIES, rows = least(QUERIES, a.Lq - i0);
          float *Og = O + g * QUERIES * o_row, *mg = m + g * MANY, *lg = l + g * MANY * VL;
          scores(q + g * s.db * s.q_channel, rows, s, a.d, k, keys, S);
          for (int r = 0; r < rows; r++) {
            float* row = S + r * KEYS;
            mask_row(a, b, h, i0 + r, j0, keys, row);
            vf high = load(row);
            for (int j = VL; j < padded; j += VL) high = vmax(high, load(row + j));
            base[r] = highest(high);
          }
          for (int r = 0; r < rows; r += VL) {  // where no key has been seen yet, exp(-infinity - 0) is 0
            vf before = load(mg + r), next = vmax(load(base + r), before);
            vf from = next == minus_infinity() ? (vf){} : next;
            store(mg + r, next);
            store(base + r, from);
            store(shrink + r, vexp(before - from));
          }
          for (int r = 0; r < rows; r++) {
            vf from = all(base[r]), total = {};
            if (kb > 0) total = load(lg + r * VL) * shrink[r];
            for (int j = 0; j < padded; j += VL) {
              vf e = vexp(load(S + r * KEYS + j) - from);
              total += e;
              store(P + j / BLOCK * s.p_block + r * BLOCK + j % BLOCK, e);
            }
            store(lg + r * VL, total);
            if (kb > 0 && shrink[r] != 1.0f)
              for (int c = 0; c < o_row; c += VL) store(Og + r * o_row + c, load(Og + r * o_row + c) * shrink[r]);
          }
          for (int n = 0; n < vp; n++)
            multiply(P, rows, p_offsets, padded / BLOCK, v + n * s.v_panel, panel_width(a.dv, n * PANEL),
                     Tile{Og + n * PANEL, 0, o_row, panel_width(a.dv, n * PANEL), kb > 0, nullptr, nullptr});
        }
      }
      for (int g = 0; g < count; g++) {
        int i0 = (group + g) * QUERIES, rows = least(QUERIES, a.Lq - i0);
        for (int r = 0; r < rows; r++) {
          float sums = sum(load(l + (g * MANY + r) * VL));
          float* y = (float*)head(a.y, b, a.Lq, i0 + r, a.heads, a.dv, h);
          for (int c = 0; c < a.dv; c += VL)
            store_first(y + c, load(O + (g * QUERIES + r) * o_row + c) / sums, a.dv - c);
          if (a.lse) a.lse[((long)b * a.heads + h) * a.Lq + i0 + r] = m[g * MANY + r] + __builtin_logf(sums);
        }
      }
    }
  });
}

// For each head, blocks of keys outside and blocks of queries inside: dK and dV of a block are added up in cache.
//   dV = P^T dY,  dP = dY V^T,  dS = P (dP - rows of dY . Y),  dQ = scale dS K,  dK = scale dS^T Q
void attention_backward(const Attention& a) {
  if ((long)a.B * a.heads == 0) return;
  memset(a.dq, 0, sizeof(float) * a.B * a.Lq * a.heads * a.d);
  Sizes s(a);
  int T = num_threads(), HB = a.B * a.heads;
  int kblocks = (a.Lk + KEYS - 1) / KEYS, dp = panels(a.d), vp = panels(a.dv);
  long g_channel = s.q_channel, vt_panel = (long)s.dvb * BLOCK * PANEL + BLOCK, wide = (long)QUERIES * PANEL + BLOCK;
  long dk_row = round_up(a.d, PANEL), dv_row = round_up(a.dv, PANEL);
  long lane_size = s.db * s.q_channel + s.dvb * g_channel + (dp + vp) * wide + (KEYS / PANEL) * (s.k_panel + vt_panel) +
                   dp * s.v_panel + 2L * QUERIES * KEYS + 2L * (KEYS / BLOCK) * s.p_block + KEYS * (dk_row + dv_row) +
                   a.Lq;
  lane_size = round_up(lane_size, BLOCK);
  float* lanes = scratch(T * lane_size);
  long q_step = (long)a.heads * a.d, v_step = (long)a.heads * a.dv;
  parallel(HB, [&](int task, int lane) {
    int b = task / a.heads, h = task % a.heads;
    float* q = lanes + lane * lane_size;        // Q in blocks, for S
    float* g = q + s.db * s.q_channel;          // dY in blocks, for dP
    float* q_wide = g + s.dvb * g_channel;      // Q in panels, for dK
    float* g_wide = q_wide + dp * wide;         // dY in panels, for dV
    float* kt = g_wide + vp * wide;             // K transposed, for S
    float* vt = kt + (KEYS / PANEL) * s.k_panel;   // V transposed, for dP
    float* k = vt + (KEYS / PANEL) * vt_panel;     // K in panels, for dQ
    float* S = k + dp * s.v_panel;
    float* dP = S + QUERIES * KEYS;
    float* P = dP + QUERIES * KEYS;
    float* dS = P + (KEYS / BLOCK) * s.p_block;
    float* dk = dS + (KEYS / BLOCK) * s.p_block;
    float* dv = dk + KEYS * dk_row;
    float* delta = dv + KEYS * dv_row;
    long offsets[KEYS / BLOCK];
    for (int i = 0; i < KEYS / BLOCK; i++) offsets[i] = i * s.p_block;
    for (int i = 0; i < a.Lq; i++) {
      const float *y = head(a.y, b, a.Lq, i, a.heads, a.dv, h), *dy = head(a.dy, b, a.Lq, i, a.heads, a.dv, h);
      vf t = {};
      for (int c = 0; c < a.dv; c += VL) t += load_first(y + c, a.dv - c) * load_first(dy + c, a.dv - c);
      delta[i] = sum(t);
    }
    for (int kb = 0; kb < kblocks; kb++) {
      int j0 = kb * KEYS, keys = least(KEYS, a.Lk - j0), padded = (int)round_up(keys, BLOCK);
      const float *k_in = head(a.k, b, a.Lk, j0, a.heads, a.d, h), *v_in = head(a.v, b, a.Lk, j0, a.heads, a.dv, h);
      pack_transposed(k_in, q_step, a.d, keys, kt, s.k_panel);
      pack_transposed(v_in, v_step, a.dv, keys, vt, vt_panel);
      pack_panels(k_in, q_step, a.d, keys, padded, k, s.v_panel);
      memset(dk, 0, sizeof(float) * KEYS * (dk_row + dv_row));
      for (int i0 = 0; i0 < a.Lq; i0 += QUERIES) {
        int rows = least(QUERIES, a.Lq - i0);
        if (a.causal && j0 > i0 + rows - 1) continue;
        const float *q_in = head(a.q, b, a.Lq, i0, a.heads, a.d, h), *g_in = head(a.dy, b, a.Lq, i0, a.heads, a.dv, h);
        pack_rows(q_in, q_step, a.d, rows, a.scale, q, s.q_channel);
        pack_rows(g_in, v_step, a.dv, rows, 1, g, g_channel);
        pack_wide(q_in, q_step, a.d, rows, q_wide, wide);
        pack_wide(g_in, v_step, a.dv, rows, g_wide, wide);
        scores(q, rows, s, a.d, kt, keys, S);
        scores(g, rows, s, a.dv, vt, keys, dP);
        for (int r = 0; r < rows; r++) {
          float* row = S + r * KEYS;
          mask_row(a, b, h, i0 + r, j0, keys, row);
          float lse = a.lse[((long)b * a.heads + h) * a.Lq + i0 + r], d = delta[i0 + r];
          for (int j = 0; j < padded; j += VL) {
            vf p = vexp(load(row + j) - lse);
            vf ds = p * (load(dP + r * KEYS + j) - d) * a.scale;
            store(P + j / BLOCK * s.p_block + r * BLOCK + j % BLOCK, p);
            store(dS + j / BLOCK * s.p_block + r * BLOCK + j % BLOCK, ds);
          }
        }
        for (int n = 0; n < vp; n++)
          for (int j = 0; j < padded; j += BLOCK)
            outer_block(P + j / BLOCK * s.p_block, 0, g_wide + n * wide, 0, 1, rows, dv + j * dv_row + n * PANEL, dv_row,
                        BLOCK, panel_width(a.dv, n * PANEL), PANEL, true);
        for (int n = 0; n < dp; n++) {
          for (int j = 0; j < padded; j += BLOCK)
            outer_block(dS + j / BLOCK * s.p_block, 0, q_wide + n * wide, 0, 1, rows, dk + j * dk_row + n * PANEL, dk_row,
                        BLOCK, panel_width(a.d, n * PANEL), PANEL, true);
          multiply(dS, rows, offsets, padded / BLOCK, k + n * s.v_panel, panel_width(a.d, n * PANEL),
                   Tile{(float*)head(a.dq, b, a.Lq, i0, a.heads, a.d, h) + n * PANEL, 0, q_step, a.d - n * PANEL, true,
                        nullptr, nullptr});
        }
      }
      for (int j = 0; j < keys; j++) {
        float *to_k = (float*)head(a.dk, b, a.Lk, j0 + j, a.heads, a.d, h);
        float *to_v = (float*)head(a.dv_out, b, a.Lk, j0 + j, a.heads, a.dv, h);
        for (int c = 0; c < a.d; c += VL) store_first(to_k + c, load(dk + j * dk_row + c), a.d - c);
        for (int c = 0; c < a.dv; c += VL) store_first(to_v + c, load(dv + j * dv_row + c), a.dv - c);
      }
    }
  });
}

}  // namespace minidiff::MINIDIFF_ISA
