// The ends of the runs of masks -> COCO's compressed ASCII, one mask after another; a block packs a mask.
//
// A run length is cut into groups of five bits, lowest first, and from the fourth on it is the difference to the one
// before last (maskApi.c, rleToString). How long a string becomes is known only when every run was looked at, so the
// strings are measured first, and written where the sum of the lengths before each says.

constexpr int kThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

// The ends of one mask's runs, in order.
struct Runs {
    const int* ends;
    int num_runs;

    __device__ int end(int run) const { return run < 0 ? 0 : ends[run]; }

    // The number that stands for a run; a frame has fewer than 2^31 pixels, so it fits.
    __device__ int value(int run) const {
        const int length = end(run) - end(run - 1);
        return run > 2 ? length - (end(run - 2) - end(run - 3)) : length;
    }
};

// `positions` [M * stride + 1] are those of paste.cu; where the runs did not fit, there are none to pack.
__device__ Runs runs_of_mask(const int* ends, const long long* positions, int stride, long long capacity) {
    const long long num_masks = gridDim.x, mask = blockIdx.x;
    if (positions[num_masks * stride] > capacity) return {ends, 0};
    const long long first = positions[mask * stride];
    return {ends + first, static_cast<int>(positions[(mask + 1) * stride] - first)};
}

// Five bits with their sign: what one character holds.
__device__ bool needs_more(int value) { return value < -16 || value > 15; }

__device__ int num_characters(int value) {
    int count = 1;
    for (; needs_more(value); value >>= 5) ++count;
    return count;
}

__device__ void write_value(int value, unsigned char* characters) {
    for (; needs_more(value); value >>= 5) *characters++ = static_cast<unsigned char>(48 + (value & 31 | 32));
    *characters = static_cast<unsigned char>(48 + (value & 31));
}

// Sum what the threads before this one hold, and what all hold.
__device__ int sum_before(int value, int& total) {
    __shared__ int sums[kThreads / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = value;
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, distance);
        if (lane >= distance) sum += other;
    }
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int i = 0; i < kThreads / 32; ++i) {
        if (i < warp) before += sums[i];
        total += sums[i];
    }
    __syncthreads();  // the next call writes `sums`
    return before + sum - value;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    measure_strings(const int* ends, const long long* positions, int stride, long long capacity, int* lengths) {
    const Runs runs = runs_of_mask(ends, positions, stride, capacity);
    int length = 0, total;
    for (int run = threadIdx.x; run < runs.num_runs; run += kThreads) length += num_characters(runs.value(run));
    sum_before(length, total);
    if (threadIdx.x == 0) lengths[blockIdx.x] = total;
}

// `offsets` [M + 1] say where each mask's string begins.
extern "C" __global__ void __launch_bounds__(kThreads)
    write_strings(const int* ends, const long long* positions, int stride, long long capacity, const long long* offsets,
                  unsigned char* characters) {
    const Runs runs = runs_of_mask(ends, positions, stride, capacity);
    characters += offsets[blockIdx.x];
    for (int first = 0; first < runs.num_runs; first += kThreads) {
        const int run = first + static_cast<int>(threadIdx.x);
        const int value = run < runs.num_runs ? runs.value(run) : 0;
        int total;
        const int before = sum_before(run < runs.num_runs ? num_characters(value) : 0, total);
        if (run < runs.num_runs) write_value(value, characters + before);
        characters += total;
    }
}
