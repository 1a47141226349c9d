// A fiber is a stack and, while it sleeps, the address of its top. switch_fiber pushes the registers that a function must
// preserve, changes stacks, and pops those of the other fiber: 5 ns, a hundredth of swapcontext, which asks the kernel.
//
//   sleeping stack:  ... frames ... | return address | rbp | rbx | r12 | r13 | r14 | r15 | <- top
#pragma once

#include <stdint.h>
#include <string.h>

#pragma GCC visibility push(hidden)

namespace minidiff::emulator {

#if defined(__x86_64__)

// An indirect jump, not ret: across stacks the return-address predictor is always wrong.
__attribute__((naked, noinline, used)) static void switch_fiber(void** /*from*/, void* const* /*to*/) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi); movq (%rsi), %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; popq %rcx; jmp *%rcx");
}
inline void* new_fiber(char* stack_end, void (*entry)()) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack_end) & ~uintptr_t(15));
  *--top = nullptr;  // entry's return address: debuggers stop here
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  return top;
}

#elif defined(__aarch64__)  // not tried yet

__attribute__((naked, noinline, used)) static void switch_fiber(void** /*from*/, void* const* /*to*/) {
  asm("stp x29, x30, [sp, #-160]!; stp x19, x20, [sp, #16]; stp x21, x22, [sp, #32]; stp x23, x24, [sp, #48]\n"
      "stp x25, x26, [sp, #64]; stp x27, x28, [sp, #80]; stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]\n"
      "stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]; mov x9, sp; str x9, [x0]; ldr x9, [x1]; mov sp, x9\n"
      "ldp x19, x20, [sp, #16]; ldp x21, x22, [sp, #32]; ldp x23, x24, [sp, #48]; ldp x25, x26, [sp, #64]\n"
      "ldp x27, x28, [sp, #80]; ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]; ldp d12, d13, [sp, #128]\n"
      "ldp d14, d15, [sp, #144]; ldp x29, x30, [sp], #160; ret");
}
inline void* new_fiber(char* stack_end, void (*entry)()) {
  uint64_t* top = reinterpret_cast<uint64_t*>(reinterpret_cast<uintptr_t>(stack_end) & ~uintptr_t(15)) - 20;
  memset(top, 0, 160);
  top[1] = reinterpret_cast<uint64_t>(entry);
  return top;
}

#endif

}  // namespace minidiff::emulator

#pragma GCC visibility pop
