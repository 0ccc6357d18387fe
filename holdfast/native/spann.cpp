// Search and assignment of the disk index (holdfast/longterm/spann.py): a C interface for ctypes.
//
// Lists and vectors are read, never mapped: what a query costs is counted in bytes and pages. In the
// page cache, reads run one after the other, each list scanned while it is in the processor's cache;
// what is not there is asked for in one batch. With O_DIRECT a batch goes through the kernel's
// asynchronous interface. Nothing here writes to a file.

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#if defined(__linux__)
#include <linux/aio_abi.h>
#include <sys/syscall.h>
#endif
// Clang does not know the target pragmas below; it builds the portable variant.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define HOLDFAST_X86 1
#endif

namespace {

#define HOLDFAST_WIDTH 4
namespace portable {
#include "spann_lanes.h"
}
#undef HOLDFAST_WIDTH

#ifdef HOLDFAST_X86
#pragma GCC push_options
#pragma GCC target("avx2")
#define HOLDFAST_WIDTH 8
namespace avx2 {
#include "spann_lanes.h"
}
#undef HOLDFAST_WIDTH
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#define HOLDFAST_WIDTH 16
namespace avx512 {
#include "spann_lanes.h"
}
#undef HOLDFAST_WIDTH
#pragma GCC pop_options
#endif

struct Kernels {
  decltype(&portable::rows) rows;
  decltype(&portable::gather) gather;
  decltype(&portable::scan) scan;
  decltype(&portable::sums) sums;
};

const Kernels& kernels(int variant) {
  static const Kernels table[] = {
      {portable::rows, portable::gather, portable::scan, portable::sums},
#ifdef HOLDFAST_X86
      {avx2::rows, avx2::gather, avx2::scan, avx2::sums},
      {avx512::rows, avx512::gather, avx512::scan, avx512::sums},
#endif
  };
  return table[variant];
}

constexpr int64_t PAGE = 4096, WAVE = 4 << 20, CHUNK = 256;
constexpr int BATCH = 128;
constexpr uint32_t SALT = 0x9e3779b9;  // a record of zeros is not a valid one
constexpr float INF = std::numeric_limits<float>::infinity();

enum Fault { NONE = 0, BAD_LIST = 1, BAD_VECTOR = 2, SHORT = 3 };

typedef std::pair<float, uint32_t> Near;  // ordered by distance, then by number

struct Buffer {
  uint8_t* data = nullptr;
  int64_t size = 0;
  ~Buffer() { std::free(data); }
  uint8_t* need(int64_t bytes) {
    if (bytes > size) {
      std::free(data);
      size = 0;
      bytes = (bytes + PAGE - 1) / PAGE * PAGE;
      data = (uint8_t*)std::aligned_alloc(PAGE, bytes);
      if (!data) throw std::bad_alloc();
      size = bytes;
    }
    return data;
  }
};

struct Request {
  int64_t offset, length, needed;  // needed: a shorter read than this is a fault
  uint8_t* to;
};

struct Index;

// What one query needs; kept between queries, as fresh pages cost more than reading a list.
struct Scratch {
  Buffer list, wave, vectors;
  std::vector<float> distances, query;
  std::vector<Near> groups, heads, found, exact;
  std::vector<uint32_t> late;
  std::vector<Request> requests;
#if defined(__linux__)
  aio_context_t aio = 0;
  bool no_aio = false;
  ~Scratch() {
    if (aio) syscall(SYS_io_destroy, aio);
  }
#endif
  int64_t nbytes() const {
    return list.size + wave.size + vectors.size + 4 * (distances.capacity() + query.capacity()) +
           8 * (groups.capacity() + heads.capacity() + found.capacity() + exact.capacity()) +
           4 * late.capacity() + sizeof(Request) * requests.capacity();
  }
};

}  // namespace

extern "C" {
// Arrays belong to the caller and outlive the index. d is the padded dimension.
struct hf_spann_arrays {
  int64_t d, heads, groups;
  const uint8_t* head;  // one byte per component, as in lists
  const float* group;
  const int64_t* first;  // groups + 1: where each group's heads begin
  const uint32_t *page, *count;
  const uint64_t* check;
  const float *low, *step;
  double error;  // no vector lies further than this from its codes
  int64_t lists_fd, vectors_fd, direct, variant;
};

struct hf_spann_query {
  int64_t k, probe, scan, enough, rerank;
  double eps;
};

struct hf_spann_cost {
  int64_t bytes, pages, lists, vectors, bad;
};
}

