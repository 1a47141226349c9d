// The instructions around tensor cores: mma.sync, ldmatrix and cp.async. What each lane holds is written in cuda/ptx.h.
//
// A copy of cp.async is as late as it may be. Its source is read at once, the destination is poisoned with NaN, and the data
// lands at the wait of the thread that copied. Each thread keeps its copies in a list, oldest first, with the number of the
// group they belong to; a wait lands those of all groups but the last few.
#include "tensor.h"

#include <cstring>

#include "state.h"
#include "warp.h"

namespace minidiff::emulator {
namespace {

Machine& m = machine;

// ---- mma

struct Fragments {
  float* d;
  const unsigned *a, *b;
  const float* c;
};

// Registers to matrices: a (16 x K), b (K x 8), c (16 x 8).
struct Matrices {
  float a[16][16], b[16][8], c[16][8];
};

struct Bf16 {
  static float low(unsigned r) { return bit_cast<float>(r << 16); }
  static float high(unsigned r) { return bit_cast<float>(r & 0xffff0000); }
};
struct F16 {
  static float low(unsigned r) { return f16_value(uint16_t(r)); }
  static float high(unsigned r) { return f16_value(uint16_t(r >> 16)); }
};

template <class Pair>
void unpack_pairs(void* const* records, Matrices& M) {
  for (int l = 0; l < 32; l++) {
    const auto& f = *static_cast<const Fragments*>(records[l]);
    int g = l >> 2, t = l & 3;
    for (int i = 0; i < 4; i++) {
      float* row = &M.a[g + (i & 1) * 8][2 * t + (i >> 1) * 8];
      row[0] = Pair::low(f.a[i]);
      row[1] = Pair::high(f.a[i]);
    }
    for (int i = 0; i < 2; i++) {
      M.b[2 * t + i * 8][g] = Pair::low(f.b[i]);
      M.b[2 * t + i * 8 + 1][g] = Pair::high(f.b[i]);
    }
  }
}

void unpack_tf32(void* const* records, Matrices& M) {
  auto value = [](unsigned r) { return bit_cast<float>(r & ~0x1fffu); };
  for (int l = 0; l < 32; l++) {
    const auto& f = *static_cast<const Fragments*>(records[l]);
    int g = l >> 2, t = l & 3;
    for (int i = 0; i < 4; i++) M.a[g + (i & 1) * 8][t + (i >> 1) * 4] = value(f.a[i]);
    for (int i = 0; i < 2; i++) M.b[t + i * 4][g] = value(f.b[i]);
  }
}

#if defined(__x86_64__)
#define WITH_WIDE_VECTORS __attribute__((target_clones("avx2", "default")))  // without fused multiply-adds: the same bits
#else
#define WITH_WIDE_VECTORS
#endif

WITH_WIDE_VECTORS void multiply_add(Matrices& M, int K) {
  typedef float Row __attribute__((vector_size(32)));
  Row b[16];
  for (int k = 0; k < K; k++) memcpy(&b[k], M.b[k], 32);
  for (int i = 0; i < 16; i++) {
    Row sum;
    memcpy(&sum, M.c[i], 32);
    for (int k = 0; k < K; k++) sum += M.a[i][k] * b[k];
    memcpy(M.c[i], &sum, 32);
  }
}

void multiply(void* const* records, Matrices& M, int K) {
  for (int l = 0; l < 32; l++) {
    const float* c = static_cast<const Fragments*>(records[l])->c;
    for (int i = 0; i < 4; i++) M.c[(l >> 2) + (i >> 1) * 8][2 * (l & 3) + (i & 1)] = c[i];
  }
  multiply_add(M, K);
  for (int l = 0; l < 32; l++) {
    float* d = static_cast<const Fragments*>(records[l])->d;
    for (int i = 0; i < 4; i++) d[i] = M.c[(l >> 2) + (i >> 1) * 8][2 * (l & 3) + (i & 1)];
  }
}

void multiply_bf16(void* const* records, unsigned, const Site&) {
  Matrices M;
  unpack_pairs<Bf16>(records, M);
  multiply(records, M, 16);
}
void multiply_f16(void* const* records, unsigned, const Site&) {
  Matrices M;
  unpack_pairs<F16>(records, M);
  multiply(records, M, 16);
}
void multiply_tf32(void* const* records, unsigned, const Site&) {
  Matrices M;
  unpack_tf32(records, M);
  multiply(records, M, 8);
}

// ---- ldmatrix

struct Loading {
  unsigned* parts;
  const char* row;
  int count;
  bool transposed;
};

void load_all(void* const* records, unsigned, const Site&) {
  auto lane_record = [&](int l) -> const Loading& { return *static_cast<const Loading*>(records[l]); };
  for (int matrix = 0; matrix < lane_record(0).count; matrix++) {
    uint16_t rows[8][8];
    for (int r = 0; r < 8; r++) memcpy(rows[r], lane_record(8 * matrix + r).row, 16);
    for (int l = 0; l < 32; l++) {
      int r = l / 4, k = 2 * (l % 4);
      bool t = lane_record(l).transposed;
      uint16_t low = t ? rows[k][r] : rows[r][k], high = t ? rows[k + 1][r] : rows[r][k + 1];
      lane_record(l).parts[matrix] = unsigned(high) << 16 | low;
    }
  }
}

// ---- cp.async

void land(Thread& t, unsigned groups_before) {
  while (t.first_copy >= 0 && int(m.copies[t.first_copy].group - groups_before) < 0) {
    int i = t.first_copy;
    Copy& c = m.copies[i];
    memcpy(c.to, c.data, c.bytes);
    if (m.checked) check_copy_end(c.to, c.bytes, c.site);
    t.first_copy = c.next;
    c.next = m.free_copy;
    m.free_copy = i;
  }
}

int new_copy() {
  if (m.free_copy < 0) {
    Quiet quiet;
    m.copies.emplace_back();
    return int(m.copies.size()) - 1;
  }
  int i = m.free_copy;
  m.free_copy = m.copies[i].next;
  return i;
}

void require_aligned(const void* p, size_t bytes, const Site& site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes == 0) return;
  m.owner = nullptr;
  std::string what = "misaligned: the address is no multiple of " + std::to_string(bytes) + " bytes";
  fail_here(site, what.c_str());
}

}  // namespace

