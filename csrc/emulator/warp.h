// Barriers and the instructions of a warp: shuffles, votes, matches, reductions. Each is a collective: every lane of the
// mask brings a record on its stack, and the last to arrive writes all the answers.
#pragma once

#include "emulator.h"

#pragma GCC visibility push(hidden)

inline void __syncthreads(MINIDIFF_WHERE) { minidiff::emulator::barrier(MINIDIFF_SITE("__syncthreads"), false); }
inline int __syncthreads_and(int p, MINIDIFF_WHERE) {
  return minidiff::emulator::barrier(MINIDIFF_SITE("__syncthreads_and"), p).all;
}
inline int __syncthreads_or(int p, MINIDIFF_WHERE) {
  return minidiff::emulator::barrier(MINIDIFF_SITE("__syncthreads_or"), p).any;
}
inline int __syncthreads_count(int p, MINIDIFF_WHERE) {
  return minidiff::emulator::barrier(MINIDIFF_SITE("__syncthreads_count"), p).count;
}
inline void __syncwarp(unsigned mask = ~0u, MINIDIFF_WHERE) {
  minidiff::emulator::sync_warp(MINIDIFF_SITE("__syncwarp"), mask);
}
inline unsigned __activemask() { return minidiff::emulator::live_lanes(); }

