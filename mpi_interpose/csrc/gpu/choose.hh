// Which kernel a launch of one piece gets. Pure: a function of the piece, the direction and what was measured.
#pragma once

#include <cstdint>
#include <string>

#include "shapes.hh"

namespace undertow::gpu {

enum class Form : uint8_t {
  General,  // any piece: the kernels of kernels.cu that read a Piece
  Nest,     // loops, dense on the packed side
  Stream,   // Nest with stream_words() per thread, whose packed side passes the caches as a stream
  Pour,     // loops of words of 1 or 2 bytes, packs only: a thread reads what fills one store of 16 bytes, a stream too
  Cross,    // a transpose through tiles
};

struct Choice {
  Form form = Form::General;
  uint8_t unroll = 1;      // words per thread (Nest)
  uint8_t side = 0;        // of a tile (Cross)
  uint16_t threads = 256;  // of a block
};

// "general", "nest UxTHREADS", "stream THREADS", "pour THREADS", "cross SIDE"; throws Failure otherwise.
Choice read_choice(const std::string& text);

// Whether that kernel is there and can serve the piece.
bool serves(const Choice& choice, const Piece& piece, bool packing);
Choice choose(const Piece& piece, bool packing);  // what was measured to be the fastest; it serves the piece
std::string kernel_name(const Choice& choice, const Piece& piece);  // of all but General
constexpr int kKernelCodes = 1024;
int kernel_code(const Choice& choice, const Piece& piece);  // below kKernelCodes; alike where names are

// Whether the two innermost loops cross memory order, so that tiles may serve.
bool crosses(const Piece& piece);

// Arguments; the piece must be served.
Loops<kNestDims> loops_of(const Piece& piece, bool packing);
Crossing crossing_of(const Piece& piece, const Choice& choice, bool packing);
uint32_t grid_of(const Choice& choice, const Piece& piece);  // thread blocks of the launch

}  // namespace undertow::gpu
