#include "slots/slot_table.h"

#include <algorithm>
#include <string_view>
#include <unordered_set>

namespace loraxs::slots {
namespace {

using Clock = std::chrono::steady_clock;

// How long a signal such as Ctrl-C may go unnoticed while a thread waits.
constexpr std::chrono::milliseconds kPollInterval{100};

// A wait of more than this many seconds is one without end; adding it to the clock could overflow.
constexpr double kForever = 1e8;

std::optional<Clock::time_point> deadline_after(SlotTable::Timeout timeout) {
  if (!timeout || timeout->count() > kForever) return std::nullopt;
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(*timeout);
}

struct KeyHash {
  size_t operator()(const Key* key) const {
    return std::hash<std::string_view>()(key->name) ^ size_t(key->version * 0x9E3779B97F4A7C15ull);
  }
};
struct KeyEqual {
  bool operator()(const Key* a, const Key* b) const { return a->version == b->version && a->name == b->name; }
};

int count_distinct(const std::vector<const Key*>& keys) {
  if (keys.size() < 2) return int(keys.size());
  return int(std::unordered_set<const Key*, KeyHash, KeyEqual>(keys.begin(), keys.end()).size());
}

}  // namespace

SlotTable::SlotTable(int slots) {
  if (slots < 1) throw std::invalid_argument("slots: expected at least 1, got " + std::to_string(slots));
  slots_.resize(slots);
  for (int i = 0; i < slots + kLists; ++i) links_.push_back({i, i});
  for (int i = 0; i < slots; ++i) settle(i);
}

// ---- the lists: every slot that may be given away is in one ---------------------------------------------------------

void SlotTable::unlink(int slot) {
  if (!listed(slot)) return;
  const Link link = links_[slot];
  links_[link.previous].next = link.next;
  links_[link.next].previous = link.previous;
  links_[slot] = {slot, slot};
  --available_;
}

// To the end of the list a slot belongs to now, or to none.
void SlotTable::settle(int slot) {
  unlink(slot);
  const Slot& x = slots_[slot];
  if (x.references > 0) return;
  List list = kFreeSlots;
  if (x.state != State::kFree) {
    const bool current = x.name->second.current == slot;
    if (current && x.name->second.pinned) return;
    list = current ? kLeastRecent : kSuperseded;
  }
  const int head = size() + list, last = links_[head].previous;
  links_[slot] = {last, head};
  links_[last].next = links_[head].previous = slot;
  ++available_;
}

int SlotTable::take() {
  for (List list : {kFreeSlots, kSuperseded, kLeastRecent}) {
    if (empty(list)) continue;
    const int slot = front(list);
    unlink(slot);
    if (list != kFreeSlots) {
      forget(slot);
      ++evictions_;
    }
    return slot;
  }
  throw std::logic_error("SlotTable: no slot where one was counted");
}

// ---- names ----------------------------------------------------------------------------------------------------------

int SlotTable::find(const Key& key) const {
  const auto name = names_.find(key.name);
  if (name == names_.end()) return -1;
  int slot = name->second.first;
  while (slot >= 0 && slots_[slot].version != key.version) slot = slots_[slot].sibling;
  return slot;
}

void SlotTable::make_current(Names::value_type& name, int slot) {
  const int before = name.second.current;
  if (before == slot) return;
  name.second.current = slot;
  if (before >= 0) settle(before);
}

void SlotTable::bind(int slot, const Key& key) {
  Names::value_type& name = *names_.try_emplace(key.name).first;
  Slot& x = slots_[slot];
  x.state = State::kLoading;
  x.references = 1;
  x.version = key.version;
  x.name = &name;
  x.sibling = name.second.first;
  name.second.first = slot;
  make_current(name, slot);
}

void SlotTable::forget(int slot) {
  Slot& x = slots_[slot];
  Name& name = x.name->second;
  int* link = &name.first;
  while (*link != slot) link = &slots_[*link].sibling;
  *link = x.sibling;
  if (name.current == slot) name.current = -1;
  // A pin outlives the slots: it holds for the next version too.
  if (name.first < 0 && !name.pinned) names_.erase(names_.find(x.name->first));
  x.state = State::kFree;
  x.prefetched = false;
  x.sibling = -1;
  x.name = nullptr;
}

void SlotTable::pin(const std::string& name) {
  const std::lock_guard lock(mutex_);
  Name& entry = names_.try_emplace(name).first->second;
  entry.pinned = true;
  if (entry.current >= 0) settle(entry.current);
}

void SlotTable::unpin(const std::string& name) {
  const std::lock_guard lock(mutex_);
  const auto entry = names_.find(name);
  if (entry == names_.end() || !entry->second.pinned) return;
  entry->second.pinned = false;
  if (entry->second.current >= 0) settle(entry->second.current);
  if (entry->second.first < 0) names_.erase(entry);
  wake_next();
}

// ---- acquiring ------------------------------------------------------------------------------------------------------

void SlotTable::check(const Keys& keys) const {
  if (keys.size() <= slots_.size()) return;
  std::vector<const Key*> all;
  for (const Key& key : keys) all.push_back(&key);
  if (const int distinct = count_distinct(all); distinct > size())
    throw std::invalid_argument("acquire: expected at most as many distinct adapters as there are slots, got " +
                                std::to_string(distinct) + " for " + std::to_string(size()) + " slots");
}

void SlotTable::check_open(const char* who) const {
  if (closed_) throw Closed(std::string(who) + ": the slot table is closed");
}

std::optional<Grant> SlotTable::grant(const Keys& keys) {
  std::vector<const Key*> absent;
  for (const Key& key : keys) {
    if (find(key) >= 0) continue;
    absent.push_back(&key);
    // Stale from now on, so that a pin on it does not stand in the way of its successor.
    if (const auto name = names_.find(key.name); name != names_.end()) make_current(*name, -1);
  }
  if (!absent.empty()) {
    ++count_;
    int wanted = count_distinct(absent);
    for (const Key& key : keys) {
      const int slot = find(key);
      if (slot < 0 || slots_[slot].counted == count_) continue;
      slots_[slot].counted = count_;
      wanted += listed(slot);
    }
    if (wanted > available_) return std::nullopt;
  }

  // What is here is held before anything is evicted.
  Grant result;
  result.slots.assign(keys.size(), -1);
  for (size_t i = 0; i < keys.size(); ++i) {
    const int slot = find(keys[i]);
    if (slot < 0) continue;
    Slot& x = slots_[slot];
    ++x.references;
    x.prefetched = false;
    unlink(slot);
    make_current(*x.name, slot);
    result.slots[i] = slot;
    if (x.state == State::kLoading) result.loading.push_back(int(i));
    ++hits_;
  }
  for (size_t i = 0; i < keys.size(); ++i) {
    if (result.slots[i] >= 0) continue;
    int slot = find(keys[i]);
    if (slot >= 0) {  // the same key twice
      ++slots_[slot].references;
      ++hits_;
    } else {
      slot = take();
      bind(slot, keys[i]);
      result.to_load.push_back(int(i));
      ++misses_;
    }
    result.slots[i] = slot;
  }
  return result;
}

std::optional<Grant> SlotTable::try_acquire(const Keys& keys) {
  const std::lock_guard lock(mutex_);
  check_open("acquire");
  check(keys);
  if (!line_.empty()) return std::nullopt;
  return grant(keys);
}

Grant SlotTable::acquire(const Keys& keys, Timeout timeout, const Poll& poll) {
  const Time start = Clock::now();
  const std::optional<Time> deadline = deadline_after(timeout);
  std::unique_lock lock(mutex_);
  check(keys);

  Waiter self;
  struct Place {
    SlotTable& table;
    std::list<Waiter*>::iterator at;
    Time start;
    ~Place() {
      table.line_.erase(at);
      table.waited_ += Clock::now() - start;
      table.wake_next();
    }
  } place{*this, line_.insert(line_.end(), &self), start};

  for (bool waited = false;; waited = true) {
    check_open("acquire");
    if (line_.front() == &self)
      if (auto result = grant(keys)) return *std::move(result);
    if (!waited) ++waits_;
    if (!sleep(self.wake, lock, deadline, poll)) {
      ++timeouts_;
      const int ahead = int(std::distance(line_.begin(), place.at));
      throw TimedOut("acquire: timed out waiting for slots for " + std::to_string(keys.size()) +
                     " adapters: " + std::to_string(available_) + " of " + std::to_string(size()) +
                     " slots could be given away, " + std::to_string(ahead) + " requests are ahead");
    }
  }
}

Grant SlotTable::prefetch(const Keys& keys) {
  const std::lock_guard lock(mutex_);
  check_open("prefetch");
  Grant result;
  result.slots.assign(keys.size(), -1);
  if (!line_.empty()) return result;
  // What is here is kept before anything is evicted: somebody will come for it, so to the warm end of its list.
  for (const Key& key : keys) {
    const int slot = find(key);
    if (slot < 0) continue;
    slots_[slot].prefetched = true;
    make_current(*slots_[slot].name, slot);
    if (listed(slot)) settle(slot);
  }
  for (size_t i = 0; i < keys.size(); ++i) {
    if (find(keys[i]) >= 0) continue;
    if (const auto name = names_.find(keys[i].name); name != names_.end()) make_current(*name, -1);
    if (empty(kFreeSlots) && empty(kSuperseded) && (empty(kLeastRecent) || slots_[front(kLeastRecent)].prefetched))
      continue;
    const int slot = take();
    bind(slot, keys[i]);
    slots_[slot].prefetched = true;
    result.slots[i] = slot;
    result.to_load.push_back(int(i));
    ++prefetches_;
  }
  return result;
}

// ---- loading --------------------------------------------------------------------------------------------------------

SlotTable::Slot& SlotTable::checked(int slot, const char* who) {
  if (slot < 0 || slot >= size())
    throw std::invalid_argument(std::string(who) + ": slots: expected 0 to " + std::to_string(size() - 1) + ", got " +
                                std::to_string(slot));
  if (slots_[slot].references == 0)
    throw std::invalid_argument(std::string(who) + ": slots: expected slots in use, got " + std::to_string(slot));
  return slots_[slot];
}

SlotTable::Slot& SlotTable::checked_loading(int slot, const char* who) {
  Slot& x = checked(slot, who);
  if (x.state != State::kLoading)
    throw std::invalid_argument(std::string(who) + ": slots: expected slots being loaded, got " + std::to_string(slot));
  return x;
}

void SlotTable::loaded(const Slots& slots, const std::vector<uint64_t>& versions) {
  if (slots.size() != versions.size())
    throw std::invalid_argument("loaded: versions: expected " + std::to_string(slots.size()) + ", got " +
                                std::to_string(versions.size()));
  const std::lock_guard lock(mutex_);
  for (size_t i = 0; i < slots.size(); ++i) {
    Slot& x = checked_loading(slots[i], "loaded");
    x.state = State::kLoaded;
    x.version = versions[i];
  }
  loads_.notify_all();
}

void SlotTable::failed(const Slots& slots, const std::string& message) {
  const std::lock_guard lock(mutex_);
  for (const int slot : slots) {
    Slot& x = checked(slot, "failed");
    if (x.state != State::kLoading) continue;
    forget(slot);
    x.state = State::kFailed;
    x.error = message;
    ++failures_;
  }
  loads_.notify_all();
}

void SlotTable::wait(const Slots& slots, Timeout timeout, const Poll& poll) {
  const std::optional<Time> deadline = deadline_after(timeout);
  std::unique_lock lock(mutex_);
  for (const int slot : slots) {
    while (checked(slot, "wait").state == State::kLoading) {
      check_open("wait");
      if (!sleep(loads_, lock, deadline, poll)) {
        ++timeouts_;
        throw TimedOut("acquire: timed out waiting for an adapter that another thread is loading");
      }
    }
    if (slots_[slot].state == State::kFailed) throw LoadFailed(slots_[slot].error);
  }
}

void SlotTable::release(const Slots& slots) {
  const std::lock_guard lock(mutex_);
  for (const int slot : slots) {
    Slot& x = checked(slot, "release");
    if (x.references == 1 && x.state == State::kLoading)
      throw std::invalid_argument("release: slots: expected slots that are loaded or failed, got " +
                                  std::to_string(slot) + ", which is still being loaded");
    if (--x.references > 0) continue;
    if (x.state == State::kFailed) {
      x.state = State::kFree;
      x.error.clear();
    }
    settle(slot);
  }
  wake_next();
}

// ---- waiting --------------------------------------------------------------------------------------------------------

void SlotTable::wake_next() {
  if (!line_.empty()) line_.front()->wake.notify_one();
}

// False if the deadline has passed. The lock is held again afterwards, also when `poll` throws.
bool SlotTable::sleep(std::condition_variable& wake, std::unique_lock<std::mutex>& lock, std::optional<Time> deadline,
                      const Poll& poll) {
  const Time now = Clock::now();
  if (deadline && now >= *deadline) return false;
  if (!poll) {
    if (deadline)
      wake.wait_until(lock, *deadline);
    else
      wake.wait(lock);
    return true;
  }
  const Time turn = now + kPollInterval;
  if (wake.wait_until(lock, deadline ? std::min(turn, *deadline) : turn) == std::cv_status::timeout) {
    lock.unlock();
    try {
      poll();
    } catch (...) {
      lock.lock();
      throw;
    }
    lock.lock();
  }
  return true;
}

void SlotTable::close() {
  const std::lock_guard lock(mutex_);
  closed_ = true;
  for (Waiter* waiter : line_) waiter->wake.notify_one();
  loads_.notify_all();
}

Statistics SlotTable::statistics() const {
  const std::lock_guard lock(mutex_);
  Statistics s{};
  s.slots = size();
  for (int i = 0; i < size(); ++i) {
    const Slot& x = slots_[i];
    s.free += x.state == State::kFree;
    s.loading += x.state == State::kLoading;
    s.resident += x.state == State::kLoaded;
    s.in_use += x.references > 0;
    s.pinned += x.name && x.name->second.pinned && x.name->second.current == i;
  }
  s.waiting = int(line_.size());
  s.hits = hits_;
  s.misses = misses_;
  s.evictions = evictions_;
  s.prefetches = prefetches_;
  s.failures = failures_;
  s.waits = waits_;
  s.timeouts = timeouts_;
  s.wait_seconds = waited_.count();
  return s;
}

}  // namespace loraxs::slots
