// Exports of fastalign.kernels._C: addresses as integers, checked by the caller (kernels/cpu_rows.py).
#include <pybind11/pybind11.h>

#include "fastalign/row_kernels.h"
#include "fastalign/scans.h"

namespace py = pybind11;
using namespace fastalign;
using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

PYBIND11_MODULE(_C, m) {
  m.def("instruction_set", [] { return kernels().name; });
  m.def("choose_instruction_set", [](const std::string& name) { return choose_kernels(name.c_str()); });
  m.def("use_openmp", [](Address parallel, Address thread_number) { use_openmp(at<void>(parallel), at<void>(thread_number)); });
  py::class_<Logits>(m, "Logits")
      .def(py::init([](float in_scale, float out_scale, bool softcap, Address bias) {
        return Logits{in_scale, out_scale, softcap, at<const float>(bias)};
      }));
  m.def(
      "row_stats",
      [](Address tile, int64_t stride, int64_t n, int64_t v, const Logits& logits, Address targets, int64_t v0,
         Address values, Address argmax, bool entropy, bool sum_sq, bool sum_z, int threads) {
        row_stats({at<const float>(tile), stride, n, v, logits, at<const int64_t>(targets), v0, at<float>(values),
                   at<int64_t>(argmax), entropy, sum_sq, sum_z}, threads);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "row_grad",
      [](Address tile, int64_t stride, int64_t n, int64_t v, bool exponentials, const Logits& logits, Address targets,
         int64_t v0, Address max, Address log_sum, Address base, Address target, Address entropy, Address out,
         int64_t out_stride, Address rows, int threads) {
        row_grad({at<const void>(tile), stride, n, v, exponentials, logits, at<const int64_t>(targets), v0,
                  at<const float>(max), at<const float>(log_sum), at<const float>(base), at<const float>(target),
                  at<const float>(entropy), at<float>(out), out_stride, at<const int64_t>(rows)}, threads);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "row_exp",
      [](Address tile, int64_t stride, int64_t n, int64_t v, const Logits& logits, Address max, Address out,
         int64_t out_stride, int threads) {
        row_exp({at<const float>(tile), stride, n, v, logits, at<const float>(max), at<uint16_t>(out), out_stride}, threads);
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "gae",
      [](Address rewards, Address values, Address mask, int64_t batch, int64_t length, double gamma, double lam,
         Address advantages, Address returns, int threads) {
        gae({at<const float>(rewards), at<const float>(values), at<const uint8_t>(mask), batch, length, gamma, lam,
             at<float>(advantages), at<float>(returns)}, threads);
      },
      py::call_guard<py::gil_scoped_release>());
}
