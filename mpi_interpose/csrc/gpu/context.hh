// One per CUDA context that owns memory we were given: the loaded kernel, a stream, scratch memory and tables.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "driver.hh"
#include "lower.hh"
#include "pool.hh"
#include "ring.hh"

namespace undertow::gpu {

class Context {
 public:
  explicit Context(Handle handle, int device);
  // Makes the context current for a scope.
  class Use {
   public:
    explicit Use(Context& c) { must(cuda.cuCtxPushCurrent_v2(c.handle), "cuCtxPushCurrent"); }
    ~Use() {
      Handle old;
      cuda.cuCtxPopCurrent_v2(&old);
    }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
  };

  void launch(const std::vector<Piece>& pieces, bool packing, Handle on);
  // Queues a message between the pieces' user side and `host`, by two halves of device scratch; `stream` is at its end
  // when all is done.
  void relay(const std::vector<Chunk>& chunks, char* halves, int64_t half, char* host, bool packing);
  void copy(void* to, const void* from, int64_t bytes, Handle on);
  void wait(Handle on) { must(cuda.cuStreamSynchronize(on), "cuStreamSynchronize"); }
  std::vector<Piece> pieces(const Plan& plan, int64_t count, uint64_t user, uint64_t packed);
  void trim();  // frees the tables when there are too many; nobody may have queued pieces that refer to them
  void forget_all();

  Handle handle, stream = nullptr;
  int device, processors = 0;
  Pool scratch;

 private:
  // Tables of a plan on the device; the reference keeps the plan's address from being used again.
  struct Kept {
    Ref ir;
    std::unordered_map<size_t, Table> of_op;
    std::unordered_map<int64_t, Table> whole;
    std::vector<Address> memory;
    int64_t bytes = 0;
  };
  void ask_for_reads();
  void load_kernels();
  Result find_kernels(const void* image);
  Handle kernel(const Choice& choice, const Piece& piece);
  bool launch_one(const Piece& piece, bool packing, Handle on);
  Kept& kept(const Plan& plan);
  Address upload(Kept& kept, const void* data, size_t bytes);
  void drop(Kept& kept);

  Handle module_ = nullptr, kernel_ = nullptr;
  Handle carrier_ = nullptr, worked_[2] = {}, moved_[2] = {};  // a stream for copies, and per half what it waits for
  Handle ones_[5][2] = {};  // for a launch of one piece: log2 of its word, whether a thread takes several
  std::atomic<Handle> shaped_[kKernelCodes] = {};  // by kernel_code
  std::mutex lock_;
  std::unordered_map<const Node*, std::unique_ptr<Kept>> tables_;
  int64_t table_bytes_ = 0;
};

// The context of device memory; `other` is asked when `address` is not device memory. Throws Failure for neither.
Context& context_of(const void* address, const void* other = nullptr);
Context& context_of(const Where& where);
Context* any_context();  // null before the first context_of
void trim_contexts();
void forget_contexts();

}  // namespace undertow::gpu
