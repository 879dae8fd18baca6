// From canonical IR to copy operations, and a plan's class; see plan.hh.
#include "plan.hh"

#include <algorithm>
#include <cstdlib>
#include <limits>

namespace undertow {
namespace {

constexpr size_t kMaxOps = 1 << 16;
constexpr size_t kSmallTable = 16;  // a table this short inside a loop is cheaper as separate strided copies

struct Emitter {
  std::vector<Op>& ops;
  std::vector<Dim> dims;

  void leaf(int64_t soff, int64_t doff, int64_t len) {
    if (ops.size() >= kMaxOps) throw Unsupported("too many parts");
    Op op;
    op.soff = soff;
    op.doff = doff;
    op.len = len;
    op.dims = dims;
    ops.push_back(std::move(op));
  }

  void table(const Node& n, int64_t soff, int64_t doff) {
    if (n.offs.size() <= kSmallTable) {
      for (size_t i = 0; i < n.offs.size(); ++i) {
        leaf(add(soff, n.offs[i]), doff, n.run_len(i));
        doff += n.run_len(i);
      }
      return;
    }
    leaf(soff, doff, n.lens.empty() ? n.len : 0);
    Op& op = ops.back();
    op.table_size = n.size;
    for (size_t i = 0; i < n.offs.size(); ++i) {
      const int64_t o = n.offs[i], l = n.run_len(i);
      if (o != static_cast<int32_t>(o) || l != static_cast<int32_t>(l)) return split(n, soff, doff);
      op.offs.push_back(static_cast<int32_t>(o));
      if (op.len == 0) op.lens.push_back(static_cast<int32_t>(l));
    }
  }

  // A table that spans more than 2 GiB: one operation per block.
  void split(const Node& n, int64_t soff, int64_t doff) {
    ops.pop_back();
    for (size_t i = 0; i < n.offs.size(); ++i) {
      leaf(add(soff, n.offs[i]), doff, n.run_len(i));
      doff += n.run_len(i);
    }
  }

  void emit(const Node& n, int64_t soff, int64_t doff) {
    if (n.size == 0) return;
    switch (n.kind) {
      case Kind::Bytes:
        leaf(soff, doff, n.size);
        break;
      case Kind::Loop:
        dims.push_back({n.count, n.stride, n.child->size});
        emit(*n.child, soff, doff);
        dims.pop_back();
        break;
      case Kind::Seq:
        for (const Part& p : n.parts) {
          emit(*p.node, add(soff, p.off), doff);
          doff += p.node->size;
        }
        break;
      case Kind::Runs:
        table(n, soff, doff);
        break;
    }
  }
};

Class classify(const Plan& plan) {
  if (plan.ops.empty()) return Class::Contiguous;
  const Op& op = plan.ops[0];
  if (plan.ops.size() > 1) return plan.ops.size() <= 2 * kSmallTable ? Class::Records : Class::Mixed;
  if (!op.offs.empty()) return op.len ? Class::Table : Class::Mixed;
  if (op.dims.empty()) return Class::Contiguous;
  const size_t n = op.dims.size();
  if (n >= 2 && std::abs(op.dims[n - 2].ss) < std::abs(op.dims[n - 1].ss)) return Class::Crossed;
  return Class::Strided;
}

// Several elements: dense blocks with gaps between them are strided; columns whose elements lie side by side cross
// memory order.
Form together(const Plan& plan) {
  Form form = plan.one;
  const int64_t extent = std::abs(plan.extent);
  if (form.cls == Class::Contiguous && plan.extent != plan.size) form = {Class::Strided, plan.size, extent};
  if (plan.one.cls == Class::Strided && extent < form.step) form.cls = Class::Crossed;
  return form;
}

}  // namespace

const char* class_name(Class c) {
  static const char* const names[] = {"contiguous", "strided", "crossed", "table", "mixed", "records"};
  return names[static_cast<int>(c)];
}

Plan make_plan(const Ref& ir, int64_t lb, int64_t extent) {
  Plan plan;
  plan.ir = normalise(ir);
  plan.size = plan.ir->size;
  plan.lb = lb;
  plan.extent = reachable(extent);
  const Node* root = plan.ir.get();
  int64_t soff = 0;
  if (root->kind == Kind::Seq && root->parts.size() == 1) soff = root->parts[0].off, root = root->parts[0].node.get();
  if (root->kind == Kind::Loop && (root->child->kind == Kind::Seq || root->child->kind == Kind::Runs)) {
    plan.outer = {root->count, root->stride, root->child->size};
    root = root->child.get();
  }
  Emitter{plan.ops, {}}.emit(*root, soff, 0);
  const int64_t pieces = std::max<int64_t>(1, plan.ir->pieces);
  plan.one = {classify(plan), plan.size / pieces, (plan.ir->hi - plan.ir->lo) / pieces};
  if (plan.ops.size() == 1 && plan.ops[0].offs.empty() && !plan.ops[0].dims.empty())
    plan.one.step = std::abs(plan.ops[0].dims.back().ss);
  plan.many = together(plan);
  return plan;
}

std::string Plan::describe() const {
  std::string out = class_name(one.cls);
  out += ", " + std::to_string(size) + " B in " + std::to_string(ir->pieces) + " pieces of about " +
         std::to_string(one.block) + " B every " + std::to_string(one.step) + " B, extent " + std::to_string(extent);
  if (outer.n > 1) out += "; " + std::to_string(outer.n) + " x step " + std::to_string(outer.ss);
  for (size_t i = 0; i < ops.size() && i < 8; ++i) {
    const Op& op = ops[i];
    out += "; copy";
    for (const Dim& d : op.dims) out += " " + std::to_string(d.n) + " x step " + std::to_string(d.ss) + " of";
    if (op.offs.empty())
      out += " " + std::to_string(op.len) + " B";
    else
      out += " " + std::to_string(op.offs.size()) + (op.len ? " blocks of " + std::to_string(op.len) + " B" : " blocks");
    out += " at " + std::to_string(op.soff);
  }
  if (ops.size() > 8) out += "; ... " + std::to_string(ops.size()) + " operations";
  return out;
}

}  // namespace undertow
