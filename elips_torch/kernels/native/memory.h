// Memory that frees itself; null where there was not enough.
#pragma once

#include <cstdlib>
#include <memory>

struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <class T>
using Memory = std::unique_ptr<T[], Free>;

template <class T>
Memory<T> allocate(int64_t n) {
    const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 127) / 64 * 64;
    return Memory<T>(static_cast<T*>(std::aligned_alloc(64, bytes)));
}