namespace {

struct Index {
  hf_spann_arrays a;
  const Kernels& k;
  std::mutex mutex;
  std::vector<std::unique_ptr<Scratch>> idle;
  int64_t scratch_bytes = 0;

  explicit Index(const hf_spann_arrays& arrays) : a(arrays), k(kernels((int)arrays.variant)) {}

  std::unique_ptr<Scratch> take() {
    std::lock_guard<std::mutex> guard(mutex);
    if (idle.empty()) return std::make_unique<Scratch>();
    auto one = std::move(idle.back());
    idle.pop_back();
    scratch_bytes -= one->nbytes();
    return one;
  }
  void give(std::unique_ptr<Scratch> one) {
    std::lock_guard<std::mutex> guard(mutex);
    scratch_bytes += one->nbytes();
    idle.push_back(std::move(one));
  }
};

void keep_nearest(std::vector<Near>& heap, size_t limit, const float* distance, int64_t n,
                  uint32_t first) {
  for (int64_t i = 0; i < n; ++i) {
    const Near one(distance[i], first + (uint32_t)i);
    if (heap.size() < limit) {
      heap.push_back(one);
      std::push_heap(heap.begin(), heap.end());
    } else if (one < heap.front()) {
      std::pop_heap(heap.begin(), heap.end());
      heap.back() = one;
      std::push_heap(heap.begin(), heap.end());
    }
  }
}

// The query as codes are compared with it: (q - low) / step, and the weights step^2.
void shift(const hf_spann_arrays& a, Scratch& s, const float* q) {
  s.query.resize(2 * a.d);
  float *shifted = s.query.data(), *weight = shifted + a.d;
  for (int64_t j = 0; j < a.d; ++j) {
    shifted[j] = (q[j] - a.low[j]) / a.step[j];
    weight[j] = a.step[j] * a.step[j];
  }
}

// The nearest `probe` heads, ascending, among those of the nearest `scan` groups.
void nearest_heads(const Index& ix, Scratch& s, const float* q, int64_t probe, int64_t scan) {
  const auto& a = ix.a;
  const float *shifted = s.query.data(), *weight = shifted + a.d;
  s.distances.resize(std::max<size_t>(s.distances.size(), a.groups));
  ix.k.rows(q, a.group, a.groups, (int)a.d, s.distances.data());
  s.groups.clear();
  keep_nearest(s.groups, scan, s.distances.data(), a.groups, 0);
  std::sort_heap(s.groups.begin(), s.groups.end());
  s.heads.clear();
  for (const Near& g : s.groups) {
    const int64_t first = a.first[g.second], n = a.first[g.second + 1] - first;
    s.distances.resize(std::max<size_t>(s.distances.size(), n));
    ix.k.scan(shifted, weight, a.head + first * a.d, n, (int)a.d, a.d, s.distances.data());
    keep_nearest(s.heads, probe, s.distances.data(), n, (uint32_t)first);
  }
  std::sort_heap(s.heads.begin(), s.heads.end());
}

int64_t read_fully(int fd, uint8_t* to, int64_t length, int64_t offset) {
  int64_t done = 0;
  while (done < length) {
    const ssize_t n = pread(fd, to + done, length - done, offset + done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return -errno;
    if (n == 0) break;
    done += n;
  }
  return done;
}

// Whether everything was in the page cache and is now in `to`.
bool read_cached(int fd, uint8_t* to, int64_t length, int64_t offset) {
#if defined(__linux__) && defined(RWF_NOWAIT)
  iovec part{to, (size_t)length};
  return preadv2(fd, &part, 1, offset, RWF_NOWAIT) == length;
#else
  return read_fully(fd, to, length, offset) == length;
#endif
}

int read_one(int fd, const Request& r) {
  const int64_t n = read_fully(fd, r.to, r.length, r.offset);
  return n < 0 ? (int)n : n < r.needed ? SHORT : NONE;
}

// All requests at once, through Linux's asynchronous interface where it works.
int read_batch(Scratch& s, int fd) {
  size_t done = 0;
#if defined(__linux__)
  if (!s.aio && !s.no_aio) s.no_aio = syscall(SYS_io_setup, BATCH, &s.aio) != 0;
  iocb blocks[BATCH];
  iocb* pointers[BATCH];
  io_event events[BATCH];
  while (s.aio && done < s.requests.size()) {
    const int n = (int)std::min<size_t>(BATCH, s.requests.size() - done);
    for (int i = 0; i < n; ++i) {
      const Request& r = s.requests[done + i];
      std::memset(&blocks[i], 0, sizeof blocks[i]);
      blocks[i].aio_data = done + i;
      blocks[i].aio_lio_opcode = IOCB_CMD_PREAD;
      blocks[i].aio_fildes = fd;
      blocks[i].aio_buf = (uint64_t)r.to;
      blocks[i].aio_nbytes = r.length;
      blocks[i].aio_offset = r.offset;
      pointers[i] = &blocks[i];
    }
    const long sent = syscall(SYS_io_submit, s.aio, (long)n, pointers);
    if (sent <= 0) break;
    int fault = NONE;
    for (long got = 0; got < sent;) {
      const long more = syscall(SYS_io_getevents, s.aio, 1L, sent - got, events, nullptr);
      if (more < 0 && errno == EINTR) continue;
      // The kernel may still write to the buffers: destroying the context waits for it.
      if (more < 0) {
        const int error = -errno;
        syscall(SYS_io_destroy, s.aio);
        s.aio = 0;
        return error;
      }
      for (long i = 0; i < more; ++i) {
        const Request& r = s.requests[events[i].data];
        if (events[i].res < 0) fault = (int)events[i].res;
        else if (events[i].res < r.needed) fault = read_one(fd, r);
      }
      got += more;
    }
    if (fault) return fault;
    done += sent;
  }
#endif
  for (; done < s.requests.size(); ++done)
    if (const int fault = read_one(fd, s.requests[done])) return fault;
  return NONE;
}

void will_need(int fd, int64_t offset, int64_t length) {
#if defined(POSIX_FADV_WILLNEED)
  posix_fadvise(fd, offset, length, POSIX_FADV_WILLNEED);
#endif
}

int64_t pages_of(int64_t offset, int64_t length) {
  return (offset + length + PAGE - 1) / PAGE - offset / PAGE;
}

// The candidates of one query: an entry enters while its distance is at most `bound`.
struct Candidates {
  std::vector<Near>& found;
  const hf_spann_query& query;
  const double error;
  const uint8_t* visible;
  size_t limit;
  float bound = INF;

  Candidates(std::vector<Near>& f, const hf_spann_query& q, double e, const uint8_t* v)
      : found(f), query(q), error(e), visible(v), limit(4 * (size_t)std::min<int64_t>(
                                                            q.rerank, 1 << 20) + 64) {
    found.clear();
  }

  void add(const float* distance, const uint8_t* list, int64_t n, int64_t d) {
    for (int64_t i = 0; i < n; ++i) {
      if (!(distance[i] <= bound)) continue;
      uint32_t slot;
      std::memcpy(&slot, list + i * (d + 4) + d, 4);
      if (!(visible[slot >> 3] >> (slot & 7) & 1)) continue;
      found.emplace_back(distance[i], slot);
      if (found.size() >= limit) {
        settle();
        limit = std::max(limit, 2 * found.size());
      }
    }
  }

  // Replicas of a vector have equal codes, so equal distances: sorting puts them side by side.
  void settle() {
    std::sort(found.begin(), found.end());
    found.erase(std::unique(found.begin(), found.end()), found.end());
    if ((int64_t)found.size() >= query.k) {
      // Beyond this no vector can be among the k nearest, however its codes were rounded.
      const double reach = std::sqrt((double)found[query.k - 1].first) + 2 * error;
      bound = std::min(bound, (float)(reach * reach * (1 + 1e-5)));
    }
    if ((int64_t)found.size() >= query.rerank) {
      found.resize(query.rerank);
      bound = std::min(bound, found.back().first);
    }
    while (!found.empty() && found.back().first > bound) found.pop_back();
  }
};

int scan_list(Index& ix, Scratch& s, uint32_t head, const uint8_t* list, Candidates& candidates,
              hf_spann_cost& cost) {
  const auto& a = ix.a;
  const float *shifted = s.query.data(), *weight = shifted + a.d;
  const int64_t n = a.count[head];
  if (ix.k.sums(list, n * (a.d + 4) / 4) != a.check[head]) {
    cost.bad = head;
    return BAD_LIST;
  }
  s.distances.resize(std::max<size_t>(s.distances.size(), n));
  ix.k.scan(shifted, weight, list, n, (int)a.d, a.d + 4, s.distances.data());
  candidates.add(s.distances.data(), list, n, a.d);
  return NONE;
}

int scan_lists(Index& ix, Scratch& s, Candidates& candidates, hf_spann_cost& cost) {
  const auto& a = ix.a;
  const int64_t entry = a.d + 4;
  const int fd = (int)a.lists_fd;
  s.late.clear();
  for (const Near& h : s.heads) {
    const int64_t length = a.count[h.second] * entry, offset = a.page[h.second] * PAGE;
    if (!length) continue;
    const int64_t pages = pages_of(offset, length);
    cost.bytes += a.direct ? pages * PAGE : length;
    cost.pages += pages;
    cost.lists += 1;
    if (!a.direct) {
      uint8_t* to = s.list.need(length);
      if (read_cached(fd, to, length, offset)) {
        if (int f = scan_list(ix, s, h.second, to, candidates, cost)) return f;
        continue;
      }
    }
    s.late.push_back(h.second);
  }
  if (!a.direct) {
    for (uint32_t h : s.late) will_need(fd, a.page[h] * PAGE, a.count[h] * entry);
    for (uint32_t h : s.late) {
      const int64_t length = a.count[h] * entry;
      const Request r{a.page[h] * PAGE, length, length, s.list.need(length)};
      if (int f = read_one(fd, r)) return f;
      if (int f = scan_list(ix, s, h, r.to, candidates, cost)) return f;
    }
    return NONE;
  }
  for (size_t i = 0; i < s.late.size();) {
    const size_t begin = i;
    int64_t used = 0;
    s.requests.clear();
    for (; i < s.late.size(); ++i) {
      const int64_t needed = a.count[s.late[i]] * entry;
      const int64_t length = (needed + PAGE - 1) / PAGE * PAGE;
      if (i > begin && used + length > WAVE) break;
      s.requests.push_back({a.page[s.late[i]] * PAGE, length, needed, nullptr});
      used += length;
    }
    uint8_t* to = s.wave.need(used);
    for (Request& r : s.requests) {
      r.to = to;
      to += (r.length + PAGE - 1) / PAGE * PAGE;
    }
    int fault = read_batch(s, fd);
    for (size_t j = 0; j < s.requests.size() && !fault; ++j)
      fault = scan_list(ix, s, s.late[begin + j], s.requests[j].to, candidates, cost);
    if (fault) return fault;
  }
  return NONE;
}

// A record is a vector, its id, the checksum of both with the slot, and the slot.
int measure(const Index& ix, const float* q, uint32_t slot, uint8_t* record, Scratch& s,
            std::vector<int64_t>& ids, hf_spann_cost& cost) {
  const int64_t d = ix.a.d;
  uint32_t check, zero = 0, written;
  std::memcpy(&check, record + 4 * d + 8, 4);
  std::memcpy(&written, record + 4 * d + 12, 4);
  std::memcpy(record + 4 * d + 8, &zero, 4);
  const uint64_t sums = ix.k.sums(record, d + 4);
  std::memcpy(record + 4 * d + 8, &check, 4);
  if (written != slot || check != (SALT ^ (uint32_t)(sums >> 32 ^ sums))) {
    cost.bad = slot;
    return BAD_VECTOR;
  }
  float distance;
  ix.k.rows(q, (const float*)record, 1, (int)d, &distance);
  s.exact.emplace_back(distance, (uint32_t)ids.size());
  int64_t id;
  std::memcpy(&id, record + 4 * d, 8);
  ids.push_back(id);
  return NONE;
}

int rerank(Index& ix, Scratch& s, const float* q, std::vector<int64_t>& ids, hf_spann_cost& cost) {
  const auto& a = ix.a;
  const int64_t record = 4 * a.d + 16;
  const int fd = (int)a.vectors_fd;
  s.exact.clear();
  ids.clear();
  // In the order of the file: vectors that lie together share pages.
  std::sort(s.found.begin(), s.found.end(),
            [](const Near& x, const Near& y) { return x.second < y.second; });
  cost.vectors += s.found.size();
  std::vector<uint8_t*> where(CHUNK);
  for (size_t begin = 0; begin < s.found.size(); begin += CHUNK) {
    const size_t n = std::min<size_t>(CHUNK, s.found.size() - begin);
    uint8_t* to = s.vectors.need((int64_t)n * (a.direct ? (record / PAGE + 2) * PAGE : record));
    s.requests.clear();
    int64_t last = -1;
    for (size_t i = 0; i < n; ++i) {
      const int64_t offset = s.found[begin + i].second * record;
      if (!a.direct) {
        where[i] = to + i * record;
        cost.bytes += record;
        cost.pages += pages_of(offset, record) - (offset / PAGE == last);
        last = (offset + record - 1) / PAGE;
        if (!read_cached(fd, where[i], record, offset)) {
          s.requests.push_back({offset, record, record, where[i]});
          will_need(fd, offset, record);
        }
        continue;
      }
      const int64_t low = offset / PAGE * PAGE, high = (offset + record + PAGE - 1) / PAGE * PAGE;
      if (!s.requests.empty() && low <= s.requests.back().offset + s.requests.back().length) {
        Request& r = s.requests.back();
        where[i] = r.to + (offset - r.offset);
        r.length = std::max(r.length, high - r.offset);
        r.needed = offset + record - r.offset;
      } else {
        if (!s.requests.empty()) to = s.requests.back().to + s.requests.back().length;
        s.requests.push_back({low, high - low, offset + record - low, to});
        where[i] = to + (offset - low);
      }
    }
    int fault = NONE;
    if (a.direct) {
      for (const Request& r : s.requests) {
        cost.bytes += r.length;
        cost.pages += r.length / PAGE;
      }
      fault = read_batch(s, fd);
    } else {
      for (size_t i = 0; i < s.requests.size() && !fault; ++i) fault = read_one(fd, s.requests[i]);
    }
    for (size_t i = 0; i < n && !fault; ++i)
      fault = measure(ix, q, s.found[begin + i].second, where[i], s, ids, cost);
    if (fault) return fault;
  }
  return NONE;
}

int search_one(Index& ix, Scratch& s, const float* q, const hf_spann_query& query,
               const uint8_t* visible, int64_t* out_ids, float* out_distances,
               hf_spann_cost& cost) {
  const auto& a = ix.a;
  shift(a, s, q);
  nearest_heads(ix, s, q, query.probe, query.scan);
  // Far lists are skipped, but never so many that too few entries are left to choose from.
  int64_t entries = 0;
  size_t kept = 0;
  const double far = (1 + query.eps) * (s.heads.empty() ? 0 : s.heads[0].first);
  while (kept < s.heads.size() && (s.heads[kept].first <= far || entries < query.enough))
    entries += a.count[s.heads[kept++].second];
  s.heads.resize(kept);

  Candidates candidates(s.found, query, a.error, visible);
  if (int fault = scan_lists(ix, s, candidates, cost)) return fault;
  candidates.settle();
  std::vector<int64_t> ids;
  if (int fault = rerank(ix, s, q, ids, cost)) return fault;
  std::sort(s.exact.begin(), s.exact.end(), [&](const Near& x, const Near& y) {
    return x.first != y.first ? x.first < y.first : ids[x.second] < ids[y.second];
  });
  for (int64_t i = 0; i < query.k; ++i) {
    const bool there = i < (int64_t)s.exact.size();
    out_ids[i] = there ? ids[s.exact[i].second] : -1;
    out_distances[i] = there ? s.exact[i].first : INF;
  }
  return NONE;
}

}  // namespace

extern "C" {

void* hf_spann_open(const hf_spann_arrays* arrays) { return new (std::nothrow) Index(*arrays); }

void hf_spann_close(void* index) { delete (Index*)index; }

// Bytes of buffers that are kept for the next queries.
int64_t hf_spann_buffers(void* index) {
  Index& ix = *(Index*)index;
  std::lock_guard<std::mutex> guard(ix.mutex);
  return ix.scratch_bytes;
}

// Zero, a negative errno, or a Fault with cost->bad saying where.
int hf_spann_search(void* index, int64_t n, const float* queries, const hf_spann_query* query,
                    const uint8_t* visible, int64_t* ids, float* distances, hf_spann_cost* cost,
                    int threads) {
  Index& ix = *(Index*)index;
  int result = NONE;
#pragma omp parallel num_threads(threads)
  {
    hf_spann_cost mine{};
    int fault = NONE;
    std::unique_ptr<Scratch> scratch;
    try {
      scratch = ix.take();
    } catch (const std::bad_alloc&) {
      fault = -ENOMEM;
    }
#pragma omp for schedule(dynamic, 4) nowait
    for (int64_t i = 0; i < n; ++i) {
      if (fault) continue;
      try {
        fault = search_one(ix, *scratch, queries + i * ix.a.d, *query, visible, ids + i * query->k,
                           distances + i * query->k, mine);
      } catch (const std::bad_alloc&) {
        fault = -ENOMEM;
      }
    }
    if (scratch) ix.give(std::move(scratch));
#pragma omp critical
    {
      cost->bytes += mine.bytes;
      cost->pages += mine.pages;
      cost->lists += mine.lists;
      cost->vectors += mine.vectors;
      if (fault && !result) {
        result = fault;
        cost->bad = mine.bad;
      }
    }
  }
  return result;
}

// The nearest `probe` heads of each query, ascending; missing ones are 0xffffffff.
int hf_spann_nearest(void* index, int64_t n, const float* queries, int64_t probe, int64_t scan,
                     uint32_t* heads, int threads) {
  Index& ix = *(Index*)index;
  int result = NONE;
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) {
    try {
      auto s = ix.take();
      shift(ix.a, *s, queries + i * ix.a.d);
      nearest_heads(ix, *s, queries + i * ix.a.d, probe, scan);
      for (int64_t j = 0; j < probe; ++j)
        heads[i * probe + j] = j < (int64_t)s->heads.size() ? s->heads[j].second : ~0u;
      ix.give(std::move(s));
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      result = -ENOMEM;
    }
  }
  return result;
}

// For each row of x, the heads whose lists hold it. table (t,c) has candidate heads, ~0u for none;
// row i takes those of table row which[i].
int hf_spann_closure(int variant, int64_t n, int64_t d, const float* x, const float* head,
                     const uint32_t* table, int64_t c, const int64_t* which, int64_t among,
                     double rng, int64_t replicas, uint32_t* out, float* out_distance,
                     int threads) {
  const Kernels& k = kernels(variant);
  int result = NONE;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> distances;
    std::vector<Near> order;
    try {
      distances.resize(c);
      order.reserve(c);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      result = -ENOMEM;
    }
#pragma omp for schedule(dynamic, 64)
    for (int64_t i = 0; i < n; ++i) {
      if ((int64_t)distances.size() < c) continue;
      const uint32_t* candidates = table + which[i] * c;
      int64_t m = 0;
      while (m < c && candidates[m] != ~0u) ++m;
      k.gather(x + i * d, head, candidates, m, (int)d, distances.data());
      order.clear();
      for (int64_t j = 0; j < m; ++j) order.emplace_back(distances[j], candidates[j]);
      const int64_t near = std::min(among, m);
      std::partial_sort(order.begin(), order.begin() + near, order.end());
      int64_t taken = 0;
      uint32_t* mine = out + i * replicas;
      for (int64_t j = 0; j < near && taken < replicas; ++j) {
        const float* h = head + (int64_t)order[j].second * d;
        k.gather(h, head, mine, taken, (int)d, distances.data());
        bool apart = true;
        for (int64_t t = 0; t < taken; ++t) apart &= rng * distances[t] >= order[j].first;
        if (!apart) continue;
        mine[taken] = order[j].second;
        out_distance[i * replicas + taken++] = order[j].first;
      }
      for (; taken < replicas; ++taken) {
        mine[taken] = ~0u;
        out_distance[i * replicas + taken] = INF;
      }
    }
  }
  return result;
}
}
