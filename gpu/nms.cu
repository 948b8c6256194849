// Non-maximum suppression of B images with K candidates each: mask, (torch's sort), gather, sweep, collect.
//
// A rank is a place among an image's candidates by falling score; only candidates that take part have one. Labels are
// dealt into groups, and one block sweeps one group of one image: candidates of two labels do not touch each other.

constexpr int kGroups = 64;    // as in nms.py
constexpr int kNoGroup = 255;  // the group of a place behind the last rank
constexpr int kThreads = 256;  // of mask, gather and sweep, as in nms.py; candidates of a tile
constexpr int kWarps = kThreads / 32;
constexpr int kQueue = 2048;  // ranks: a power of two, more than a tile and what one call of enqueue adds
constexpr int kUnroll = 4;    // loads in flight
constexpr unsigned kAllLanes = 0xffffffffu;

struct Candidate {
  float4 box;
  long long label;
};

// What is known of the candidates that survive, in the order in which they were found.
struct Survivors {
  float4* boxes;
  long long* labels;
};

__device__ float minus_infinity() { return __uint_as_float(0xff800000u); }

__device__ bool is_finite(float x) { return fabsf(x) <= 3.402823466e38f; }

// The operations are in the order of reference.py, so that they round alike. The first test spares the division.
__device__ bool overlap(float4 a, float4 b, float limit) {
  float width = fmaxf(fminf(a.z, b.z) - fmaxf(a.x, b.x), 0.0f);
  float height = fmaxf(fminf(a.w, b.w) - fmaxf(a.y, b.y), 0.0f);
  float intersection = width * height;
  if (intersection == 0.0f && limit >= 0.0f) return false;
  float both = (a.z - a.x) * (a.w - a.y) + (b.z - b.x) * (b.w - b.y) - intersection;
  return intersection / both > limit;
}

__device__ bool is_suppressed(const Candidate& candidate, const Survivors& survivors, int begin, int end, float limit) {
  for (int first = begin; first < end; first += kUnroll) {
    float4 boxes[kUnroll];
    long long labels[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      int place = min(first + i, end - 1);
      boxes[i] = survivors.boxes[place];
      labels[i] = survivors.labels[place];
    }
    bool is_hit = false;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) is_hit |= labels[i] == candidate.label && overlap(boxes[i], candidate.box, limit);
    if (is_hit) return true;
  }
  return false;
}

__device__ int sum_of_warp(int value) {
  for (int lanes = 16; lanes > 0; lanes >>= 1) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

// Return the sum of `value` over the threads before this one, and in `total` over the block. `partial` has a place for
// each warp; the caller puts a barrier between two calls.
__device__ int sum_before(int value, int* partial, int& total) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, inclusive = value;
  for (int lanes = 1; lanes < 32; lanes <<= 1) {
    int lower = __shfl_up_sync(kAllLanes, inclusive, lanes);
    if (lane >= lanes) inclusive += lower;
  }
  if (lane == 31) partial[warp] = inclusive;
  __syncthreads();
  int before = inclusive - value;
  total = 0;
  for (int i = 0; i < blockDim.x / 32; ++i) {
    if (i < warp) before += partial[i];
    total += partial[i];
  }
  return before;
}

// Write the scores to sort by: -inf where a candidate does not take part, and never -0, which must equal +0.
extern "C" __global__ void nms_mask(const float4* __restrict__ boxes, const float* __restrict__ scores, float floor,
                                    long long num_candidates, float* __restrict__ masked) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= num_candidates) return;
  float score = scores[i];
  bool takes_part = score >= floor && is_finite(score);
  if (takes_part) {
    float4 box = boxes[i];
    takes_part = is_finite(box.x) && is_finite(box.y) && is_finite(box.z) && is_finite(box.w);
  }
  masked[i] = takes_part ? score + 0.0f : minus_infinity();
}

