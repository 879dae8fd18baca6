// A datatype's plan: the canonical IR flattened into a few copy operations, made once at commit and then read-only.
//
// Packing knows the place of every block in advance, so a loop over a sequence becomes a sequence of loops (one per
// leaf), which turns an array of structs into a few strided copies; tiling keeps them in the cache. The element count
// of a call is one more loop, added when the plan runs. A plan prints itself, which is what `explain` and the report
// show, and is classified by what makes it fast or slow, which is what the model's table is keyed by.
#pragma once

#include "ir.hh"

namespace undertow {

struct Dim {
  int64_t n, ss, ds;  // iterations; step in the user's buffer; step in the packed stream
};

struct Op {
  int64_t soff = 0, doff = 0;  // first byte: in the user's buffer, in the packed stream
  int64_t len = 0;             // block length; 0 for a table of mixed lengths
  std::vector<Dim> dims;       // outermost first
  std::vector<int32_t> offs;   // a table of blocks instead of one block, relative to soff
  std::vector<int32_t> lens;   // their lengths, when they differ
  int64_t table_size = 0;      // packed bytes of one pass over the table
};

// What the measured model distinguishes.
enum class Class : uint8_t { Contiguous, Strided, Crossed, Table, Mixed, Records };
const char* class_name(Class c);

// What the table sees of a plan: its class, the typical contiguous bytes, and their distance (the innermost loop's step,
// or touched bytes per piece).
struct Form {
  Class cls = Class::Contiguous;
  int64_t block = 0, step = 0;
};

struct Plan {
  Ref ir;                     // canonical
  int64_t size = 0;           // packed bytes of one element
  int64_t lb = 0, extent = 0; // as MPI reports them
  Dim outer{1, 0, 0};         // a loop around a sequence, tiled over all ops
  std::vector<Op> ops;
  Form one, many;             // of one element, and of several: these may leave gaps, or interleave
  const Form& form(int64_t count) const { return count > 1 ? many : one; }
  std::string describe() const;
};

// Throws Unsupported when the type has more parts than a plan should hold.
Plan make_plan(const Ref& ir, int64_t lb, int64_t extent);

// `count` elements, spaced by the plan's extent, to or from count * size dense bytes. Exact: no byte outside the type
// is written, none of the target outside [dst, dst + count*size) either.
void pack(const Plan& plan, int64_t count, const char* src, char* dst);
void unpack(const Plan& plan, int64_t count, const char* src, char* dst);

}  // namespace undertow
