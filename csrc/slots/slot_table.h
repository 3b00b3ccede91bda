#pragma once
// Which adapter lies in which slot of a slab, who uses it, and who gets the next slot. Threads may share a table.
//
// A slot is free, being loaded, or loaded. Whoever acquires an adapter that lies nowhere is told to load it, outside
// the table's lock, and reports back; the others who want it wait for that. A slot with references is never given
// away; of the others go first the free ones, then superseded versions, then the least recently used.
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <list>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace loraxs::slots {

struct TimedOut : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct Closed : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct LoadFailed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Key {
  std::string name;
  uint64_t version;
};
using Keys = std::vector<Key>;
using Slots = std::vector<int>;

// One reference to the slot of each key.
struct Grant {
  Slots slots;               // of each key; -1 where a prefetch got none
  std::vector<int> to_load;  // positions of keys that the caller must load and report as loaded() or failed()
  std::vector<int> loading;  // positions of keys that somebody else is loading: see wait()
};

struct Statistics {
  int slots, free, resident, in_use, pinned, loading, waiting;
  uint64_t hits, misses, evictions, prefetches, failures, waits, timeouts;
  double wait_seconds;
};

class SlotTable {
 public:
  using Timeout = std::optional<std::chrono::duration<double>>;
  // Called now and then by a waiting thread, without the lock; may throw to give up. May be empty.
  using Poll = std::function<void()>;

  explicit SlotTable(int slots);
  SlotTable(const SlotTable&) = delete;
  SlotTable& operator=(const SlotTable&) = delete;

  // A slot for every key, or none for any: nullopt if there are not enough now or others wait already. Throws
  // std::invalid_argument if more distinct keys are asked for than there are slots, and Closed.
  std::optional<Grant> try_acquire(const Keys& keys);

  // The same, waiting in line until there are enough. Throws TimedOut too.
  Grant acquire(const Keys& keys, Timeout timeout, const Poll& poll);

  // Slots for those keys that lie nowhere yet, as far as some can be had without waiting and without evicting what an
  // earlier prefetch brought for somebody. Slots of `to_load` carry a reference, the others are -1.
  Grant prefetch(const Keys& keys);

  // The caller has filled slots it was told to load, with these versions: an adapter may have been replaced since.
  void loaded(const Slots& slots, const std::vector<uint64_t>& versions);

  // The caller could not fill those of its slots that are still being loaded; the others stay as they are. Whoever
  // waits for these slots gets the message; the next to ask loads anew.
  void failed(const Slots& slots, const std::string& message);

  // Returns when none of the slots is being loaded. Throws LoadFailed with the message of one that failed, TimedOut,
  // Closed.
  void wait(const Slots& slots, Timeout timeout, const Poll& poll);

  // Gives one reference to each slot back.
  void release(const Slots& slots);

  // From now on the version of this adapter that was asked for last stays, used or not; or no longer.
  void pin(const std::string& name);
  void unpin(const std::string& name);

  // Wakes whoever waits, with Closed; nothing can be acquired any more, what was acquired can be released.
  void close();

  // In a forked child, where neither the threads are that use the table nor maybe who holds its lock.
  void abandon() { abandoned_ = true; }
  bool abandoned() const { return abandoned_; }

  Statistics statistics() const;
  int size() const { return int(slots_.size()); }

 private:
  using Time = std::chrono::steady_clock::time_point;
  enum class State : uint8_t { kFree, kLoading, kLoaded, kFailed };
  enum List : int { kFreeSlots, kSuperseded, kLeastRecent, kLists };

  struct Name {
    int first = -1;    // slots that hold a version of it, linked by Slot::sibling
    int current = -1;  // the one asked for last, -1 if it was given away
    bool pinned = false;
  };
  using Names = std::unordered_map<std::string, Name>;

  struct Slot {
    State state = State::kFree;
    bool prefetched = false;  // and not acquired since
    int references = 0;
    int sibling = -1;
    uint64_t version = 0;
    uint64_t counted = 0;               // the last count_ that has met this slot
    Names::value_type* name = nullptr;  // nodes of an unordered_map stay where they are
    std::string error;
  };
  struct Link {
    int previous, next;
  };
  struct Waiter {
    std::condition_variable wake;
  };

  std::optional<Grant> grant(const Keys& keys);
  int find(const Key& key) const;
  int take();
  void bind(int slot, const Key& key);
  void forget(int slot);
  void make_current(Names::value_type& name, int slot);
  void settle(int slot);
  void unlink(int slot);
  bool listed(int slot) const { return links_[slot].next != slot; }
  int front(List list) const { return links_[size() + list].next; }
  bool empty(List list) const { return front(list) == size() + list; }
  Slot& checked(int slot, const char* who);
  Slot& checked_loading(int slot, const char* who);
  void check(const Keys& keys) const;
  void check_open(const char* who) const;
  void wake_next();
  static bool sleep(std::condition_variable& wake, std::unique_lock<std::mutex>& lock, std::optional<Time> deadline,
                    const Poll& poll);

  mutable std::mutex mutex_;
  std::condition_variable loads_;  // some slot is no longer being loaded
  std::list<Waiter*> line_;        // first come, first served
  std::vector<Slot> slots_;
  std::vector<Link> links_;  // of the slots, then one head per list; a slot linked to itself is in no list
  Names names_;
  int available_ = 0;  // slots in any list
  uint64_t count_ = 0;
  bool closed_ = false;
  std::atomic<bool> abandoned_{false};
  uint64_t hits_ = 0, misses_ = 0, evictions_ = 0, prefetches_ = 0, failures_ = 0, waits_ = 0, timeouts_ = 0;
  std::chrono::duration<double> waited_{0};
};

}  // namespace loraxs::slots
