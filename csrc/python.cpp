// loraxs_ext._C: what was built, what this CPU can do and which instruction-set level is in use, and the slot table.
// No tensors.
#include "python.h"

#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "build_info.h"
#include "cpu/features.h"
#include "kernels/linear_decode_plan.h"

namespace py = pybind11;

namespace {

// A C function of the op library that sits beside this module; it is loaded by loraxs_ext.ops, not by us.
template <class F>
F* op_symbol(const char* name) {
  Dl_info self;
  static const char anchor = 0;
  if (dladdr(&anchor, &self) == 0) throw std::runtime_error("loraxs_ext._C: cannot find its own path");
  const std::string here = self.dli_fname;
  const std::string library = here.substr(0, here.find_last_of('/') + 1) + "_ops.so";
  void* handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  void* symbol = handle ? dlsym(handle, name) : nullptr;
  if (symbol == nullptr)
    throw std::runtime_error("loraxs_ext._C: the compiled ops are not loaded; import loraxs_ext.ops first");
  return reinterpret_cast<F*>(symbol);
}

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

std::string cpu_isa() { return op_symbol<const char*()>("loraxs_cpu_isa")(); }

void set_cpu_isa(const std::string& name) {
  if (op_symbol<int(const char*)>("loraxs_set_cpu_isa")(name.c_str()) != 0)
    throw py::value_error("set_cpu_isa: name: expected one of build_info()['cpu_isas'] that this CPU has, got '" +
                          name + "'");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information, CPU features and the slot table of loraxs_ext; no tensors pass through here.";
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
  loraxs::bind_slot_table(m);
}
