// Exports of fastalign.kernels._cuda: addresses as integers, checked by the caller (kernels/cuda_rows.py).
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "launch.h"

namespace py = pybind11;
using namespace fastalign;
using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

PYBIND11_MODULE(_cuda, m) {
  m.attr("MAX_COLUMNS") = MAX_COLUMNS;
  py::enum_<Element>(m, "Element")
      .value("float32", Element::float32)
      .value("bfloat16", Element::bfloat16)
      .value("float16", Element::float16);
  m.def("why_not", [](int device) -> py::object {
    const char* reason = why_not(device);
    return reason ? py::object(py::str(reason)) : py::object(py::none());
  });
  m.def(
      "row_loss_grad",
      [](Address tile, int64_t tile_stride, int64_t n, int64_t v, float in_scale, float out_scale, bool softcap,
         Address bias, Address targets, Address values, Address argmax, Address grad_logps, Address grad_entropy,
         Address out, int64_t out_stride, Element element, bool sums, Address stream) {
        const RowLossGrad arguments{at<const float>(tile), tile_stride, n, v, in_scale, out_scale, at<const float>(bias),
                                    at<const int64_t>(targets), at<float>(values), at<int64_t>(argmax),
                                    at<const float>(grad_logps), at<const float>(grad_entropy), at<void>(out), out_stride};
        const char* error = row_loss_grad(arguments, element, softcap, sums, at<void>(stream));
        if (error) throw std::runtime_error("the CUDA row kernel was not launched: " + std::string(error));
      },
      py::call_guard<py::gil_scoped_release>());
}
