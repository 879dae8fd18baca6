// The life of the preload: resolve once, check that the MPI is the one this library was built for, start at MPI_Init,
// write the report and stop at MPI_Finalize. Outside that span, or with the wrong MPI, every call is handed on as it is.
#include "state.hh"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

#include "handlers_coll.hh"
#include "requests.hh"

extern "C" {
extern int undertow_gate;
extern void* undertow_next[];
extern void* const undertow_absents[];
extern const int undertow_symbol_count;
extern char undertow_built_for[256];         // MPI_Get_library_version at build time, from MPI_Init on the running one's
extern const char undertow_flavour_name[];   // openmpi, mpich or abi
}

namespace undertow {

Real real;
Own own;
Constants constants;
Mode mode = Mode::Auto;

namespace {

int g_rank = -1;
bool g_matching = false, g_quiet = false;
std::once_flag g_once;

bool on(const char* name) {
  const char* v = std::getenv(name);
  return v && *v && std::strcmp(v, "0") != 0;
}

Mode wished_mode() {
  if (on("UNDERTOW_DISABLE") || on("UNDERTOW_MPI_DISABLE")) return Mode::Off;
  if (on("UNDERTOW_MPI_CHECK")) return Mode::Check;
  const char* v = std::getenv("UNDERTOW_MPI_MODE");
  if (!v || !*v || !std::strcmp(v, "auto")) return Mode::Auto;
  if (!std::strcmp(v, "force")) return Mode::Force;
  if (!std::strcmp(v, "check")) return Mode::Check;
  if (!std::strcmp(v, "off")) return Mode::Off;
  say("UNDERTOW_MPI_MODE=%s is not auto, force, check or off; doing nothing", v);
  return Mode::Off;
}

// The first words of the version must agree: the family always, and for native ABIs nothing finer, because both
// families keep their ABI within a soname, which the loader has checked for the program.
bool right_library() {
  if (mapped_library()[0] == 0 && !find("MPI_Init")) return false;
  const bool openmpi = find("ompi_mpi_comm_world") != nullptr;
  const bool abi = std::strstr(mapped_library(), "libmpi_abi") != nullptr;
  const char* found = openmpi ? "openmpi" : abi ? "abi" : "mpich";
  if (!std::strcmp(found, undertow_flavour_name)) return true;
  say("this preload was built for %s, but the program uses %s (%s): doing nothing. `undertow mpi run` picks the right "
      "one", undertow_flavour_name, found, mapped_library());
  return false;
}

void resolve_all() {
  mode = wished_mode();
  for (int i = 0; i < undertow_symbol_count; ++i) {
    const char* name = undertow_symbol_names[i];
    undertow_next[i] = find(name);
    if (!undertow_next[i]) undertow_next[i] = find_own(name + std::strlen("MPI_"));
    // This library may have been built for an MPI with more functions. A program that was linked to the one at hand
    // cannot call these; if it finds ours by name, it gets an error.
    if (!undertow_next[i]) undertow_next[i] = undertow_absents[i];
  }
  if (mode == Mode::Off || !right_library()) return;
  UNDERTOW_FILL_REAL(real, undertow_next)
  const char* lacking = nullptr;
  UNDERTOW_FILL_OWN(own, find_own, lacking)
  if (lacking) {
    say("the MPI at hand (%s) lacks %s, without which nothing can be done: every call is handed on", mapped_library(),
        lacking);
    return;
  }
  g_matching = true;
}

void start() {
  constants.byte = MPI_BYTE;
  constants.packed = MPI_PACKED;
  constants.type_null = MPI_DATATYPE_NULL;
  constants.comm_null = MPI_COMM_NULL;
  constants.self = MPI_COMM_SELF;
  constants.world = MPI_COMM_WORLD;
  constants.request_null = MPI_REQUEST_NULL;
  own.Comm_rank(MPI_COMM_WORLD, &g_rank);
  char version[MPI_MAX_LIBRARY_VERSION_STRING] = "";
  int length = 0;
  if (own.Get_library_version(version, &length) == MPI_SUCCESS)  // a fixed ABI's library serves several versions
    std::snprintf(undertow_built_for, sizeof undertow_built_for, "%.255s", version);
  int level = MPI_THREAD_MULTIPLE;
  threads_may_race = own.Query_thread(&level) != MPI_SUCCESS || level == MPI_THREAD_MULTIPLE;
  types_init();
  requests_init();
  model_init();
  undertow_gate = 1;
}

}  // namespace

void say(const char* format, ...) {
  if (g_quiet) return;
  char line[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  if (g_rank >= 0)
    std::fprintf(stderr, "undertow mpi [rank %d]: %s\n", g_rank, line);
  else
    std::fprintf(stderr, "undertow mpi: %s\n", line);
}

int started(int rc) {
  if (rc == MPI_SUCCESS) start();
  return rc;
}

void stopping() {
  finish_orphans();
  int size = 0;
  own.Comm_size(MPI_COMM_WORLD, &size);
  undertow_gate = 0;
  g_matching = false;
  report_write(g_rank, size);
  peers_finalize();
  types_finalize();
  slab_release_all();
}

Degrees degrees_of(MPI_Comm comm) {
  Degrees d;
  int kind = MPI_UNDEFINED;
  if (handle_key(comm) == handle_key(constants.comm_null) || !intra(comm) ||
      own.Topo_test(comm, &kind) != MPI_SUCCESS)
    return d;
  if (kind == MPI_CART) {
    int dims = 0;
    d.known = own.Cartdim_get(comm, &dims) == MPI_SUCCESS;
    d.in = d.out = 2 * dims;
    for (int k = 0; k < dims; ++k) {
      int before = MPI_PROC_NULL, after = MPI_PROC_NULL;
      d.known = d.known && own.Cart_shift(comm, k, 1, &before, &after) == MPI_SUCCESS;
      d.holes = d.holes || before == MPI_PROC_NULL || after == MPI_PROC_NULL;
    }
  } else if (kind == MPI_GRAPH) {
    d.known = own.Graph_neighbors_count(comm, rank_in(comm), &d.in) == MPI_SUCCESS;
    d.out = d.in;
  } else if (kind == MPI_DIST_GRAPH) {
    int weighted = 0;
    d.known = own.Dist_graph_neighbors_count(comm, &d.in, &d.out, &weighted) == MPI_SUCCESS;
  }
  return d;
}

}  // namespace undertow

// Called in the place of a function that neither has a name in the library nor a profiling name.
extern "C" unsigned long undertow_absent(int index) {
  undertow::say("the program called %s, which its MPI (%s) does not have", undertow::undertow_symbol_names[index],
                undertow::mapped_library());
  return static_cast<unsigned long>(MPI_ERR_UNSUPPORTED_OPERATION);
}

// Called by every export while the gate is not open. MPI_Init itself may pass before the gate is open.
extern "C" int undertow_enter(int at_init) {
  std::call_once(undertow::g_once, undertow::resolve_all);
  return undertow::g_matching && at_init && undertow_gate == 0 ? 1 : 0;
}
