// Where the runs of pasted masks end, down the columns of the frame, as COCO counts them; pixels are never stored.
//
// A pixel's bit is cheap: while a thread walks down a column, the two rows of the mask that it reads between change
// seldom. So the bits are found twice, once to count the runs of each part of a mask and once to write them where the
// prefix sum of those counts says: less traffic than keeping the bits, and no buffer that grows with the frame.
//
// A run ends where a pixel differs from the one before it, which for the top of a column is the bottom of the column to
// its left. Bits come as words: bit r of a word is row `top + r` of one column. Every product and sum is rounded by
// itself, in the order of the twin (gpu/reference.py), so that both agree on every pixel.

#include <cuda_fp16.h>

constexpr int kThreads = 256;     // of a block; blockIdx.x is the mask, blockIdx.y the part of its columns
constexpr int kTileWords = 4096;  // words that a block sorts into columns at once

enum ElementType { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

__device__ float load(const void* elements, int type, long long index) {
    if (type == kFloat32) return static_cast<const float*>(elements)[index];
    if (type == kFloat16) return __half2float(static_cast<const __half*>(elements)[index]);
    return __uint_as_float(static_cast<unsigned>(static_cast<const unsigned short*>(elements)[index]) << 16);
}

struct Box {
    float x1, y1, x2, y2;

    // NaN compares with nothing; an infinity has no finite distance to itself.
    __device__ bool has_area() const {
        return x2 > x1 && y2 > y1 && x1 - x1 == 0.0f && y1 - y1 == 0.0f && x2 - x2 == 0.0f && y2 - y2 == 0.0f;
    }
};

// One row of the table of placements.
struct Placement {
    float scale_x, scale_y, left, top, width, height;
};

// The pixels [x0, x1) x [y0, y1) that may be set, in a frame of width x height.
struct Region {
    int x0, y0, x1, y1, width, height;

    __device__ bool is_empty() const { return x0 >= x1 || y0 >= y1; }

    // A region as tall as the frame: its runs go on from column to column.
    __device__ bool is_tall() const { return y0 == 0 && y1 == height; }

    // Rows and columns that hold a run's end: those of the region, and the pixel behind the last one of a run.
    __device__ int num_rows() const { return y1 - y0 + !is_tall(); }
    __device__ int num_columns() const { return is_empty() ? 0 : x1 - x0 + (is_tall() && x1 < width); }
};

// Two neighbours along one axis, and how far the sample lies from the first towards the second.
struct Tap {
    int lower, upper;
    float fraction;
};

__device__ Tap tap(float position, int size) {
    position = fminf(fmaxf(position, 0.0f), static_cast<float>(size - 1));
    const int lower = static_cast<int>(position);
    return {lower, min(lower + 1, size - 1), position - static_cast<float>(lower)};
}

__device__ int clip(float position, float limit) { return static_cast<int>(fminf(fmaxf(position, 0.0f), limit)); }

__device__ Region clip_to_frame(const Box& box, const Placement& frame, float x0, float y0, float x1, float y1) {
    const int width = static_cast<int>(frame.width), height = static_cast<int>(frame.height);
    if (!box.has_area()) return {0, 0, 0, 0, width, height};
    return {clip(x0, frame.width), clip(y0, frame.height), clip(x1, frame.width), clip(y1, frame.height), width, height};
}

// A mask's logits over the whole input of the network, cut at the box.
struct PrototypeMask {
    const void* logits;
    int type;
    long long first;
    int num_rows, num_columns;
    float row_ratio, column_ratio, limit;
    Box box;
    Placement frame;

    __device__ Region region() const {
        return clip_to_frame(box, frame, ceilf(box.x1 - 0.5f), ceilf(box.y1 - 0.5f), ceilf(box.x2 - 0.5f),
                             ceilf(box.y2 - 0.5f));
    }
    __device__ Tap column(int x) const {
        return tap(((x + 0.5f) * frame.scale_x + frame.left) * column_ratio - 0.5f, num_columns);
    }
    __device__ Tap row(int y) const {
        return tap(((y + 0.5f) * frame.scale_y + frame.top) * row_ratio - 0.5f, num_rows);
    }
    __device__ float at(int row, int column) const {
        return load(logits, type, first + static_cast<long long>(row) * num_columns + column);
    }
    __device__ bool is_set(float logit) const { return logit > limit; }
};

// A mask's probabilities over its box, with a ring of zeros around them.
struct BoxMask {
    const void* probabilities;
    int type;
    long long first;
    int size;
    float threshold;
    Box box;
    Placement frame;