namespace minidiff::emulator {

template <class F>
inline void each_lane(unsigned mask, F f) {
  for (; mask; mask &= mask - 1) f(unsigned(__builtin_ctz(mask)));
}

template <class T>
struct Shuffle {
  T value, result;
  int source;  // a lane; -1: keep the own value
};
template <class T>
void shuffle_all(void* const* records, unsigned mask, const Site& site) {
  for (unsigned m = mask; m; m &= m - 1) {
    auto* mine = static_cast<Shuffle<T>*>(records[__builtin_ctz(m)]);
    if (mine->source < 0) continue;
    if (!(mask >> mine->source & 1)) outside_mask(site, mask, mine->source);
    mine->result = static_cast<Shuffle<T>*>(records[mine->source])->value;
  }
}
template <class T>
inline T shuffle(const Site& site, unsigned mask, T value, int source) {
  Shuffle<T> record{value, value, source};
  collective(site, mask, &record, shuffle_all<T>);
  return record.result;
}

// A warp is cut into parts of `width` lanes; a shuffle stays in the part.
inline int part_of(int l, int width) { return l & ~(width - 1); }

template <class In, class Out>
struct Asked {
  In value;
  Out answer;
};

inline void ballot_all(void* const* records, unsigned mask, const Site&) {
  using Record = Asked<bool, unsigned>;
  unsigned bits = 0;
  each_lane(mask, [&](unsigned l) { bits |= unsigned(static_cast<Record*>(records[l])->value) << l; });
  each_lane(mask, [&](unsigned l) { static_cast<Record*>(records[l])->answer = bits; });
}
inline unsigned ballot(const Site& site, unsigned mask, bool predicate) {
  Asked<bool, unsigned> record{predicate, 0};
  collective(site, mask, &record, ballot_all);
  return record.answer;
}

template <class T>
void match_any(void* const* records, unsigned mask, const Site&) {
  using Record = Asked<T, unsigned>;
  each_lane(mask, [&](unsigned l) {
    auto* mine = static_cast<Record*>(records[l]);
    auto same = [&](unsigned other) { return static_cast<Record*>(records[other])->value == mine->value; };
    mine->answer = 0;
    each_lane(mask, [&](unsigned other) { mine->answer |= unsigned(same(other)) << other; });
  });
}

template <class T, T (*combine)(T, T)>
void reduce_all(void* const* records, unsigned mask, const Site&) {
  using Record = Asked<T, T>;
  T total = static_cast<Record*>(records[__builtin_ctz(mask)])->value;
  each_lane(mask & (mask - 1), [&](unsigned l) { total = combine(total, static_cast<Record*>(records[l])->value); });
  each_lane(mask, [&](unsigned l) { static_cast<Record*>(records[l])->answer = total; });
}
template <class T, T (*combine)(T, T)>
inline T reduce(const Site& site, unsigned mask, T value) {
  Asked<T, T> record{value, value};
  collective(site, mask, &record, reduce_all<T, combine>);
  return record.answer;
}
template <class T>
T add(T a, T b) { return T(unsigned(a) + unsigned(b)); }
template <class T>
T smaller(T a, T b) { return b < a ? b : a; }
template <class T>
T larger(T a, T b) { return a < b ? b : a; }
inline unsigned bit_and(unsigned a, unsigned b) { return a & b; }
inline unsigned bit_or(unsigned a, unsigned b) { return a | b; }
inline unsigned bit_xor(unsigned a, unsigned b) { return a ^ b; }

}  // namespace minidiff::emulator

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, MINIDIFF_WHERE) {
  int l = int(minidiff::emulator::lane());
  int from = minidiff::emulator::part_of(l, width) + (source & (width - 1));
  return minidiff::emulator::shuffle(MINIDIFF_SITE("__shfl_sync"), mask, value, from);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, MINIDIFF_WHERE) {
  int l = int(minidiff::emulator::lane()), from = l ^ lane_mask;  // an earlier part may be read, a later one not
  if (from >= minidiff::emulator::part_of(l, width) + width) from = -1;
  return minidiff::emulator::shuffle(MINIDIFF_SITE("__shfl_xor_sync"), mask, value, from);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, MINIDIFF_WHERE) {
  int l = int(minidiff::emulator::lane()), from = l + int(delta);
  if (from >= minidiff::emulator::part_of(l, width) + width) from = -1;
  return minidiff::emulator::shuffle(MINIDIFF_SITE("__shfl_down_sync"), mask, value, from);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, MINIDIFF_WHERE) {
  int l = int(minidiff::emulator::lane()), from = l - int(delta);
  if (from < minidiff::emulator::part_of(l, width)) from = -1;
  return minidiff::emulator::shuffle(MINIDIFF_SITE("__shfl_up_sync"), mask, value, from);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, MINIDIFF_WHERE) {
  return minidiff::emulator::ballot(MINIDIFF_SITE("__ballot_sync"), mask, predicate);
}
inline int __any_sync(unsigned mask, int predicate, MINIDIFF_WHERE) {
  return minidiff::emulator::ballot(MINIDIFF_SITE("__any_sync"), mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate, MINIDIFF_WHERE) {
  return minidiff::emulator::ballot(MINIDIFF_SITE("__all_sync"), mask, !predicate) == 0;
}
template <class T>
inline unsigned __match_any_sync(unsigned mask, T value, MINIDIFF_WHERE) {
  minidiff::emulator::Asked<T, unsigned> record{value, 0};
  minidiff::emulator::collective(MINIDIFF_SITE("__match_any_sync"), mask, &record, minidiff::emulator::match_any<T>);
  return record.answer;
}
template <class T>
inline unsigned __match_all_sync(unsigned mask, T value, int* predicate, MINIDIFF_WHERE) {
  minidiff::emulator::Asked<T, unsigned> record{value, 0};
  minidiff::emulator::collective(MINIDIFF_SITE("__match_all_sync"), mask, &record, minidiff::emulator::match_any<T>);
  unsigned all = minidiff::emulator::ballot(MINIDIFF_SITE("__match_all_sync"), mask, true);
  *predicate = record.answer == all;
  return *predicate ? all : 0;
}

#define MINIDIFF_REDUCE(name, T, combine)                                                                          \
  inline T name(unsigned mask, T value, MINIDIFF_WHERE) {                                                          \
    return minidiff::emulator::reduce<T, minidiff::emulator::combine>(MINIDIFF_SITE(#name), mask, value);          \
  }
MINIDIFF_REDUCE(__reduce_add_sync, int, add)
MINIDIFF_REDUCE(__reduce_add_sync, unsigned, add)
MINIDIFF_REDUCE(__reduce_min_sync, int, smaller)
MINIDIFF_REDUCE(__reduce_min_sync, unsigned, smaller)
MINIDIFF_REDUCE(__reduce_max_sync, int, larger)
MINIDIFF_REDUCE(__reduce_max_sync, unsigned, larger)
MINIDIFF_REDUCE(__reduce_and_sync, unsigned, bit_and)
MINIDIFF_REDUCE(__reduce_or_sync, unsigned, bit_or)
MINIDIFF_REDUCE(__reduce_xor_sync, unsigned, bit_xor)
#undef MINIDIFF_REDUCE

inline void __threadfence() { minidiff::emulator::fence(); }
inline void __threadfence_block() { minidiff::emulator::fence(); }
inline void __threadfence_system() { minidiff::emulator::fence(); }
inline void __nanosleep(unsigned, MINIDIFF_WHERE) { minidiff::emulator::yield(MINIDIFF_SITE("__nanosleep")); }
[[noreturn]] inline void __trap(MINIDIFF_WHERE) {
  minidiff::emulator::fail_here(MINIDIFF_SITE("__trap"), "the kernel gave up");
}
inline long long clock64() { return minidiff::emulator::clock(); }
inline unsigned long long globaltimer() { return (unsigned long long)minidiff::emulator::clock(); }

#pragma GCC visibility pop
