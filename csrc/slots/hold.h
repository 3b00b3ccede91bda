#pragma once
// A grant that cannot be lost: what was not given back before is given back when its owner ends.
#include <atomic>
#include <memory>
#include <string>
#include <utility>

#include "slots/slot_table.h"

namespace loraxs::slots {

class Hold {
 public:
  Hold(std::shared_ptr<SlotTable> table, Grant grant) : table_(std::move(table)), grant_(std::move(grant)) {}
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;
  ~Hold() { release("loading was interrupted"); }

  const Grant& grant() const { return grant_; }
  bool held() const { return held_; }

  // Gives all references back, once. Whoever waits for a slot that was to be loaded, and is not, gets the message.
  void release(const std::string& message) {
    if (!held_.exchange(false) || table_->abandoned()) return;
    Slots slots, to_load;
    for (const int slot : grant_.slots)
      if (slot >= 0) slots.push_back(slot);
    for (const int i : grant_.to_load) to_load.push_back(grant_.slots[i]);
    table_->failed(to_load, message);
    table_->release(slots);
  }

 private:
  std::shared_ptr<SlotTable> table_;
  Grant grant_;
  std::atomic<bool> held_{true};
};

}  // namespace loraxs::slots
