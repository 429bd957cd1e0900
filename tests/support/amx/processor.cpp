// A processor that has AMX, in software: a library to preload, on x86-64 Linux, with $LLMPQ_AMX_EMULATED = 1. The
// instructions that a processor without AMX does not know end in SIGILL, whose handler reads them and does what they
// say. So the kernels run as compiled. The system permits it, unless $AMX_REFUSED is 1.
//
// On a processor that has AMX it is of use, too, loaded without that variable: tests see by it how the tiles of the
// calling thread are configured.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>

#include "cpu/amx_tiles.h"
#include "tile_state.h"

namespace {

constexpr long kRequestPermission = 0x1023, kTileData = 18;
std::atomic<long> products{0};

bool is_set(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && std::strcmp(value, "1") == 0;
}

// An instruction with a VEX prefix of three bytes, in the map 0F 38, of 128 bits and W = 0.
class Instruction {
 public:
  Instruction(const uint8_t* code, const greg_t* registers) : code_(code), registers_(registers) {}

  bool is_amx() const { return code_[0] == 0xc4 && (code_[1] & 0x1f) == 2 && (code_[2] & 0x84) == 0; }
  int prefix() const { return code_[2] & 3; }  // none, 66, F3, F2
  int opcode() const { return code_[3]; }
  int operand() const { return 15 - (code_[2] >> 3 & 15); }  // in the prefix
  bool in_memory() const { return code_[4] >> 6 != 3; }
  int reg() const { return (code_[4] >> 3 & 7) + (code_[1] & 0x80 ? 0 : 8); }
  int rm() const { return (code_[4] & 7) + (code_[1] & 0x20 ? 0 : 8); }
  int length() const { return in_memory() ? static_cast<int>(displacement() - code_) + displacement_bytes() : 5; }
  bool has_index() const { return rm() % 8 == 4; }

  uint8_t* base() const {
    int32_t wide = 0;
    if (displacement_bytes() == 1) wide = static_cast<int8_t>(*displacement());
    if (displacement_bytes() == 4) std::memcpy(&wide, displacement(), sizeof wide);
    if (code_[4] >> 6 == 0 && rm() % 8 == 5) return const_cast<uint8_t*>(code_) + length() + wide;
    const int low = has_index() ? code_[5] & 7 : rm() % 8;
    const greg_t start = no_base() ? 0 : value(low + (code_[1] & 0x20 ? 0 : 8));
    return reinterpret_cast<uint8_t*>(start + wide);
  }
  int64_t index() const {  // 0: there is none
    const int number = (code_[5] >> 3 & 7) + (code_[1] & 0x40 ? 0 : 8);
    return number == 4 ? 0 : value(number) << (code_[5] >> 6);
  }

 private:
  bool no_base() const { return code_[4] >> 6 == 0 && has_index() && (code_[5] & 7) == 5; }
  const uint8_t* displacement() const { return code_ + (has_index() ? 6 : 5); }
  int displacement_bytes() const {
    const int mode = code_[4] >> 6;
    if (mode == 0) return rm() % 8 == 5 || no_base() ? 4 : 0;
    return mode == 1 ? 1 : 4;
  }
  greg_t value(int number) const {
    constexpr int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return registers_[kOrder[number]];
  }

  const uint8_t* code_;
  const greg_t* registers_;
};

// False: not an instruction that is known here.
bool execute(const Instruction& instruction) {
  enum { kNone, k66, kF3, kF2 };
  const int kind = instruction.opcode() << 8 | instruction.prefix() << 4 | instruction.in_memory();
  switch (kind) {
    case 0x49 << 8 | kNone << 4 | 1:
      if (instruction.reg() != 0) return false;
      tile_state.load_config(instruction.base() + (instruction.has_index() ? instruction.index() : 0));
      return true;
    case 0x49 << 8 | k66 << 4 | 1:
      if (instruction.reg() != 0) return false;
      tile_state.store_config(instruction.base() + (instruction.has_index() ? instruction.index() : 0));
      return true;
    case 0x49 << 8 | kNone << 4 | 0:
      if (instruction.reg() != 0 || instruction.rm() != 0) return false;
      tile_state.release();
      return true;
    case 0x49 << 8 | kF2 << 4 | 0:
      if (instruction.reg() > 7 || instruction.rm() != 0) return false;
      tile_state.zero(instruction.reg());
      return true;
    case 0x4b << 8 | kF2 << 4 | 1:
      if (instruction.reg() > 7 || !instruction.has_index()) return false;
      tile_state.load(instruction.reg(), instruction.base(), instruction.index());
      return true;
    case 0x4b << 8 | kF3 << 4 | 1:
      if (instruction.reg() > 7 || !instruction.has_index()) return false;
      tile_state.store(instruction.reg(), instruction.base(), instruction.index());
      return true;
    case 0x5e << 8 | kF2 << 4 | 0:
      if (instruction.reg() > 7 || instruction.rm() > 7 || instruction.operand() > 7) return false;
      tile_state.dot(instruction.reg(), instruction.rm(), instruction.operand());
      products.fetch_add(1, std::memory_order_relaxed);
      return true;
  }
  return false;
}

void on_illegal_instruction(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const Instruction instruction(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
  if (!instruction.is_amx() || !execute(instruction)) {
    std::fprintf(stderr, "an instruction that is not known\n");
    std::abort();
  }
  registers[REG_RIP] += instruction.length();
}

__attribute__((constructor)) void start() {
  if (!is_set("LLMPQ_AMX_EMULATED")) return;
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) long syscall(long number, ...) {
  va_list list;
  va_start(list, number);
  long arguments[6];
  for (long& argument : arguments) argument = va_arg(list, long);
  va_end(list);
  if (number == SYS_arch_prctl && arguments[0] == kRequestPermission && is_set("LLMPQ_AMX_EMULATED")) {
    if (!is_set("AMX_REFUSED") && arguments[1] == kTileData) return 0;
    errno = ENOSPC;
    return -1;
  }
  using Syscall = long (*)(long, ...);
  static const auto real = reinterpret_cast<Syscall>(dlsym(RTLD_NEXT, "syscall"));
  return real(number, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]);
}

__attribute__((visibility("default"))) long amx_products() { return products.load(); }
__attribute__((visibility("default"))) void amx_configure(const llmpq::TileConfig* config) {
  llmpq::AmxTiles::configure(*config);
}
__attribute__((visibility("default"))) void amx_read_config(llmpq::TileConfig* config) {
  llmpq::AmxTiles::read_config(*config);
}
}
