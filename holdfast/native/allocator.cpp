// Counts what torch's CPU allocator hands out: requested bytes, from every thread.
//
// A C interface for ctypes outside, torch's C++ ABI inside: it works only with the torch that it was
// built for, which `holdfast_allocator_torch` names.

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <unordered_map>

#include <pthread.h>

#include <c10/core/CPUAllocator.h>
#include <torch/headeronly/version.h>

namespace {

// A DataPtr has one word of context, and torch relies on its being the data itself (raw_allocate,
// copy-on-write). So sizes are kept beside, by address: a header before the data would change how
// much is allocated, and malloc_usable_size is not what was asked for.
struct Counts {
  std::mutex mutex;
  std::unordered_map<void*, int64_t> sizes;
  int64_t current = 0, peak = 0, allocations = 0;
  bool counting = false;
};

// Never destroyed, like the allocator: storages outlive the counting, and some outlive main().
Counts& counts = *new Counts;
c10::Allocator* previous = nullptr;
c10::DeleterFnPtr previous_deleter = nullptr;

void remember(void* data, int64_t nbytes) {
  std::lock_guard<std::mutex> guard(counts.mutex);
  // A storage made while counting still comes here when it is resized after the end.
  if (!counts.counting) return;
  counts.sizes[data] = nbytes;
  counts.current += nbytes;
  counts.peak = std::max(counts.peak, counts.current);
  counts.allocations += 1;
}

void forget(void* data) {
  std::lock_guard<std::mutex> guard(counts.mutex);
  const auto found = counts.sizes.find(data);
  if (found == counts.sizes.end()) return;
  counts.current -= found->second;
  counts.sizes.erase(found);
}

void forget_and_delete(void* data) {
  // In this order: once deleted, the address may be given to another thread.
  forget(data);
  previous_deleter(data);
}

class CountingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t nbytes) override {
    c10::DataPtr data = previous->allocate(nbytes);
    // Holds wherever raw_deleter() is not null, which also makes the data its own context.
    if (data.compare_exchange_deleter(previous_deleter, &forget_and_delete) && data) {
      remember(data.get(), static_cast<int64_t>(nbytes));
    }
    return data;
  }

  c10::DeleterFnPtr raw_deleter() const override { return &forget_and_delete; }

  void copy_data(void* to, const void* from, std::size_t nbytes) const override {
    previous->copy_data(to, from, nbytes);
  }
};

CountingAllocator& ours = *new CountingAllocator;

}  // namespace

extern "C" {

const char* holdfast_allocator_torch() { return TORCH_VERSION; }

// Counts from zero and returns 1, or 0 where torch's allocator cannot be wrapped. Frees of what was
// allocated before, in an earlier counting too, are not counted.
int holdfast_allocator_start() {
  c10::Allocator* installed = c10::GetCPUAllocator();
  if (previous == nullptr && installed->raw_deleter() != nullptr) {
    previous = installed;
    previous_deleter = installed->raw_deleter();
    // A child forked while another thread holds the lock would wait for ever.
    pthread_atfork([] { counts.mutex.lock(); }, [] { counts.mutex.unlock(); },
                   [] { counts.mutex.unlock(); });
  }
  if (installed != previous) return 0;
  {
    std::lock_guard<std::mutex> guard(counts.mutex);
    counts.sizes.clear();
    counts.current = counts.peak = counts.allocations = 0;
    counts.counting = true;
  }
  // With the default's own priority, so that nobody is shut out afterwards.
  c10::SetCPUAllocator(&ours, 0);
  return c10::GetCPUAllocator() == &ours;
}

void holdfast_allocator_stop() {
  // Another allocator may have been put over this one; leave that in place.
  if (c10::GetCPUAllocator() == &ours) c10::SetCPUAllocator(previous, 0);
  std::lock_guard<std::mutex> guard(counts.mutex);
  counts.counting = false;
}

void holdfast_allocator_read(int64_t* current, int64_t* peak, int64_t* allocations) {
  std::lock_guard<std::mutex> guard(counts.mutex);
  *current = counts.current;
  *peak = counts.peak;
  *allocations = counts.allocations;
}

void holdfast_allocator_reset_peak() {
  std::lock_guard<std::mutex> guard(counts.mutex);
  counts.peak = counts.current;
}
}
