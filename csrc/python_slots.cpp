// loraxs_ext._C.SlotTable: the slot table with names and versions in two lists, and the GIL released while it waits.
// What it grants comes as an owner: Python may be interrupted before it has a name for the result of a call.
#include <pybind11/chrono.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>

#include "python.h"
#include "slots/hold.h"

namespace py = pybind11;

namespace loraxs {
namespace {

using slots::Grant;
using slots::Hold;
using slots::Keys;
using slots::SlotTable;

Keys make_keys(std::vector<std::string> names, const std::vector<uint64_t>& versions) {
  if (names.size() != versions.size())
    throw py::value_error("versions: expected " + std::to_string(names.size()) + ", got " +
                          std::to_string(versions.size()));
  Keys keys(names.size());
  for (size_t i = 0; i < names.size(); ++i) keys[i] = {std::move(names[i]), versions[i]};
  return keys;
}

SlotTable::Timeout make_timeout(std::optional<double> seconds) {
  if (!seconds) return std::nullopt;
  if (!(*seconds >= 0)) throw py::value_error("timeout: expected seconds, 0 or more, got " + std::to_string(*seconds));
  return std::chrono::duration<double>(*seconds);
}

// Lets Ctrl-C end a wait.
void check_signals() {
  const py::gil_scoped_acquire held;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

std::unique_ptr<Hold> acquire(const std::shared_ptr<SlotTable>& table, std::vector<std::string> names,
                              const std::vector<uint64_t>& versions, std::optional<double> timeout) {
  const Keys keys = make_keys(std::move(names), versions);
  const SlotTable::Timeout limit = make_timeout(timeout);
  // The common case takes a microsecond: not worth giving the GIL away. The table never wants the GIL while locked.
  if (auto grant = table->try_acquire(keys)) return std::make_unique<Hold>(table, *std::move(grant));
  const py::gil_scoped_release released;
  return std::make_unique<Hold>(table, table->acquire(keys, limit, check_signals));
}

std::vector<std::unique_ptr<Hold>> prefetch(const std::shared_ptr<SlotTable>& table, std::vector<std::string> names,
                                            const std::vector<uint64_t>& versions, size_t portion) {
  if (portion < 1) throw py::value_error("portion: expected at least 1, got 0");
  const Keys keys = make_keys(std::move(names), versions);
  const Grant all = table->prefetch(keys);
  std::vector<std::unique_ptr<Hold>> holds;
  for (size_t begin = 0; begin < all.to_load.size(); begin += portion) {
    const auto first = all.to_load.begin() + begin;
    Grant part;
    part.to_load.assign(first, first + std::min(portion, all.to_load.size() - begin));
    part.slots.assign(keys.size(), -1);
    for (const int i : part.to_load) part.slots[i] = all.slots[i];
    holds.push_back(std::make_unique<Hold>(table, std::move(part)));
  }
  return holds;
}

void wait(SlotTable& table, const slots::Slots& slots, std::optional<double> timeout) {
  const SlotTable::Timeout limit = make_timeout(timeout);
  const py::gil_scoped_release released;
  table.wait(slots, limit, check_signals);
}

py::dict statistics(const SlotTable& table) {
  const slots::Statistics s = table.statistics();
  py::dict d;
  d["slots"] = s.slots;
  d["free"] = s.free;
  d["resident"] = s.resident;
  d["in_use"] = s.in_use;
  d["pinned"] = s.pinned;
  d["loading"] = s.loading;
  d["waiting"] = s.waiting;
  d["hits"] = s.hits;
  d["misses"] = s.misses;
  d["evictions"] = s.evictions;
  d["prefetches"] = s.prefetches;
  d["failures"] = s.failures;
  d["waits"] = s.waits;
  d["timeouts"] = s.timeouts;
  d["wait_seconds"] = s.wait_seconds;
  return d;
}

}  // namespace

void bind_slot_table(py::module_& m) {
  py::register_exception<slots::TimedOut>(m, "SlotTimeout", PyExc_TimeoutError);
  py::class_<Hold>(m, "Hold", "Slots that somebody has a reference to; they are given back when it is dropped.")
      .def_property_readonly(
          "slots", [](const Hold& hold) { return hold.grant().slots; }, "Of each name, or -1.")
      .def_property_readonly(
          "to_load", [](const Hold& hold) { return hold.grant().to_load; },
          "Positions of names that the caller has to load and report.")
      .def_property_readonly(
          "loading", [](const Hold& hold) { return hold.grant().loading; }, "Positions that others are loading.")
      .def_property_readonly("held", &Hold::held, "Whether they have not been given back.")
      .def("release", &Hold::release, py::arg("message") = "loading was interrupted",
           "Gives the slots back. Who waits for one that is still being loaded gets a RuntimeError with this message. "
           "A second call does nothing.");
  py::class_<SlotTable, std::shared_ptr<SlotTable>>(
      m, "SlotTable", "Which adapter lies in which slot, who uses it, and who gets the next slot.")
      .def(py::init<int>(), py::arg("slots"))
      .def("acquire", &acquire, py::arg("names"), py::arg("versions"), py::arg("timeout") = py::none(),
           "A Hold of a slot for every (name, version), all or none, first come, first served. TimeoutError after "
           "`timeout` seconds; ValueError if there are more distinct adapters than slots; RuntimeError once closed.")
      .def("prefetch", &prefetch, py::arg("names"), py::arg("versions"), py::arg("portion"),
           "Never waits: like acquire, but only for what lies nowhere yet and finds a cold slot; -1 for the rest. "
           "Holds of up to `portion` slots each, all to be loaded.")
      .def("loaded", &SlotTable::loaded, py::arg("slots"), py::arg("versions"),
           "The caller has filled these slots, with these versions.")
      .def("failed", &SlotTable::failed, py::arg("slots"), py::arg("message"),
           "The caller could not fill those of its slots that are still being loaded; who waits for them gets a "
           "RuntimeError with this message.")
      .def("wait", &wait, py::arg("slots"), py::arg("timeout") = py::none(),
           "Returns when nobody is loading any of these slots; RuntimeError if loading failed.")
      .def("pin", &SlotTable::pin, py::arg("name"), "The version of this adapter asked for last stays.")
      .def("unpin", &SlotTable::unpin, py::arg("name"), "It may be evicted again.")
      .def("close", &SlotTable::close, "Wakes whoever waits, with a RuntimeError.")
      .def(
          "abandon",
          [](std::shared_ptr<SlotTable> table) {
            table->abandon();
            // Never destroyed: that would wait for threads of the parent, which wait on its condition variable.
            new std::shared_ptr<SlotTable>(std::move(table));
          },
          "For a forked child: holds give nothing back any more. Nothing else may be called then.")
      .def("stats", &statistics, "Counts, and seconds waited.")
      .def("__len__", &SlotTable::size);
}

}  // namespace loraxs
