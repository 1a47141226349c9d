// Atomics and the loads and stores with a cache hint. Blocks and threads run one at a time, so a plain read, change and
// write is atomic; a thread that waits for another by atomics lets the others run now and then.
#pragma once

#include "emulator.h"

#pragma GCC visibility push(hidden)

namespace minidiff::emulator {

void before_atomic(void* p, size_t bytes, bool checked, const Site&);

template <class T, class F>
inline T change(T* p, const Site& site, F f) {
  before_atomic(p, sizeof(T), MINIDIFF_CHECKED, site);
  T old = peek(p);
  poke(p, T(f(old)));
  return old;
}

}  // namespace minidiff::emulator

#define MINIDIFF_ATOMIC(name, expression)                                                                    \
  template <class T>                                                                                         \
  inline T name(T* p, typename minidiff::emulator::Same<T>::type v, MINIDIFF_WHERE) {                        \
    return minidiff::emulator::change(p, MINIDIFF_SITE(#name), [&](T old) -> T { return expression; });      \
  }
MINIDIFF_ATOMIC(atomicAdd, old + v)
MINIDIFF_ATOMIC(atomicSub, old - v)
MINIDIFF_ATOMIC(atomicMax, old < v ? v : old)
MINIDIFF_ATOMIC(atomicMin, v < old ? v : old)
MINIDIFF_ATOMIC(atomicAnd, old & v)
MINIDIFF_ATOMIC(atomicOr, old | v)
MINIDIFF_ATOMIC(atomicXor, old ^ v)
MINIDIFF_ATOMIC(atomicExch, ((void)old, v))
MINIDIFF_ATOMIC(atomicInc, old >= v ? T(0) : T(old + 1))
MINIDIFF_ATOMIC(atomicDec, old == 0 || old > v ? v : T(old - 1))
#undef MINIDIFF_ATOMIC

template <class T>
inline T atomicCAS(T* p, typename minidiff::emulator::Same<T>::type expected,
                   typename minidiff::emulator::Same<T>::type wanted, MINIDIFF_WHERE) {
  minidiff::emulator::Site site{"atomicCAS", file, line};
  T old = minidiff::emulator::change(p, site, [&](T now) { return now == expected ? wanted : now; });
  if (!(old == expected)) minidiff::emulator::yield(site);
  return old;
}

#define MINIDIFF_LOAD(name)                                                        \
  template <class T>                                                               \
  inline T name(const T* p, MINIDIFF_WHERE) {                                      \
    return minidiff::emulator::load(p, MINIDIFF_SITE(#name));                      \
  }
MINIDIFF_LOAD(__ldg)
MINIDIFF_LOAD(__ldcg)
MINIDIFF_LOAD(__ldca)
MINIDIFF_LOAD(__ldcs)
MINIDIFF_LOAD(__ldlu)
MINIDIFF_LOAD(__ldcv)
#undef MINIDIFF_LOAD
#define MINIDIFF_STORE(name)                                                       \
  template <class T>                                                               \
  inline void name(T* p, typename minidiff::emulator::Same<T>::type value, MINIDIFF_WHERE) { \
    minidiff::emulator::store(p, value, MINIDIFF_SITE(#name));                     \
  }
MINIDIFF_STORE(__stwb)
MINIDIFF_STORE(__stcg)
MINIDIFF_STORE(__stcs)
MINIDIFF_STORE(__stwt)
#undef MINIDIFF_STORE

#pragma GCC visibility pop
