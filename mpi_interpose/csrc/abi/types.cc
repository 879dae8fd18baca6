// The table from handle to record (see types.hh): open addressing, readers without locks.
//
// A reader needs no lock and no reference, because MPI itself forbids freeing a type while another call still has to
// look at it; what must not break is the table under concurrent inserts of other keys. Slots are never moved: a full
// table is replaced by a larger copy and the old one is kept until the end.
#include "types.hh"

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "passing.hh"
#include "report.hh"

extern "C" const char undertow_built_for[], undertow_flavour_name[];

namespace undertow {
namespace {

struct Slot {
  std::atomic<uintptr_t> key{0};
  std::atomic<Record*> value{nullptr};
};

struct Table {
  explicit Table(size_t n) : mask(n - 1), slots(new Slot[n]) {}
  size_t mask;
  Slot* slots;
  size_t used = 0;
};

std::mutex g_lock;
std::atomic<Table*> g_table{new Table(1024)};
std::vector<MPI_Datatype> g_graveyard;  // twins whose record died inside a library callback
int g_keyval = MPI_KEYVAL_INVALID;

size_t slot_of(uintptr_t key) {
  uint64_t h = key * 0x9e3779b97f4a7c15ull;
  return static_cast<size_t>(h >> 20);
}

Record* look(uintptr_t key) {
  const Table* t = g_table.load(std::memory_order_acquire);
  for (size_t i = slot_of(key);; ++i) {
    const Slot& s = t->slots[i & t->mask];
    const uintptr_t k = s.key.load(std::memory_order_acquire);
    if (k == key) return s.value.load(std::memory_order_acquire);
    if (k == 0) return nullptr;
  }
}

void put(Table* t, uintptr_t key, Record* value) {
  for (size_t i = slot_of(key);; ++i) {
    Slot& s = t->slots[i & t->mask];
    const uintptr_t k = s.key.load(std::memory_order_relaxed);
    if (k != key && k != 0) continue;
    s.value.store(value, std::memory_order_release);
    if (k == 0) {
      s.key.store(key, std::memory_order_release);
      ++t->used;
    }
    return;
  }
}

void store(uintptr_t key, Record* value) {  // under g_lock
  Table* t = g_table.load();
  if (2 * t->used > t->mask) {
    Table* grown = new Table(2 * (t->mask + 1));
    for (size_t i = 0; i <= t->mask; ++i)
      if (Record* r = t->slots[i].value.load()) put(grown, t->slots[i].key.load(), r);
    g_table.store(grown, std::memory_order_release);  // the old one stays for readers that hold it
    t = grown;
  }
  put(t, key, value);
}

int on_delete(MPI_Datatype, int, void* attribute, void*) {
  Record* record = static_cast<Record*>(attribute);
  {
    std::lock_guard<std::mutex> guard(g_lock);
    if (look(record->key) == record) store(record->key, nullptr);
  }
  record->dead.store(true);
  passing_retired(*record);  // the handle may be another type's next
  release(record);
  return MPI_SUCCESS;
}

int on_copy(MPI_Datatype, int, void*, void*, void*, int* flag) {
  *flag = 0;
  return MPI_SUCCESS;
}

void bury() {
  std::vector<MPI_Datatype> dead;
  {
    std::lock_guard<std::mutex> guard(g_lock);
    dead.swap(g_graveyard);
  }
  for (MPI_Datatype& t : dead) own.Type_free(&t);
}

Record* admit(MPI_Datatype type) {
  Record* record = nullptr;
  try {
    Decoded d = decode(type);
    record = new Record;
    record->plan = make_plan(d.ir, d.lb, d.extent);
    record->key = handle_key(type);
    record->combiners = d.combiners;
    record->leaf = d.leaf;
    record->leaf_size = d.leaf_size;
    record->mixed = d.mixed;
  } catch (const std::exception& e) {
    delete record;
    report_refused(e.what());
    return nullptr;
  }
  if (own.Type_set_attr(type, g_keyval, record) != MPI_SUCCESS) {
    delete record;
    return nullptr;
  }
  std::lock_guard<std::mutex> guard(g_lock);
  store(record->key, record);
  passing_changed();  // a type that was not understood may have had this handle
  return record;
}

}  // namespace

void types_init() { own.Type_create_keyval(on_copy, on_delete, &g_keyval, nullptr); }

void types_finalize() {
  bury();
  if (g_keyval != MPI_KEYVAL_INVALID) own.Type_free_keyval(&g_keyval);
}

Record* record_of(MPI_Datatype type) {
  const uintptr_t key = handle_key(type);
  return key ? look(key) : nullptr;
}

void type_committed(MPI_Datatype type) {
  bury();
  const uintptr_t key = handle_key(type);
  if (key == 0 || look(key)) return;  // committing twice is legal
  admit(type);
}

void hold(Record* record) { record->refs.fetch_add(1, std::memory_order_relaxed); }

void release(Record* record) {
  if (record->refs.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  report_retired(*record);
  if (record->twin_state.load() == 1) {
    std::lock_guard<std::mutex> guard(g_lock);
    g_graveyard.push_back(record->twin);
  }
  delete record;
}

MPI_Datatype handle_of(const Record& r) {  // the key is the handle
  MPI_Datatype h;
  if constexpr (sizeof(MPI_Datatype) == sizeof(uintptr_t)) {
    std::memcpy(&h, &r.key, sizeof h);
  } else {
    const uint32_t low = static_cast<uint32_t>(r.key);
    std::memcpy(&h, &low, sizeof h);
  }
  return h;
}

// MPICH before 5 and its relatives cut a long message of bytes anywhere, and cannot receive a cut element into a struct of
// several basic types ("Message truncated"). The receiver may be theirs: a peer may lack the preload, or not take its side.
static bool bytes_reach_structs() {
  static const bool yes = [] {
    if (std::strcmp(undertow_flavour_name, "mpich")) return true;
    const char* digit = std::strpbrk(undertow_built_for, "0123456789");
    return !std::strncmp(undertow_built_for, "MPICH", 5) && digit && std::atoi(digit) >= 5;
  }();
  return yes;
}

MPI_Datatype twin_of(Record* record, bool device) {
  if (record->mixed && !device && !bytes_reach_structs()) return constants.type_null;
  const int state = record->twin_state.load(std::memory_order_acquire);
  if (state == 1) return record->twin;
  if (state == 2) return constants.type_null;
  static std::mutex making;
  std::lock_guard<std::mutex> guard(making);
  if (record->twin_state.load() == 0) {
    const int64_t n = record->plan.size / record->leaf_size;
    bool made = n <= INT32_MAX && own.Type_contiguous(static_cast<int>(n), record->leaf, &record->twin) == MPI_SUCCESS;
    made = made && own.Type_commit(&record->twin) == MPI_SUCCESS;
    record->twin_state.store(made ? 1 : 2, std::memory_order_release);
  }
  return record->twin_state.load() == 1 ? record->twin : constants.type_null;
}

void each_live(void (*visit)(Record&)) {
  std::lock_guard<std::mutex> guard(g_lock);
  const Table* t = g_table.load();
  for (size_t i = 0; i <= t->mask; ++i)
    if (Record* r = t->slots[i].value.load()) visit(*r);
}

}  // namespace undertow
