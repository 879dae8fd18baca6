// Preloaded: memory that a library maps without reserving it lies between pages that nobody may touch.
#define _GNU_SOURCE
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

void* mmap(void* at, size_t bytes, int protection, int flags, int file, off_t offset) {
  const size_t page = 4096;
  if (at || !(flags & MAP_NORESERVE)) return (void*)syscall(SYS_mmap, at, bytes, protection, flags, file, offset);
  const size_t whole = (bytes + page - 1) / page * page;
  char* all = (char*)syscall(SYS_mmap, 0, whole + 2 * page, PROT_NONE, flags, file, offset);
  if (all == MAP_FAILED) return all;
  mprotect(all + page, whole, protection);
  return all + page;
}
