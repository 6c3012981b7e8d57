// The caches that ops name by a number.
#pragma once

#include <cstdint>
#include <functional>

#include "block_manager.h"

namespace thinktwice {

// Calls `use` with the cache of that number, which no other thread can use meanwhile. Throws where there is
// none.
void with_cache(int64_t cache, const std::function<void(BlockManager&)>& use);

}  // namespace thinktwice
