// fastercache._layout: how many bytes a ring takes and where its parts lie. Host-side planning only; never traced.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "../packed_layout.h"

namespace {

void check(const char* name, int64_t value, bool valid, const char* expected) {
  if (!valid) throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ", expected " + expected);
}

class RingLayout {
 public:
  RingLayout(int64_t slots, int64_t lines, int64_t line_bytes, int64_t alignment)
      : slots_(slots), lines_(lines), line_bytes_(line_bytes), alignment_(alignment) {
    check("slots", slots, slots > 0, "at least 1");
    check("lines", lines, lines > 0, "at least 1");
    check("line_bytes", line_bytes, line_bytes > 0, "at least 1");
    check("alignment", alignment, alignment > 0 && (alignment & (alignment - 1)) == 0, "a power of two");
    check("line_bytes", line_bytes, line_bytes <= (kLimit - alignment) / lines, "at most 2**63 - 1 bytes a slot");
    slot_stride_ = (lines * line_bytes + alignment - 1) / alignment * alignment;
    check("slots", slots, slots <= kLimit / slot_stride_, "at most 2**63 - 1 bytes in all");
  }

  int64_t bytes() const { return slots_ * slot_stride_; }
  int64_t slot_stride_bytes() const { return slot_stride_; }

  std::string repr() const {
    return "RingLayout(slots=" + std::to_string(slots_) + ", lines=" + std::to_string(lines_) + ", line_bytes=" +
        std::to_string(line_bytes_) + ", alignment=" + std::to_string(alignment_) + ")";
  }

 private:
  static constexpr int64_t kLimit = std::numeric_limits<int64_t>::max();

  int64_t slots_, lines_, line_bytes_, alignment_, slot_stride_ = 0;
};

fastercache::PackedLine packed_line(int64_t channels, int bits) {
  check("channels", channels, channels > 0 && channels < (int64_t(1) << 58), "at least 1");
  check("bits", bits, bits == 0 || bits == 4 || bits == 8, "one of 0, 4, 8");
  return {channels, bits};
}

}  // namespace

PYBIND11_MODULE(_layout, m) {
  namespace py = pybind11;
  using py::literals::operator""_a;
  m.doc() = "Host-side planning of a cache ring's bytes.";
  // 256 bytes is what CUDA's allocators align to: every slot can then be read with the widest loads.
  py::class_<RingLayout>(m, "RingLayout", "The bytes of one ring: `slots` slots of `lines` lines of `line_bytes`, each slot aligned.")
      .def(py::init<int64_t, int64_t, int64_t, int64_t>(), "slots"_a, "lines"_a, "line_bytes"_a, "alignment"_a = 256)
      .def_property_readonly("bytes", &RingLayout::bytes, "Bytes of the whole ring, padding included.")
      .def_property_readonly("slot_stride_bytes", &RingLayout::slot_stride_bytes, "Bytes from one slot to the next.")
      .def("__repr__", &RingLayout::repr);

  using fastercache::PackedLine;
  py::class_<PackedLine>(m, "PackedLine", "The bytes of one line of `channels` in a packed ring, with `bits` for each difference.")
      .def(py::init(&packed_line), "channels"_a, "bits"_a)
      .def_property_readonly("blocks", &PackedLine::blocks, "Blocks of channels that share a scale.")
      .def_property_readonly("difference", &PackedLine::difference, "Where the codes of the difference begin.")
      .def_property_readonly("newest_scales", &PackedLine::newest_scales, "Where the scales of the newest output begin.")
      .def_property_readonly("difference_scales", &PackedLine::difference_scales, "Where the scales of the difference begin.")
      .def_property_readonly("bytes", &PackedLine::bytes, "Bytes of the whole line, padding included.");
}
