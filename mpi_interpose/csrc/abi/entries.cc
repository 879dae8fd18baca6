// The typed functions behind the exported symbols (generated), in one unit with the handlers that they call.
#include "handlers_coll.hh"
#include "handlers_device.hh"
#include "handlers_file.hh"
#include "handlers_graph.hh"
#include "handlers_local.hh"
#include "handlers_requests.hh"
#include "handlers_status.hh"
#include "state.hh"

namespace undertow {
#include "entries.inc"
}  // namespace undertow
