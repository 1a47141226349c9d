// The profile: what the memory system would have to do for each line of a kernel. Addresses are collected thread by thread
// while a block runs; afterwards the k-th access of each of a warp's lanes at one place make up one request.
//
//   shared memory   32 banks of 4 bytes: a request takes as many passes as the busiest bank has different words.
//                   Accesses of 8 and 16 bytes are served for 16 and 8 lanes at a time.
//   global memory   sectors of 32 bytes: as many as the request's addresses fall into.
#include <algorithm>
#include <set>
#include <unordered_map>

#include "state.h"

namespace minidiff::emulator {
namespace {

Machine& m = machine;

using Request = std::vector<uintptr_t>;  // an address a lane; 0: did not take part

struct Kept {
  int request, thread;
  int64_t offset;
};

struct Counter {  // of one place, kind and width in one kernel
  std::string kernel;
  uint16_t place;
  bool shared, store;
  int bytes;
  uint64_t requests = 0, transactions = 0, ideal = 0;
  std::vector<Kept> kept;
  int kept_requests = 0;

  std::vector<Request> warps;       // of this block: 32 addresses for the first request, 32 for the second ...
  std::vector<uint32_t> times;      // how often each thread came by
  std::vector<uintptr_t> start_of;  // of the buffer, beside each warp's addresses
};

struct Profile {
  bool on = false;
  int records = 0;
  uint64_t block = 0;
  std::unordered_map<uint64_t, Counter> counters;
};
Profile profile_;

int count_different(std::vector<uintptr_t>& v) {
  std::sort(v.begin(), v.end());
  return int(std::unique(v.begin(), v.end()) - v.begin());
}

void count_banks(Counter& k, const uintptr_t* lanes) {
  int together = k.bytes <= 4 ? 32 : k.bytes == 8 ? 16 : 8;
  for (int first = 0; first < 32; first += together) {
    std::vector<uintptr_t> words;
    for (int l = first; l < first + together; l++)
      if (uintptr_t a = lanes[l])
        for (uintptr_t w = a / 4; w <= (a + unsigned(k.bytes) - 1) / 4; w++) words.push_back(w);
    if (words.empty()) continue;
    words.resize(size_t(count_different(words)));
    int busy[32] = {};
    for (uintptr_t w : words) busy[w % 32]++;
    k.transactions += uint64_t(*std::max_element(busy, busy + 32));
    k.ideal++;
  }
}

void count_sectors(Counter& k, const uintptr_t* lanes) {
  std::vector<uintptr_t> sectors, addresses;
  for (int l = 0; l < 32; l++)
    if (uintptr_t a = lanes[l]) {
      addresses.push_back(a);
      for (uintptr_t s = a / 32; s <= (a + unsigned(k.bytes) - 1) / 32; s++) sectors.push_back(s);
    }
  k.transactions += uint64_t(count_different(sectors));
  k.ideal += (uint64_t(count_different(addresses)) * unsigned(k.bytes) + 31) / 32;
}

void keep(Counter& k, const uintptr_t* lanes, unsigned warp) {
  if (profile_.block != m.block || k.kept_requests >= profile_.records) return;
  for (int l = 0; l < 32; l++)
    if (lanes[l]) k.kept.push_back({k.kept_requests, int(warp) * 32 + l, int64_t(lanes[l] - k.start_of[warp])});
  k.kept_requests++;
}

void count_block(Counter& k) {
  for (unsigned w = 0; w < k.warps.size(); w++)
    for (size_t i = 0; i < k.warps[w].size(); i += 32) {
      const uintptr_t* lanes = &k.warps[w][i];
      if (std::all_of(lanes, lanes + 32, [](uintptr_t a) { return !a; })) continue;
      k.requests++;
      if (k.shared) count_banks(k, lanes);
      else count_sectors(k, lanes);
      keep(k, lanes, w);
    }
  k.warps.clear();
  k.times.clear();
  k.start_of.clear();
}

std::vector<Place> places_of_all(const std::vector<const Counter*>& counters) {
  std::vector<uintptr_t> pcs;
  for (const Counter* k : counters)
    if (where(k->place).pc) pcs.push_back(where(k->place).pc);
  std::vector<Place> found = places_of(pcs), places;
  size_t next = 0;
  for (const Counter* k : counters) {
    const Where& w = where(k->place);
    if (w.pc) places.push_back(found[next++]);
    else places.push_back({base_name(w.site.file), w.site.line, place(w.site)});
  }
  return places;
}

std::vector<const Counter*> all_counters() {
  std::vector<const Counter*> all;
  for (const auto& [key, k] : profile_.counters) all.push_back(&k);
  return all;
}

}  // namespace

bool profiling() { return profile_.on; }

void profile_access(const char* p, size_t bytes, const Region& r, bool store, uint16_t place) {
  uint64_t kernel = uint64_t(m.count - m.counts.data());
  uint64_t key = kernel << 32 | uint64_t(place) << 16 | bytes << 2 | unsigned(r.shared) << 1 | unsigned(store);
  Counter& k = profile_.counters[key];
  if (k.kernel.empty()) {
    k.kernel = m.kernel;
    k.place = place;
    k.shared = r.shared;
    k.store = store;
    k.bytes = int(bytes);
  }
  if (k.warps.empty()) {
    k.warps.resize(m.n_warps);
    k.times.resize(m.n);
    k.start_of.resize(m.n_warps);
  }
  const Thread& t = *m.current;
  size_t at = size_t(k.times[t.number]++) * 32;
  Request& addresses = k.warps[t.warp];
  if (addresses.size() < at + 32) addresses.resize(at + 32);
  addresses[at + t.lane] = reinterpret_cast<uintptr_t>(p);
  k.start_of[t.warp] = reinterpret_cast<uintptr_t>(r.start);
}

void profile_block_end() {
  for (auto& [key, k] : profile_.counters)
    if (!k.warps.empty()) count_block(k);
}

void start_profile(int records, uint64_t block) {
  std::lock_guard<std::mutex> guard(m.lock);
  profile_ = {true, records, block, {}};
}

void stop_profile() {
  std::lock_guard<std::mutex> guard(m.lock);
  profile_.on = false;
}

std::vector<ProfileRow> profile() {
  std::lock_guard<std::mutex> guard(m.lock);
  std::vector<const Counter*> all = all_counters();
  std::vector<Place> places = places_of_all(all);
  std::map<std::tuple<std::string, std::string, int, bool, bool, int>, ProfileRow> rows;
  for (size_t i = 0; i < all.size(); i++) {
    const Counter& k = *all[i];
    const Place& at = places[i];
    ProfileRow& row = rows[{k.kernel, at.file, at.line, k.shared, k.store, k.bytes}];
    row.kernel = k.kernel;
    row.file = at.file;
    row.line = at.line;
    row.shared = k.shared;
    row.store = k.store;
    row.bytes = k.bytes;
    row.requests += k.requests;
    row.transactions += k.transactions;
    row.ideal += k.ideal;
  }
  std::vector<ProfileRow> sorted;
  for (auto& [key, row] : rows) sorted.push_back(std::move(row));
  return sorted;
}

std::vector<AccessRecord> access_records(const std::string& file, int line, bool shared, bool store) {
  std::lock_guard<std::mutex> guard(m.lock);
  std::vector<const Counter*> all = all_counters();
  std::vector<Place> places = places_of_all(all);
  std::vector<AccessRecord> records;
  for (size_t i = 0; i < all.size(); i++) {
    if (places[i].file != file || places[i].line != line || all[i]->shared != shared || all[i]->store != store) continue;
    for (const Kept& k : all[i]->kept) records.push_back({k.request, k.thread, k.offset});
  }
  return records;
}

}  // namespace minidiff::emulator
