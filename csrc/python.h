#pragma once
// What the files of the module loraxs_ext._C add to it.
#include <pybind11/pybind11.h>

namespace loraxs {

void bind_slot_table(pybind11::module_& m);  // python_slots.cpp

}  // namespace loraxs
