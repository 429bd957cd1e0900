#include "cpu/scratch.h"

#include <memory>
#include <new>

namespace llmpq {
namespace {

constexpr std::align_val_t kLine{64};

struct Free {
  void operator()(uint8_t* memory) const { ::operator delete[](memory, kLine); }
};

struct Memory {
  std::unique_ptr<uint8_t[], Free> bytes;
  size_t size = 0;
};

}  // namespace

uint8_t* scratch(Scratch use, size_t bytes) {
  thread_local Memory memories[static_cast<int>(Scratch::kCount)];
  Memory& memory = memories[static_cast<int>(use)];
#if defined(__SANITIZE_ADDRESS__)
  memory.size = 0;  // so that nothing beyond what was asked for goes unseen
#endif
  if (memory.size < bytes || memory.bytes == nullptr) {
    memory.bytes.reset();
    memory.bytes.reset(static_cast<uint8_t*>(::operator new[](bytes, kLine)));
    memory.size = bytes;
  }
  return memory.bytes.get();
}

}  // namespace llmpq