// Bring boxes and labels into the order of ranks, and deal the labels into groups. `groups` and `survives` have a byte
// for each rank, in rows of `pitch` bytes; `group_sizes` [B, kGroups] comes in as zeros.
extern "C" __global__ void __launch_bounds__(kThreads)
    nms_gather(const float4* __restrict__ boxes, const long long* __restrict__ labels,
               const float* __restrict__ sorted_scores, const long long* __restrict__ order, int num_candidates,
               int pitch, float4* __restrict__ ranked_boxes, long long* __restrict__ ranked_labels,
               unsigned char* __restrict__ groups, unsigned char* __restrict__ survives,
               int* __restrict__ group_sizes) {
  __shared__ int sizes[kGroups];
  int num_chunks = (pitch + kThreads - 1) / kThreads;
  long long image = blockIdx.x / num_chunks, row = image * num_candidates;
  int rank = blockIdx.x % num_chunks * kThreads + threadIdx.x;
  if (threadIdx.x < kGroups) sizes[threadIdx.x] = 0;
  __syncthreads();
  if (rank < pitch) {
    int group = kNoGroup;
    if (rank < num_candidates && sorted_scores[row + rank] != minus_infinity()) {
      long long source = row + order[row + rank], label = labels[source];
      group = label & (kGroups - 1);
      ranked_boxes[row + rank] = boxes[source];
      ranked_labels[row + rank] = label;
      atomicAdd(&sizes[group], 1);
    }
    groups[image * pitch + rank] = group;
    survives[image * pitch + rank] = 0;
  }
  __syncthreads();
  if (threadIdx.x < kGroups && sizes[threadIdx.x] > 0) {
    atomicAdd(&group_sizes[image * kGroups + threadIdx.x], sizes[threadIdx.x]);
  }
}

// Add to the queue the members of `group` among the next 4 * kThreads ranks, of which this thread reads the four of one
// word; return how many they are.
__device__ int enqueue(const unsigned* __restrict__ groups, int word, int num_words, int group, int tail, int* queue,
                       int* partial) {
  unsigned packed = word < num_words ? groups[word] : kAllLanes, members = 0;
  for (int i = 0; i < 4; ++i) members |= unsigned((packed >> 8 * i & 255) == group) << i;
  int total;
  int place = tail + sum_before(__popc(members), partial, total);
  for (; members; members &= members - 1) queue[place++ & (kQueue - 1)] = 4 * word + __ffs(members) - 1;
  __syncthreads();
  return total;
}

// Decide who of a warp survives, lane 0 first: `suppressors` are the lanes that overlap this one.
__device__ unsigned resolve_warp(bool is_alive, unsigned suppressors) {
  unsigned survivors = 0;
  for (unsigned pending = __ballot_sync(kAllLanes, is_alive); pending;) {
    int best = __ffs(pending) - 1;
    survivors |= 1u << best;
    pending &= ~(1u << best | __ballot_sync(kAllLanes, suppressors >> best & 1));
  }
  return survivors;
}

// Sweep the candidates of one tile, one a thread: against the survivors before, then warp after warp against the new
// ones. Return the number of survivors, which passes `max_survivors` by less than a warp.
__device__ int sweep_tile(const Candidate& candidate, int rank, int num_warps, const Survivors& survivors,
                          int num_survivors, int max_survivors, float limit, unsigned char* survives) {
  __shared__ Candidate tile[kThreads];
  __shared__ int num_after[kWarps];  // warps
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  bool is_alive = rank >= 0 && !is_suppressed(candidate, survivors, 0, num_survivors, limit);
  tile[threadIdx.x] = candidate;
  __syncwarp();
  unsigned suppressors = 0;
  for (unsigned alive = __ballot_sync(kAllLanes, is_alive); alive; alive &= alive - 1) {
    int other = __ffs(alive) - 1;
    const Candidate& better = tile[warp * 32 + other];
    bool is_hit = better.label == candidate.label && overlap(better.box, candidate.box, limit);
    suppressors |= unsigned(is_hit) << other;
  }
  for (int turn = 0; turn < num_warps && num_survivors < max_survivors; ++turn) {
    if (warp == turn) {
      unsigned found = resolve_warp(is_alive, suppressors);
      if (found >> lane & 1) {
        int place = num_survivors + __popc(found & ((1u << lane) - 1));
        survivors.boxes[place] = candidate.box;
        survivors.labels[place] = candidate.label;
        survives[rank] = 1;
      }
      if (lane == 0) num_after[turn] = num_survivors + __popc(found);
    }
    __syncthreads();
    int num_now = num_after[turn];
    if (warp > turn && is_alive) is_alive = !is_suppressed(candidate, survivors, num_survivors, num_now, limit);
    num_survivors = num_now;
  }
  return num_survivors;
}

