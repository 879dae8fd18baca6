// Blocks of memory kept for reuse by powers of two, up to a limit of idle bytes; allocation is the caller's.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

namespace undertow::gpu {

class Pool {
 public:
  // `make` returns null when there is no memory.
  Pool(std::function<void*(int64_t)> make, std::function<void(void*)> drop, int64_t keep)
      : make_(std::move(make)), drop_(std::move(drop)), keep_(keep) {}

  void* get(int64_t bytes) {
    const int c = class_of(bytes);
    {
      std::lock_guard<std::mutex> guard(lock_);
      if (!idle_[c].empty()) {
        void* block = idle_[c].back();
        idle_[c].pop_back();
        idle_bytes_ -= 1ll << c;
        return block;
      }
    }
    void* block = make_(1ll << c);
    if (block) return block;
    clear();  // what lies idle in other sizes may be what is missing
    return make_(1ll << c);
  }
  void put(void* block, int64_t bytes) {
    const int c = class_of(bytes);
    {
      std::lock_guard<std::mutex> guard(lock_);
      if (idle_bytes_ + (1ll << c) <= keep_) {
        idle_[c].push_back(block);
        idle_bytes_ += 1ll << c;
        return;
      }
    }
    drop_(block);
  }
  void clear() {
    std::lock_guard<std::mutex> guard(lock_);
    for (auto& list : idle_) {
      for (void* block : list) drop_(block);
      list.clear();
    }
    idle_bytes_ = 0;
  }

 private:
  static constexpr int kClasses = 48, kSmallest = 12;
  static int class_of(int64_t bytes) {
    int c = kSmallest;
    while ((1ll << c) < bytes) ++c;
    return c;
  }
  std::function<void*(int64_t)> make_;
  std::function<void(void*)> drop_;
  std::mutex lock_;
  std::vector<void*> idle_[kClasses];
  int64_t idle_bytes_ = 0, keep_;
};

}  // namespace undertow::gpu