    __device__ Region region() const {
        return clip_to_frame(box, frame, floorf(box.x1) - 1.0f, floorf(box.y1) - 1.0f, ceilf(box.x2) + 1.0f,
                             ceilf(box.y2) + 1.0f);
    }
    // +0.5: -0.5 from the first half-pixel centre, and +1 for the ring.
    __device__ Tap column(int x) const {
        return tap((x + 0.5f - box.x1) / (box.x2 - box.x1) * static_cast<float>(size) + 0.5f, size + 2);
    }
    __device__ Tap row(int y) const {
        return tap((y + 0.5f - box.y1) / (box.y2 - box.y1) * static_cast<float>(size) + 0.5f, size + 2);
    }
    __device__ float at(int row, int column) const {
        const bool is_ring = row == 0 || column == 0 || row > size || column > size;
        return is_ring ? 0.0f : load(probabilities, type, first + (row - 1) * size + column - 1);
    }
    __device__ bool is_set(float probability) const { return probability >= threshold; }
};

template <class Mask>
__device__ float between_columns(const Mask& mask, int row, const Tap& column) {
    const float left = mask.at(row, column.lower), right = mask.at(row, column.upper);
    return left + (right - left) * column.fraction;
}

// The bits of rows [top, top + num_rows) of column x, num_rows <= 32; outside the region there are zeros.
template <class Mask>
__device__ unsigned bits_of(const Mask& mask, const Region& region, int x, int top, int num_rows) {
    if (x < region.x0 || x >= region.x1) return 0;
    const Tap column = mask.column(x);
    float above = 0.0f, below = 0.0f;
    int loaded = -1;
    unsigned bits = 0;
    const int stop = min(top + num_rows, region.y1);
    for (int y = max(top, region.y0); y < stop; ++y) {
        const Tap row = mask.row(y);
        if (row.lower != loaded) {
            loaded = row.lower;
            above = between_columns(mask, row.lower, column);
            below = between_columns(mask, row.upper, column);
        }
        bits |= static_cast<unsigned>(mask.is_set(above + (below - above) * row.fraction)) << (y - top);
    }
    return bits;
}

// Which of the rows top .. top + 31 of column x differ from the pixel before them: there a run ends.
template <class Mask>
__device__ unsigned run_ends(const Mask& mask, const Region& region, int x, int top) {
    // The row below the frame stands for the top of the next column, where that one is not looked at by itself. Behind
    // the last column the mask ends anyway.
    const bool looks_below = region.y0 > 0 && x + 1 < region.width;
    const int num_rows = min(region.y1 + 1, region.height + looks_below) - top;
    if (num_rows <= 0) return 0;
    const unsigned bits = bits_of(mask, region, x, top, 32);
    const bool is_top = top == 0;
    const unsigned before = bits_of(mask, region, x - is_top, is_top ? region.height - 1 : top - 1, 1);
    const unsigned ends = bits ^ (bits << 1 | before);
    return num_rows < 32 ? ends & ((1u << num_rows) - 1) : ends;
}

// Sum what the threads before this one hold, and what all hold.
__device__ int sum_before(int value, int& total) {
    __shared__ int sums[kThreads / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = value;
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, distance);
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

// The columns of a mask's region that one block looks at, and the words of each.
struct Part {
    int begin, end;  // columns of the region
    int num_words;   // of a column; odd, so that neighbouring columns begin in different banks of the shared memory

    __device__ explicit Part(const Region& region) {
        const int num_columns = region.num_columns(), num_parts = gridDim.y;
        const int share = ((num_columns + num_parts - 1) / num_parts + 31) / 32 * 32;
        num_words = (region.num_rows() + 31) / 32 | 1;
        begin = min(static_cast<int>(blockIdx.y) * share, num_columns);
        // A column of more than 131,000 rows fits into no tile; a mask so tall comes out empty.
        end = num_words > kTileWords ? begin : min(begin + share, num_columns);
    }

    // How many columns fit into a tile; whole warps where possible, so that a warp's threads read the same rows.
    __device__ int tile_columns() const {
        const int most = kTileWords / num_words;
        return most < 32 ? most : most / 32 * 32;
    }
};

// Write into table [M, parts + 1] how many runs end within each part, and 1 for the run at whose end the mask ends.
template <class Mask>
__device__ void count(const Mask& mask, bool is_valid, int* table) {
    const Region region = mask.region();
    const Part part(region);
    const int num_columns = is_valid ? part.end - part.begin : 0;
    int num_ends = 0, total;
    for (int i = threadIdx.x; i < num_columns * part.num_words; i += kThreads) {
        const int x = region.x0 + part.begin + i % num_columns, top = region.y0 + 32 * (i / num_columns);
        num_ends += __popc(run_ends(mask, region, x, top));
    }
    sum_before(num_ends, total);
    int* row = table + static_cast<long long>(blockIdx.x) * (gridDim.y + 1);
    if (threadIdx.x == 0) row[blockIdx.y] = total;
    if (threadIdx.x == 0 && blockIdx.y == 0) row[gridDim.y] = is_valid;
}

// Write the ends of a tile's runs, in order; each thread takes a stretch of the words.
__device__ int write_tile(const unsigned* tile, int num_words, int column_words, const Region& region, int x, int* ends) {
    const int stretch = (num_words + kThreads - 1) / kThreads | 1;
    const int first = min(static_cast<int>(threadIdx.x) * stretch, num_words), last = min(first + stretch, num_words);
    int num_ends = 0, total;
    for (int i = first; i < last; ++i) num_ends += __popc(tile[i]);
    ends += sum_before(num_ends, total);
    for (int i = first; i < last; ++i) {
        const int top = region.y0 + 32 * (i % column_words);
        for (unsigned word = tile[i]; word != 0; word &= word - 1) {
            *ends++ = (x + i / column_words) * region.height + top + __ffs(static_cast<int>(word)) - 1;
        }
    }
    return total;
}

// Write the ends of all runs; positions [M * (parts + 1) + 1] are the sums of the table before each entry. `tile` is
// shared memory for kTileWords.
template <class Mask>
__device__ void write(const Mask& mask, bool is_valid, const long long* positions, long long capacity, unsigned* tile,
                      int* ends) {
    const long long num_entries = gridDim.y + 1;
    if (!is_valid || positions[gridDim.x * num_entries] > capacity) return;
    positions += blockIdx.x * num_entries;
    const Region region = mask.region();
    const Part part(region);
    if (threadIdx.x == 0 && blockIdx.y == 0) ends[positions[gridDim.y]] = region.width * region.height;
    ends += positions[blockIdx.y];
    const int step = part.tile_columns();
    for (int begin = part.begin; begin < part.end; begin += step) {
        const int num_columns = min(step, part.end - begin), num_words = num_columns * part.num_words;
        for (int i = threadIdx.x; i < num_words; i += kThreads) {
            const int column = i % num_columns, word = i / num_columns;
            tile[column * part.num_words + word] =
                run_ends(mask, region, region.x0 + begin + column, region.y0 + 32 * word);
        }
        __syncthreads();
        ends += write_tile(tile, num_words, part.num_words, region, region.x0 + begin, ends);
        __syncthreads();  // the next tile overwrites this one
    }
}

__device__ PrototypeMask prototype_mask(const void* logits, int type, int num_rows, int num_columns, float row_ratio,
                                        float column_ratio, float limit, const Box* boxes, const Placement* frames,
                                        int num_objects) {
    const long long first = static_cast<long long>(blockIdx.x) * num_rows * num_columns;
    return {logits,       type,  first,             num_rows,                        num_columns, row_ratio,
            column_ratio, limit, boxes[blockIdx.x], frames[blockIdx.x / num_objects]};
}

__device__ BoxMask box_mask(const void* probabilities, int type, int size, float threshold, const Box* boxes,
                            const Placement* frames, int num_objects) {
    const long long first = static_cast<long long>(blockIdx.x) * size * size;
    return {probabilities, type, first, size, threshold, boxes[blockIdx.x], frames[blockIdx.x / num_objects]};
}

extern "C" __global__ void __launch_bounds__(kThreads)
    count_prototype_runs(const void* logits, int type, int num_rows, int num_columns, float row_ratio,
                         float column_ratio, float limit, const Box* boxes, const bool* valid, const Placement* frames,
                         int num_objects, int* table) {
    count(prototype_mask(logits, type, num_rows, num_columns, row_ratio, column_ratio, limit, boxes, frames,
                         num_objects),
          valid[blockIdx.x], table);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    write_prototype_runs(const void* logits, int type, int num_rows, int num_columns, float row_ratio,
                         float column_ratio, float limit, const Box* boxes, const bool* valid, const Placement* frames,
                         int num_objects, const long long* positions, long long capacity, int* ends) {
    __shared__ unsigned tile[kTileWords];
    write(prototype_mask(logits, type, num_rows, num_columns, row_ratio, column_ratio, limit, boxes, frames,
                         num_objects),
          valid[blockIdx.x], positions, capacity, tile, ends);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    count_box_runs(const void* probabilities, int type, int size, float threshold, const Box* boxes, const bool* valid,
                   const Placement* frames, int num_objects, int* table) {
    count(box_mask(probabilities, type, size, threshold, boxes, frames, num_objects), valid[blockIdx.x], table);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    write_box_runs(const void* probabilities, int type, int size, float threshold, const Box* boxes, const bool* valid,
                   const Placement* frames, int num_objects, const long long* positions, long long capacity,
                   int* ends) {
    __shared__ unsigned tile[kTileWords];
    write(box_mask(probabilities, type, size, threshold, boxes, frames, num_objects), valid[blockIdx.x], positions,
          capacity, tile, ends);
}
