// A lock that is taken only where several threads may call MPI at a time (MPI_THREAD_MULTIPLE was granted).
#pragma once

#include <mutex>

#include "passing.hh"

namespace undertow {

class MaybeLock {
 public:
  explicit MaybeLock(std::mutex& lock) : lock_(threads_may_race ? &lock : nullptr) {
    if (lock_) lock_->lock();
  }
  ~MaybeLock() {
    if (lock_) lock_->unlock();
  }
  MaybeLock(const MaybeLock&) = delete;
  MaybeLock& operator=(const MaybeLock&) = delete;

 private:
  std::mutex* const lock_;
};

}  // namespace undertow
