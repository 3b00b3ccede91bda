// Threads on one slot table, for python_tests/store/test_slot_table.py to run under the sanitizers: what a slot holds
// is plain memory, so that a slot given away too early is a data race and a wrong number.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "slots/slot_table.cpp"

namespace {

using namespace loraxs::slots;
using namespace std::chrono_literals;

constexpr int kSlots = 8, kThreads = 6, kRounds = 3000, kNames = 24;

#define EXPECT(condition)                                                 \
  if (!(condition)) {                                                     \
    std::fprintf(stderr, "line %d: expected %s\n", __LINE__, #condition); \
    std::exit(1);                                                         \
  }

struct Slab {
  std::string name[kSlots];
  uint64_t version[kSlots] = {};
};

void fill(SlotTable& table, Slab& slab, const Keys& keys, const Grant& grant, std::minstd_rand& random) {
  for (const int i : grant.to_load) {
    const int slot = grant.slots[i];
    slab.name[slot] = keys[i].name;
    slab.version[slot] = keys[i].version;
    if (random() % 16 == 0)
      table.failed({slot}, "as asked");
    else
      table.loaded({slot}, {keys[i].version});
  }
}

void worker(SlotTable& table, Slab& slab, int seed) {
  std::minstd_rand random(seed);
  for (int round = 0; round < kRounds; ++round) {
    Keys keys(1 + random() % kSlots);
    for (Key& key : keys) key = {"adapter " + std::to_string(random() % kNames), random() % 8 == 0};
    if (random() % 4 == 0) {
      const Grant grant = table.prefetch(keys);
      fill(table, slab, keys, grant, random);
      Slots held;
      for (const int i : grant.to_load) held.push_back(grant.slots[i]);
      table.release(held);
      continue;
    }
    // Without a poll nothing but a wake-up ends a wait: a lost one hangs.
    const SlotTable::Timeout timeout = random() % 4 ? SlotTable::Timeout() : SlotTable::Timeout(1e-4);
    try {
      const Grant grant = table.acquire(keys, timeout, {});
      fill(table, slab, keys, grant, random);
      try {
        table.wait(grant.slots, std::nullopt, {});
        for (size_t i = 0; i < keys.size(); ++i) {
          EXPECT(slab.name[grant.slots[i]] == keys[i].name);
          EXPECT(slab.version[grant.slots[i]] == keys[i].version);
        }
      } catch (const LoadFailed&) {
      }
      // Not across an acquire: batches that wait for a pinned slot would wait for each other.
      if (random() % 8 == 0) table.pin(keys[0].name);
      table.release(grant.slots);
      table.unpin(keys[0].name);
    } catch (const TimedOut&) {
    }
  }
}

// Whoever gives up lets the next in line through; whoever still waits is told when the table closes.
void give_up_and_close(SlotTable& table) {
  Keys most(kSlots - 1);
  for (int i = 0; i < kSlots - 1; ++i) most[i] = {"last " + std::to_string(i), 0};
  const Keys two{{"one", 0}, {"two", 0}}, one{{"one more", 0}}, another{{"another", 0}};
  const Grant grant = table.acquire(most, std::nullopt, {});
  table.loaded(grant.slots, std::vector<uint64_t>(most.size(), 0));

  std::atomic<bool> gave_up = false, closed = false;
  std::thread impatient([&] {
    try {
      table.acquire(two, SlotTable::Timeout(0.05), {});
    } catch (const TimedOut&) {
      gave_up = true;
    }
  });
  while (table.statistics().waiting == 0 && !gave_up) std::this_thread::sleep_for(1ms);
  // Nobody releases anything: only the one who gives up can wake this one.
  const Grant next = table.acquire(one, std::nullopt, {});
  table.loaded(next.slots, {0});
  impatient.join();
  EXPECT(gave_up);

  std::thread patient([&] {
    try {
      table.acquire(another, std::nullopt, {});
    } catch (const Closed&) {
      closed = true;
    }
  });
  while (table.statistics().waiting == 0) std::this_thread::sleep_for(1ms);
  table.close();
  patient.join();
  EXPECT(closed);
  table.release(grant.slots);
  table.release(next.slots);
}

}  // namespace

int main() {
  SlotTable table(kSlots);
  Slab slab;
  Keys all(kSlots);
  for (int i = 0; i < kSlots; ++i) all[i] = {"first " + std::to_string(i), 0};
  const Grant first = table.acquire(all, std::nullopt, {});
  table.loaded(first.slots, std::vector<uint64_t>(all.size(), 0));
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back([&, i] { worker(table, slab, i + 1); });
  // On one busy core the threads may else run one after the other, and none would ever wait.
  while (table.statistics().waiting == 0) std::this_thread::sleep_for(1ms);
  table.release(first.slots);
  for (std::thread& thread : threads) thread.join();
  const Statistics s = table.statistics();
  EXPECT(s.in_use == 0 && s.pinned == 0 && s.loading == 0 && s.waiting == 0);
  EXPECT(s.resident + s.free == kSlots);
  EXPECT(s.evictions > 0 && s.waits > 0 && s.prefetches > 0 && s.failures > 0);

  give_up_and_close(table);
  std::puts("ok");
}
