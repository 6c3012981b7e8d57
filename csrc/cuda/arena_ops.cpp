// Arenas as ops, over the driver of this machine. It is looked for when the first arena is made: the library
// loads where there is none.
#include <cuda.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <memory>
#include <mutex>
#include <unordered_map>

#include "common/tensor_utils.h"
#include "cuda/arena.h"

namespace thinktwice::gpu {
namespace {

// What the driver's library has under these names.
struct Library {
  decltype(&cuDeviceGet) device_get = nullptr;
  decltype(&cuDeviceGetAttribute) attribute = nullptr;
  decltype(&cuMemGetAllocationGranularity) granularity = nullptr;
  decltype(&cuMemAddressReserve) reserve = nullptr;
  decltype(&cuMemAddressFree) free = nullptr;
  decltype(&cuMemCreate) create = nullptr;
  decltype(&cuMemRelease) release = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  decltype(&cuMemSetAccess) allow = nullptr;
  decltype(&cuGetErrorString) text = nullptr;
  std::string missing;  // the first that it lacks, or itself

  Library() {
    void* handle = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      missing = "libcuda.so.1";
      return;
    }
    find(handle, "cuDeviceGet", device_get);
    find(handle, "cuDeviceGetAttribute", attribute);
    find(handle, "cuMemGetAllocationGranularity", granularity);
    find(handle, "cuMemAddressReserve", reserve);
    find(handle, "cuMemAddressFree", free);
    find(handle, "cuMemCreate", create);
    find(handle, "cuMemRelease", release);
    find(handle, "cuMemMap", map);
    find(handle, "cuMemUnmap", unmap);
    find(handle, "cuMemSetAccess", allow);
    find(handle, "cuGetErrorString", text);
  }

  template <typename Function>
  void find(void* handle, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(handle, name));
    if (function == nullptr && missing.empty()) missing = name;
  }
};

const Library& library() {
  static const Library& found = *new Library;  // arenas that are left when the process ends still need it
  return found;
}

CUmemAllocationProp memory_of(int device) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  return properties;
}

int granularity(int device, size_t* bytes) {
  const CUmemAllocationProp properties = memory_of(device);
  return library().granularity(bytes, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
}

int reserve(size_t bytes, uint64_t* address) {
  CUdeviceptr found = 0;
  const int error = library().reserve(&found, bytes, 0, 0, 0);
  *address = found;
  return error;
}

int release_addresses(uint64_t address, size_t bytes) { return library().free(address, bytes); }

int create(int device, size_t bytes, uint64_t* memory) {
  const CUmemAllocationProp properties = memory_of(device);
  CUmemGenericAllocationHandle handle = 0;
  const int error = library().create(&handle, bytes, &properties, 0);
  *memory = handle;
  return error;
}

int release(uint64_t memory) { return library().release(memory); }

int map(uint64_t address, size_t bytes, uint64_t memory) {
  return library().map(address, bytes, 0, memory, 0);
}

int unmap(uint64_t address, size_t bytes) { return library().unmap(address, bytes); }

int allow(int device, uint64_t address, size_t bytes) {
  CUmemAccessDesc access{};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = device;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  return library().allow(address, bytes, &access, 1);
}

const char* text(int error) {
  const char* found = nullptr;
  return library().text(static_cast<CUresult>(error), &found) == CUDA_SUCCESS ? found : nullptr;
}

constexpr Driver kDriver{granularity, reserve, release_addresses, create, release, map, unmap, allow, text};

std::mutex mutex;
std::unordered_map<int64_t, std::unique_ptr<Arena>> arenas;
int64_t next_arena = 1;

using Entry = std::unordered_map<int64_t, std::unique_ptr<Arena>>::iterator;

// Calls `use` with the entry of that number, its arena's device the current one.
template <typename Use>
void with_entry(int64_t number, const Use& use) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Entry found = arenas.find(number);
  check(found != arenas.end(), "arena: number ", number, " does not exist or was closed");
  const torch::stable::accelerator::DeviceGuard guard(found->second->device());
  use(found);
}

int64_t arena_create(int64_t device, int64_t bytes) {
  const Library& driver = library();
  check(driver.missing.empty(), "arena: this machine's driver has no ", driver.missing);
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  CUdevice own = 0;
  int supported = 0;
  const bool known = driver.device_get(&own, static_cast<int>(device)) == CUDA_SUCCESS &&
                     driver.attribute(&supported, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
                                      own) == CUDA_SUCCESS;
  check(known && supported != 0, "arena: GPU ", device, " has no virtual memory");
  check(bytes > 0, "arena: needs at least one byte, got ", bytes);
  auto arena = std::make_unique<Arena>(kDriver, static_cast<int>(own), static_cast<size_t>(bytes));
  const std::lock_guard<std::mutex> lock(mutex);
  arenas.emplace(next_arena, std::move(arena));
  return next_arena++;
}

void arena_destroy(int64_t number) {
  with_entry(number, [](Entry entry) { arenas.erase(entry); });
}

void arena_map(int64_t number) {
  with_entry(number, [](Entry entry) { entry->second->map(); });
}

void arena_unmap(int64_t number) {
  with_entry(number, [](Entry entry) { entry->second->unmap(); });
}

// torch asks the driver whose memory stands at an address, so that it has to be mapped.
Tensor arena_tensor(int64_t number) {
  Tensor bytes;
  with_entry(number, [&bytes](Entry entry) {
    const Arena& arena = *entry->second;
    check(arena.mapped(), "arena: a tensor can be made over mapped memory only");
    const std::vector<int64_t> sizes{static_cast<int64_t>(arena.bytes())}, strides{1};
    const torch::stable::Device device(torch::headeronly::DeviceType::CUDA,
                                       static_cast<int32_t>(arena.device()));
    bytes = torch::stable::from_blob(reinterpret_cast<void*>(arena.address()), sizes, strides, device,
                                     ScalarType::Byte);
  });
  return bytes;
}

}  // namespace
}  // namespace thinktwice::gpu

STABLE_TORCH_LIBRARY_IMPL(thinktwice, CompositeExplicitAutograd, m) {
  m.impl("arena_create", TORCH_BOX(&thinktwice::gpu::arena_create));
  m.impl("arena_destroy", TORCH_BOX(&thinktwice::gpu::arena_destroy));
  m.impl("arena_map", TORCH_BOX(&thinktwice::gpu::arena_map));
  m.impl("arena_unmap", TORCH_BOX(&thinktwice::gpu::arena_unmap));
  m.impl("arena_tensor", TORCH_BOX(&thinktwice::gpu::arena_tensor));
}