// Mark the ranks that survive. Block `image * kGroups + group` sweeps that group; it ends early once `max_survivors`
// have survived, since those come before all others of the group. `survivor_boxes` and `survivor_labels` [B, K] are
// scratch: the groups of an image share a row. They are written and read here, so they are not __restrict__.
extern "C" __global__ void __launch_bounds__(kThreads)
    nms_sweep(const float4* __restrict__ ranked_boxes, const long long* __restrict__ ranked_labels,
              const unsigned* __restrict__ groups, const int* __restrict__ group_sizes, int num_candidates, int pitch,
              int max_survivors, float limit, float4* survivor_boxes, long long* survivor_labels,
              unsigned char* __restrict__ survives) {
  __shared__ int queue[kQueue];
  __shared__ int partial[kWarps];
  int group = blockIdx.x % kGroups, num_words = pitch / 4;
  long long image = blockIdx.x / kGroups, row = image * num_candidates;
  const int* sizes = group_sizes + image * kGroups;
  int size = sizes[group], before = 0;
  for (int i = threadIdx.x % 32; i < group; i += 32) before += sizes[i];
  before = sum_of_warp(before);
  Survivors survivors = {survivor_boxes + row + before, survivor_labels + row + before};

  int num_found = 0, num_taken = 0, num_survivors = 0, word = threadIdx.x;
  while (num_taken < size && num_survivors < max_survivors) {
    for (; num_found < size && num_found - num_taken < kThreads; word += kThreads) {
      num_found += enqueue(groups + image * num_words, word, num_words, group, num_found, queue, partial);
    }
    int num_in_tile = min(num_found - num_taken, kThreads), rank = -1;
    Candidate candidate = {};
    if (threadIdx.x < num_in_tile) {
      rank = queue[(num_taken + threadIdx.x) & (kQueue - 1)];
      candidate = {ranked_boxes[row + rank], ranked_labels[row + rank]};
    }
    num_taken += num_in_tile;
    num_survivors = sweep_tile(candidate, rank, (num_in_tile + 31) / 32, survivors, num_survivors, max_survivors,
                               limit, survives + image * pitch);
  }
}

// Write the first `max_detections` survivors of each image by rank, then -1, and their number. A block an image.
extern "C" __global__ void __launch_bounds__(1024)
    nms_collect(const unsigned* __restrict__ survives, const long long* __restrict__ order,
                const int* __restrict__ group_sizes, int num_candidates, int pitch, long long max_detections,
                long long* __restrict__ keep, long long* __restrict__ count) {
  __shared__ int partial[32];
  long long image = blockIdx.x;
  static_assert(kGroups == 64, "each lane adds two sizes");
  int num_words = pitch / 4, lane = threadIdx.x % 32;
  const int* sizes = group_sizes + image * kGroups;
  int num_ranks = sum_of_warp(sizes[lane] + sizes[lane + 32]);
  keep += image * max_detections;
  order += image * num_candidates;

  long long num_kept = 0;
  for (int word = threadIdx.x; 4 * (word - threadIdx.x) < num_ranks && num_kept < max_detections; word += blockDim.x) {
    unsigned flags = word < num_words ? survives[image * num_words + word] : 0;
    int total;
    long long place = num_kept + sum_before(__popc(flags), partial, total);
    for (; flags && place < max_detections; flags &= flags - 1) {
      keep[place++] = order[4 * word + (__ffs(flags) - 1) / 8];
    }
    num_kept += total;
    __syncthreads();
  }
  num_kept = min(num_kept, max_detections);
  for (long long i = num_kept + threadIdx.x; i < max_detections; i += blockDim.x) keep[i] = -1;
  if (threadIdx.x == 0) count[image] = num_kept;
}
