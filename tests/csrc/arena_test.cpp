// The arena over a driver that is made up: it knows what is reserved, taken, mapped and allowed, refuses what
// CUDA refuses, and fails at any call it is told to. Built with the sanitizers and run by test_native.py.
#include "cuda/arena.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

using thinktwice::gpu::Arena;
using thinktwice::gpu::Driver;

#define REQUIRE(condition)                                               \
  if (!(condition)) {                                                    \
    std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
    std::exit(1);                                                        \
  }

namespace {

constexpr int kInvalid = 1, kOutOfMemory = 2, kTold = 7;
constexpr size_t kGranule = 2 << 20;

struct Machine {
  std::map<uint64_t, size_t> reserved, taken;  // bytes
  std::map<uint64_t, uint64_t> mapped;         // memory, by address
  std::set<uint64_t> allowed;
  std::vector<std::string> calls;
  size_t free_bytes = 40 * kGranule;
  int calls_left = -1;  // that succeed before one fails; below 0, none fails
  uint64_t next = 1;

  int call(const std::string& name) {
    calls.push_back(name);
    return calls_left >= 0 && calls_left-- == 0 ? kTold : 0;
  }
  bool empty() const { return reserved.empty() && taken.empty() && mapped.empty() && allowed.empty(); }
};

Machine machine;

bool whole(size_t bytes) { return bytes > 0 && bytes % kGranule == 0; }

const Driver kDriver{
    [](int device, size_t* bytes) {
      if (const int error = machine.call("granularity")) return error;
      *bytes = kGranule;
      return device == 3 ? 0 : kInvalid;
    },
    [](size_t bytes, uint64_t* address) {
      if (const int error = machine.call("reserve")) return error;
      if (!whole(bytes)) return kInvalid;
      *address = kGranule * 1000 * machine.next++;
      machine.reserved[*address] = bytes;
      return 0;
    },
    [](uint64_t address, size_t bytes) {
      if (const int error = machine.call("free")) return error;
      const auto found = machine.reserved.find(address);
      if (found == machine.reserved.end() || found->second != bytes || machine.mapped.count(address))
        return kInvalid;
      machine.reserved.erase(found);
      return 0;
    },
    [](int device, size_t bytes, uint64_t* memory) {
      if (const int error = machine.call("create")) return error;
      if (device != 3 || !whole(bytes)) return kInvalid;
      if (bytes > machine.free_bytes) return kOutOfMemory;
      machine.free_bytes -= bytes;
      *memory = machine.next++;
      machine.taken[*memory] = bytes;
      return 0;
    },
    [](uint64_t memory) {
      if (const int error = machine.call("release")) return error;
      const auto found = machine.taken.find(memory);
      if (found == machine.taken.end()) return kInvalid;
      machine.free_bytes += found->second;
      machine.taken.erase(found);
      return 0;
    },
    [](uint64_t address, size_t bytes, uint64_t memory) {
      if (const int error = machine.call("map")) return error;
      const auto there = machine.reserved.find(address);
      const auto taken = machine.taken.find(memory);
      if (there == machine.reserved.end() || there->second != bytes || taken == machine.taken.end() ||
          taken->second != bytes || !machine.mapped.emplace(address, memory).second)
        return kInvalid;
      return 0;
    },
    [](uint64_t address, size_t bytes) {
      if (const int error = machine.call("unmap")) return error;
      if (!machine.mapped.count(address) || machine.reserved[address] != bytes) return kInvalid;
      machine.mapped.erase(address);
      machine.allowed.erase(address);
      return 0;
    },
    [](int device, uint64_t address, size_t bytes) {
      if (const int error = machine.call("allow")) return error;
      if (device != 3 || !machine.mapped.count(address) || machine.reserved[address] != bytes)
        return kInvalid;
      machine.allowed.insert(address);
      return 0;
    },
    [](int error) -> const char* {
      return error == kOutOfMemory ? "out of memory" : error == kInvalid ? "invalid value" : nullptr;
    },
};

template <typename Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

void usable(const Arena& arena) {
  REQUIRE(arena.mapped() && machine.mapped.count(arena.address()) && machine.allowed.count(arena.address()));
}

void phases_in_order() {
  machine = Machine();
  {
    Arena arena(kDriver, 3, 5 * kGranule + 1);
    const uint64_t address = arena.address();
    REQUIRE(arena.bytes() == 6 * kGranule && !arena.mapped() && machine.free_bytes == 40 * kGranule);
    arena.unmap();  // nothing is there
    for (int phase = 0; phase < 3; ++phase) {
      machine.calls.clear();
      arena.map();
      arena.map();
      REQUIRE((machine.calls == std::vector<std::string>{"create", "map", "allow"}));
      usable(arena);
      REQUIRE(machine.free_bytes == 34 * kGranule && arena.address() == address);
      machine.calls.clear();
      if (phase == 2) break;  // it may end with its memory
      arena.unmap();
      arena.unmap();
      REQUIRE((machine.calls == std::vector<std::string>{"unmap", "release"}));
      REQUIRE(!arena.mapped() && machine.free_bytes == 40 * kGranule && machine.taken.empty());
    }
  }
  REQUIRE((machine.calls == std::vector<std::string>{"unmap", "release", "free"}));
  REQUIRE(machine.empty() && machine.free_bytes == 40 * kGranule);
  REQUIRE(error_of([] { Arena(kDriver, 3, 0); }).find("0 bytes in pages of 2097152 can't be had") !=
          std::string::npos);
  REQUIRE(!error_of([] { Arena(kDriver, 3, SIZE_MAX); }).empty());
  REQUIRE(error_of([] { Arena(kDriver, 4, 1); }) ==
          "arena on GPU 4: asking for the size of a page failed: invalid value");
  REQUIRE(machine.empty());
}

void no_memory_left() {
  machine = Machine();
  Arena arena(kDriver, 3, 30 * kGranule);
  machine.free_bytes = 30 * kGranule - 1;
  const std::string error = error_of([&arena] { arena.map(); });
  REQUIRE(error == "arena on GPU 3: taking 62914560 bytes failed: out of memory");
  REQUIRE(!arena.mapped() && machine.taken.empty() && machine.mapped.empty());
  machine.free_bytes = 30 * kGranule;
  arena.map();
  usable(arena);
}

// Whichever call fails, nothing is left behind, and the arena stands where it stood before or goes on from
// there.
void any_call_fails() {
  const char* const tasks[] = {"size of a page", "reserving", "taking",     "mapping",
                               "allowing",       "unmapping", "giving back"};
  for (int failing = 0; failing < 7; ++failing) {
    machine = Machine();
    const size_t before = machine.free_bytes;
    machine.calls_left = failing;
    const std::string error = error_of([failing, before] {
      Arena arena(kDriver, 3, kGranule);
      const std::string first = error_of([&arena] { arena.map(); });
      REQUIRE(arena.mapped() == first.empty());
      if (!first.empty()) {
        REQUIRE(machine.taken.empty() && machine.mapped.empty() && machine.free_bytes == before);
        arena.map();  // what failed once may work now
        usable(arena);
        throw std::runtime_error(first);
      }
      const std::string second = error_of([&arena] { arena.unmap(); });
      REQUIRE(!second.empty());
      if (failing == 5) {
        usable(arena);
        arena.unmap();
      }
      REQUIRE(!arena.mapped() && machine.mapped.empty());
      throw std::runtime_error(second);
    });
    REQUIRE(error.find(tasks[failing]) != std::string::npos);
    REQUIRE(error.find("failed: error 7") != std::string::npos);
    machine.taken.erase(failing == 6 ? machine.next - 1 : 0);  // the driver itself did not take it back
    REQUIRE(machine.empty());
  }
}

}  // namespace

int main() {
  phases_in_order();
  no_memory_left();
  any_call_fails();
}
