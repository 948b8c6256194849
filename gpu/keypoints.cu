// Heat maps over boxes -> the best point of each, as Detectron2 finds it; a block takes one map of one box.
//
// The map is stretched to the box's size in whole pixels, bicubically (A = -0.75, half-pixel centres, borders repeated,
// as torch's upsample_bicubic2d), and never stored: each pixel is computed where the best is looked for.

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Taps {
    int index[4];
    float weight[4];
};

// Which four elements of an axis make up a pixel, and how much of each; `scale` is elements per pixel.
__device__ Taps taps_of(int pixel, float scale, int size) {
    constexpr float A = -0.75f;
    const float position = scale * (pixel + 0.5f) - 0.5f;
    const float base = floorf(position), t = position - base;
    const float before = t + 1, after = 1 - t, last = 2 - t;
    Taps taps;
    for (int i = 0; i < 4; ++i) taps.index[i] = min(max(static_cast<int>(base) - 1 + i, 0), size - 1);
    taps.weight[0] = ((A * before - 5 * A) * before + 8 * A) * before - 4 * A;
    taps.weight[1] = ((A + 2) * t - (A + 3)) * t * t + 1;
    taps.weight[2] = ((A + 2) * after - (A + 3)) * after * after + 1;
    taps.weight[3] = ((A * last - 5 * A) * last + 8 * A) * last - 4 * A;
    return taps;
}

__device__ float mix(const float* line, const Taps& taps) {
    return line[taps.index[0]] * taps.weight[0] + line[taps.index[1]] * taps.weight[1] +
           line[taps.index[2]] * taps.weight[2] + line[taps.index[3]] * taps.weight[3];
}

__device__ float sample(const float* map, int size, const Taps& row, const Taps& column) {
    float value = 0;
    for (int i = 0; i < 4; ++i) value += mix(map + row.index[i] * size, column) * row.weight[i];
    return value;
}

// A pixel of the stretched map; of equal values the first counts, row by row.
struct Peak {
    float value;
    long long pixel;

    __device__ bool beats(const Peak& other) const {
        return value > other.value || (value == other.value && pixel < other.pixel);
    }
};

__device__ Peak best_of_warp(Peak peak) {
    for (int distance = 16; distance > 0; distance /= 2) {
        const Peak other = {__shfl_down_sync(kAllLanes, peak.value, distance),
                            __shfl_down_sync(kAllLanes, peak.pixel, distance)};
        if (other.beats(peak)) peak = other;
    }
    return peak;
}

__device__ float sum_of_warp(float value) {
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(kAllLanes, value, distance);
    return value;
}

// `maps` [boxes, num_maps, size, size], `boxes` [boxes, 4], `points` [boxes, num_maps, 3]; a box without area, with a
// side above `max_side`, or with a NaN gets zeros.
extern "C" __global__ void __launch_bounds__(kThreads)
    locate_keypoints(const float* maps, const float* boxes, int num_maps, int size, float max_side, float* points) {
    extern __shared__ float map[];
    __shared__ Peak peaks[kWarps];
    __shared__ float sums[kWarps];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float* box = boxes + static_cast<long long>(blockIdx.x / num_maps) * 4;
    float* point = points + static_cast<long long>(blockIdx.x) * 3;
    const float side_x = box[2] - box[0], side_y = box[3] - box[1];
    if (!(side_x > 0 && side_y > 0 && side_x <= max_side && side_y <= max_side)) {
        if (threadIdx.x < 3) point[threadIdx.x] = 0;
        return;
    }
    const int num_elements = size * size;
    maps += static_cast<long long>(blockIdx.x) * num_elements;
    for (int i = threadIdx.x; i < num_elements; i += kThreads) map[i] = maps[i];
    __syncthreads();

    const float box_width = fmaxf(side_x, 1), box_height = fmaxf(side_y, 1);
    const int width = static_cast<int>(ceilf(box_width)), height = static_cast<int>(ceilf(box_height));
    const float scale_x = static_cast<float>(size) / width, scale_y = static_cast<float>(size) / height;
    Peak peak = {__int_as_float(0xff800000), 0};  // -infinity
    for (int y = warp; y < height; y += kWarps) {
        const Taps row = taps_of(y, scale_y, size);
        for (int x = lane; x < width; x += 32) {
            const Peak here = {sample(map, size, row, taps_of(x, scale_x, size)), static_cast<long long>(y) * width + x};
            if (here.beats(peak)) peak = here;
        }
    }
    peak = best_of_warp(peak);
    if (lane == 0) peaks[warp] = peak;
    __syncthreads();
    for (int i = 0; i < kWarps; ++i)
        if (i == 0 || peaks[i].beats(peak)) peak = peaks[i];

    float sum = 0;
    for (int i = threadIdx.x; i < num_elements; i += kThreads) sum += expf(map[i] - peak.value);
    sum = sum_of_warp(sum);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int i = 1; i < kWarps; ++i) sum += sums[i];
    const int x = static_cast<int>(peak.pixel % width), y = static_cast<int>(peak.pixel / width);
    point[0] = (x + 0.5f) * (box_width / width) + box[0];
    point[1] = (y + 0.5f) * (box_height / height) + box[1];
    point[2] = 1 / sum;
}
