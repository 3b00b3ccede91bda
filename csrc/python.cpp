// loraxs_ext._C: what was built, what this CPU can do and which instruction-set level is in use, the slot table, and
// prepared calls. No tensors.
#include "python.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "build_info.h"
#include "cpu/features.h"
#include "kernels/linear_decode_plan.h"
#include "op_symbol.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict d;
  d["compiler"] = LORAXS_COMPILER;
  d["torch"] = LORAXS_TORCH;
  d["cuda"] = bool(LORAXS_WITH_CUDA);
  d["cuda_version"] = LORAXS_CUDA_VERSION;
  d["cuda_archs"] = std::vector<std::string>{LORAXS_CUDA_ARCH_LIST};
  d["cpu_isas"] = std::vector<std::string>{LORAXS_ISA_LIST};
  return d;
}

std::map<std::string, bool> cpu_features() {
  const loraxs::cpu::Features f = loraxs::cpu::detect_features();
  return {{"avx2", f.avx2}, {"avx512", f.avx512}, {"avx512_bf16", f.avx512_bf16}, {"amx_bf16", f.amx_bf16}};
}

std::string cpu_isa() { return loraxs::op_symbol<const char*()>("loraxs_cpu_isa")(); }

void set_cpu_isa(const std::string& name) {
  if (loraxs::op_symbol<int(const char*)>("loraxs_set_cpu_isa")(name.c_str()) != 0)
    throw py::value_error("set_cpu_isa: name: expected one of build_info()['cpu_isas'] that this CPU has, got '" +
                          name + "'");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information, CPU features, slot table and prepared calls of loraxs_ext; no tensors pass through here.";
  m.def("build_info", &build_info, "Compiler, torch version and instruction sets this build was made with.");
  m.def("cpu_features", &cpu_features, "Instruction sets that this CPU has and the operating system permits.");
  m.def("cpu_isa", &cpu_isa, "The instruction-set level that the CPU ops use now.");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"),
        "Use this instruction-set level from now on; ValueError if it is unknown or this CPU lacks it.");
  m.def(
      "linear_decode_fits",
      [](int64_t M, int64_t N, int64_t K, int64_t r, int capability) {
        return loraxs::decode::plan(M, N, K, r, capability).fits;
      },
      py::arg("M"), py::arg("N"), py::arg("K"), py::arg("r"), py::arg("capability"),
      "Whether loraxs::_linear_decode takes bf16 or fp16 of these sizes, without dropout, on a GPU of this major "
      "compute "
      "capability.");
  loraxs::bind_prepared_layers(m);
  loraxs::bind_slot_table(m);
}