void multiply_fragments(const Site& site, Operand operand, float* d, const unsigned* a, const unsigned* b, const float* c) {
  Fragments f{d, a, b, c};
  Compute compute = operand == Operand::bf16 ? multiply_bf16 : operand == Operand::f16 ? multiply_f16 : multiply_tf32;
  whole_warp(site, &f, compute);
}

void load_matrices(const Site& site, int count, bool transposed, unsigned* parts, const void* row) {
  if (int(lane()) < 8 * count) {
    require_aligned(row, 16, site);
    if (!is_shared(row) || !is_shared(static_cast<const char*>(row) + 15))
      fail_here(site, "out of bounds: the row is not in shared memory");
    if (m.checked) touched(row, 16, Access::read, site);
  }
  Loading l{parts, static_cast<const char*>(row), count, transposed};
  whole_warp(site, &l, load_all);
}

void copy_async(void* to, const void* from, int bytes, int source_bytes, const Site& site) {
  require_aligned(to, size_t(bytes), site);
  if (source_bytes < 0 || source_bytes > bytes) fail_here(site, "the source has fewer than 0 or more bytes than are copied");
  if (source_bytes) require_aligned(from, size_t(bytes), site);
  if (!is_shared(to) || !is_shared(static_cast<char*>(to) + bytes - 1))
    fail_here(site, "out of bounds: the destination is not in shared memory");
  if (source_bytes && is_shared(from)) fail_here(site, "the source is in shared memory, not in global");
  if (m.checked) check_copy_start(to, size_t(bytes), from, size_t(source_bytes), site);
  int i = new_copy();
  Thread& t = *m.current;
  t.site = site;
  Copy& c = m.copies[i];
  c = {static_cast<char*>(to), uint8_t(bytes), t.group, -1, site, {}};
  memcpy(c.data, from, size_t(source_bytes));
  memset(to, 0xff, size_t(bytes));
  if (t.first_copy < 0) t.first_copy = i;
  else m.copies[t.last_copy].next = i;
  t.last_copy = i;
}

void commit_copies() { m.current->group++; }

void wait_copies(unsigned groups_left, const Site& site) {
  if (!m.skipped.empty() && is_skipped(site)) return;
  note_sync(site);
  Thread& t = *m.current;
  land(t, t.group - groups_left);
}

void wait_all_copies(const Site& site) {
  if (!m.skipped.empty() && is_skipped(site)) return;
  note_sync(site);
  Thread& t = *m.current;
  land(t, ++t.group);
}

}  // namespace minidiff::emulator
