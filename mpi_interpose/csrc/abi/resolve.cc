// See resolve.hh.
#include "resolve.hh"

#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <string>

namespace undertow {
namespace {

template <size_t N>
bool named(const dl_phdr_info* info, const char* const (&names)[N]) {
  const char* base = std::strrchr(info->dlpi_name, '/');
  base = base ? base + 1 : info->dlpi_name;
  for (const char* name : names)
    if (std::strncmp(base, name, std::strlen(name)) == 0) return true;
  return false;
}

int match(dl_phdr_info* info, size_t, void* out) {
  static const char* const names[] = {"libmpi.so", "libmpi_abi.so", "libmpich.so", "libpmpi.so"};
  if (!named(info, names)) return 0;
  *static_cast<std::string*>(out) = info->dlpi_name;
  return 1;
}

int match_fortran(dl_phdr_info* info, size_t, void*) {
  static const char* const names[] = {"libmpi_mpifh", "libmpi_usempi", "libmpifort", "libmpichfort", "libfmpi"};
  return named(info, names);
}

const std::string& library() {
  static std::string path;
  if (path.empty()) dl_iterate_phdr(match, &path);
  return path;
}

bool ours(void* address) {
  Dl_info a{}, b{};
  return dladdr(address, &a) && dladdr(reinterpret_cast<void*>(&ours), &b) && a.dli_fbase == b.dli_fbase;
}

}  // namespace

const char* mapped_library() { return library().c_str(); }

bool fortran_mapped() {
  static const bool mapped = dl_iterate_phdr(match_fortran, nullptr) != 0;
  return mapped;
}

const char* own_path() {
  static Dl_info info{};
  return dladdr(reinterpret_cast<void*>(&ours), &info) ? info.dli_fname : "";
}

void* find(const char* symbol) {
  if (void* p = dlsym(RTLD_NEXT, symbol)) return p;
  if (library().empty()) return nullptr;
  static void* handle = nullptr;
  if (!handle) handle = dlopen(library().c_str(), RTLD_NOLOAD | RTLD_LAZY);
  if (!handle) return nullptr;
  void* p = dlsym(handle, symbol);
  return p && !ours(p) ? p : nullptr;
}

void* find_data(const char* symbol) {
  if (void* p = dlsym(RTLD_DEFAULT, symbol)) return p;
  return find(symbol);
}

void* find_own(const char* name) {
  if (void* p = find((std::string("PMPI_") + name).c_str())) return p;
  return find((std::string("MPI_") + name).c_str());
}

}  // namespace undertow
