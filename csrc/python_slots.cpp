// loraxs_ext._C.SlotTable: the slot table with names and versions in two lists, and the GIL released while it waits.
#include <pybind11/chrono.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "python.h"
#include "slots/slot_table.h"

namespace py = pybind11;

namespace loraxs {
namespace {

using slots::Grant;
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

py::tuple to_tuple(const Grant& grant) { return py::make_tuple(grant.slots, grant.to_load, grant.loading); }

// Lets Ctrl-C end a wait.
void check_signals() {
  const py::gil_scoped_acquire held;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

py::tuple acquire(SlotTable& table, std::vector<std::string> names, const std::vector<uint64_t>& versions,
                  std::optional<double> timeout) {
  const Keys keys = make_keys(std::move(names), versions);
  const SlotTable::Timeout limit = make_timeout(timeout);
  // The common case takes a microsecond: not worth giving the GIL away. The table never wants the GIL while locked.
  if (const auto grant = table.try_acquire(keys)) return to_tuple(*grant);
  const Grant grant = [&] {
    const py::gil_scoped_release released;
    return table.acquire(keys, limit, check_signals);
  }();
  return to_tuple(grant);
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
  py::class_<SlotTable>(m, "SlotTable", "Which adapter lies in which slot, who uses it, and who gets the next slot.")
      .def(py::init<int>(), py::arg("slots"))
      .def("acquire", &acquire, py::arg("names"), py::arg("versions"), py::arg("timeout") = py::none(),
           "A reference to a slot for every (name, version), all or none, first come, first served: (slots, positions "
           "to load, positions that others are loading). TimeoutError after `timeout` seconds; ValueError if there are "
           "more distinct adapters than slots; RuntimeError once closed.")
      .def(
          "prefetch",
          [](SlotTable& table, std::vector<std::string> names, const std::vector<uint64_t>& versions) {
            return to_tuple(table.prefetch(make_keys(std::move(names), versions)));
          },
          py::arg("names"), py::arg("versions"),
          "Never waits: like acquire, but only for what lies nowhere yet and finds a cold slot; -1 for the rest.")
      .def("loaded", &SlotTable::loaded, py::arg("slots"), py::arg("versions"),
           "The caller has filled these slots, with these versions.")
      .def("failed", &SlotTable::failed, py::arg("slots"), py::arg("message"),
           "The caller could not fill those of its slots that are still being loaded; who waits for them gets a "
           "RuntimeError with this message.")
      .def("wait", &wait, py::arg("slots"), py::arg("timeout") = py::none(),
           "Returns when nobody is loading any of these slots; RuntimeError if loading failed.")
      .def("release", &SlotTable::release, py::arg("slots"), "Gives one reference to each slot back.")
      .def("pin", &SlotTable::pin, py::arg("name"), "The version of this adapter asked for last stays.")
      .def("unpin", &SlotTable::unpin, py::arg("name"), "It may be evicted again.")
      .def("close", &SlotTable::close, "Wakes whoever waits, with a RuntimeError.")
      .def("stats", &statistics, "Counts, and seconds waited.")
      .def("__len__", &SlotTable::size);
}

}  // namespace loraxs
