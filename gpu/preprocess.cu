// Letterbox and normalise a batch in one launch: a block fills a tile of a slot (blockIdx.z), its threads write four
// neighbouring pixels of all three channels at a time. Each pixel reads four elements of a plane or, with antialiasing,
// a window that grows with the reduction.
//
// Planes are read where they lie, through the data cache: at the usual reductions neighbouring threads share its lines,
// so that each byte comes once from memory. What depends on a picture alone is worked out on the host
// (preprocess.py), where to read for a row or a column, once a tile.

#include <cuda_fp16.h>

namespace {

constexpr int kThreadsX = 32;
constexpr int kThreadsY = 8;
constexpr int kThreads = kThreadsX * kThreadsY;
constexpr int kBlocks = 4;   // on a multiprocessor: leaves the 64 registers that let all reads of a row be in flight
constexpr int kColumns = 4;  // that a thread writes: a vector of 16 bytes in single, and 8 in half precision
constexpr int kTileWidth = kThreadsX * kColumns;
constexpr int kTileHeight = 32;
constexpr int kChannels = 3;

using Byte = unsigned char;

// A picture and its place, as FRAME in preprocess.py lays them out. Origins and strides are those of the upright
// picture; the column stride of a single column is 0. Of two sizes, the first is luma's and the second chroma's.
struct alignas(16) Frame {
    const Byte* origin[kChannels];
    int row_stride[kChannels];  // bytes
    int column_stride[kChannels];
    int height[2];
    int width[2];
    float step_y[2];  // rows per row of the letterbox
    float step_x[2];
    int left;  // the letterbox, in pixels of the slot
    int top;
    int right;  // the first column and row after it
    int bottom;
    float4 weights[kChannels];    // a channel in 0..1 is (Y', Cb, Cr, 1) . weights, or (R', G', B', 1) . weights
    float2 normalise[kChannels];  // then times x plus y
    float padding[kChannels];
    int is_nv12;  // upright NV12: luma 1 byte apart in a row; chroma in aligned pairs, 2 bytes apart
};
static_assert(sizeof(Frame) == 192, "FRAME in preprocess.py has another layout");

// Where a sample lies along an axis: `fraction` of the way from the element `first` to the next.
struct Tap {
    unsigned first;
    float fraction;
};

// Half-pixel centres; beyond the outermost centres the border goes on.
__device__ Tap tap(int pixel, float step, int size) {
    const float position = fmaf(static_cast<float>(pixel) + 0.5f, step, -0.5f);
    const float clamped = fminf(fmaxf(position, 0.0f), static_cast<float>(size - 1));
    const int first = min(static_cast<int>(clamped), max(size - 2, 0));
    return {static_cast<unsigned>(first), clamped - static_cast<float>(first)};
}

__device__ float blend(float a, float b, float fraction) { return fmaf(fraction, b - a, a); }

// The two rows of a plane that a row of pixels reads.
struct Lines {
    const Byte* upper;
    const Byte* lower;
    float fraction;
};

// A lower row without weight is not fetched: it may not be there, and at a reduction to a third it would double the
// traffic of luma.
__device__ Lines lines(const Frame& frame, int channel, Tap row) {
    const long long stride = frame.row_stride[channel];
    const Byte* upper = frame.origin[channel] + row.first * stride;
    return {upper, row.fraction > 0.0f ? upper + stride : upper, row.fraction};
}

__device__ float sample(const Lines& rows, Tap column, int stride) {
    const Byte* upper = rows.upper + static_cast<long long>(column.first) * stride;
    const Byte* lower = rows.lower + static_cast<long long>(column.first) * stride;
    return blend(
        blend(__ldg(upper), __ldg(upper + stride), column.fraction),
        blend(__ldg(lower), __ldg(lower + stride), column.fraction),
        rows.fraction);
}

struct Chroma {
    float cb;
    float cr;
};

// Read and blend two neighbouring pairs: Cb is the low byte and Cr the high one.
__device__ Chroma blend_pairs(const Byte* first, float fraction) {
    const unsigned short* pairs = reinterpret_cast<const unsigned short*>(first);
    const unsigned a = __ldg(pairs), b = __ldg(pairs + 1);
    return {blend(a & 0xff, b & 0xff, fraction), blend(a >> 8, b >> 8, fraction)};
}

__device__ Chroma sample_pairs(const Lines& rows, Tap column) {
    const Chroma upper = blend_pairs(rows.upper + 2 * column.first, column.fraction);
    const Chroma lower = blend_pairs(rows.lower + 2 * column.first, column.fraction);
    return {blend(upper.cb, lower.cb, rows.fraction), blend(upper.cr, lower.cr, rows.fraction)};
}

// Which elements make a sample where they shrink, along one axis: the one at `first + i` weighs
// peak - |i - centre| * slope. The weights of the `count` elements add up to 1.
struct Window {
    int first;
    int count;
    float centre;
    float peak;
    float slope;
};

__device__ float weight(const Window& window, int i) {
    return fmaxf(fmaf(-fabsf(static_cast<float>(i) - window.centre), window.slope, window.peak), 0.0f);
}

// PIL's triangle: it reaches as far to either side as elements become one, but at least to the next one, which makes
// it the bilinear filter. What lies beyond the border has no weight, and the others share it.
__device__ Window window_at(int pixel, float step, int size) {
    const float reach = fmaxf(step, 1.0f);
    const float position = (static_cast<float>(pixel) + 0.5f) * step;
    const int first = min(max(static_cast<int>(position - reach + 0.5f), 0), size - 1);
    const int last = min(max(static_cast<int>(position + reach + 0.5f), first + 1), size);
    Window window{first, last - first, position - 0.5f - static_cast<float>(first), 1.0f, 1.0f / reach};
    float sum = 0.0f;
    for (int i = 0; i < window.count; ++i) sum += weight(window, i);
    // Outside of the letterbox there may be no weight at all; nothing is read for it.
    window.peak = sum > 0.0f ? 1.0f / sum : 1.0f;
    window.slope = sum > 0.0f ? window.slope / sum : 0.0f;
    return window;
}

// The rows of a plane that a row of pixels reads.
struct Band {
    const Byte* first;
    long long stride;
    Window rows;
};

__device__ Band band(const Frame& frame, int channel, const Window& rows) {
    const long long stride = frame.row_stride[channel];
    return {frame.origin[channel] + rows.first * stride, stride, rows};
}

__device__ float sample(const Band& band, const Window& columns, int stride) {
    const Byte* row = band.first + static_cast<long long>(columns.first) * stride;
    float sum = 0.0f;
    for (int y = 0; y < band.rows.count; ++y, row += band.stride) {
        float line = 0.0f;
        for (int x = 0; x < columns.count; ++x) line = fmaf(weight(columns, x), __ldg(row + x * stride), line);
        sum = fmaf(weight(band.rows, y), line, sum);
    }
    return sum;
}

__device__ Chroma sample_pairs(const Band& band, const Window& columns) {
    const Byte* row = band.first + 2 * columns.first;
    Chroma sum{0.0f, 0.0f};
    for (int y = 0; y < band.rows.count; ++y, row += band.stride) {
        const unsigned short* pairs = reinterpret_cast<const unsigned short*>(row);
        Chroma line{0.0f, 0.0f};
        for (int x = 0; x < columns.count; ++x) {
            const unsigned pair = __ldg(pairs + x);
            const float share = weight(columns, x);
            line = {fmaf(share, pair & 0xff, line.cb), fmaf(share, pair >> 8, line.cr)};
        }
        const float share = weight(band.rows, y);
        sum = {fmaf(share, line.cb, sum.cb), fmaf(share, line.cr, sum.cr)};
    }
    return sum;
}

// The two ways to sample: where to read in a row, and which rows to read.
struct Bilinear {
    using Column = Tap;
    using Row = Lines;
    static __device__ Column column(int pixel, float step, int size) { return tap(pixel, step, size); }
    static __device__ Row row(const Frame& frame, int channel, int pixel, float step, int size) {
        return lines(frame, channel, tap(pixel, step, size));
    }
};

struct Antialiased {
    using Column = Window;
    using Row = Band;
    static __device__ Column column(int pixel, float step, int size) { return window_at(pixel, step, size); }
    static __device__ Row row(const Frame& frame, int channel, int pixel, float step, int size) {
        return band(frame, channel, window_at(pixel, step, size));
    }
};

// What the threads of a block share.
template <typename Filter>
struct Tile {
    Frame frame;
    // Of luma, and of both chroma planes; neighbours lie apart, and threads close.
    typename Filter::Column columns[2][kColumns][kThreadsX];
    typename Filter::Row rows[kChannels][kTileHeight];
};

// Work out where the pixels of a tile are read; its first one is (x, y) of the slot. Ends with a barrier.
template <typename Filter>
__device__ void prepare(Tile<Filter>& tile, const Frame& source, int x, int y) {
    const int thread = static_cast<int>(threadIdx.y * kThreadsX + threadIdx.x);
    constexpr int kVectors = sizeof(Frame) / sizeof(uint4);
    if (thread < kVectors)
        reinterpret_cast<uint4*>(&tile.frame)[thread] = reinterpret_cast<const uint4*>(&source)[thread];
    __syncthreads();
    const Frame& frame = tile.frame;
    static_assert(kThreads == 2 * kTileWidth && kThreads >= kChannels * kTileHeight, "one round fills the tile");
    const int grid = thread / kTileWidth, column = thread % kTileWidth;
    tile.columns[grid][column % kColumns][column / kColumns] =
        Filter::column(x + column - frame.left, frame.step_x[grid], frame.width[grid]);
    if (thread < kChannels * kTileHeight) {
        const int channel = thread / kTileHeight, row = thread % kTileHeight, size = channel > 0;
        tile.rows[channel][row] =
            Filter::row(frame, channel, y + row - frame.top, frame.step_y[size], frame.height[size]);
    }
    __syncthreads();
}

// Sample and mix the pixels of thread `lane` in a row of the tile.
template <bool kNv12, typename Filter>
__device__ void mix(const Tile<Filter>& tile, int lane, int row, float (&pixels)[kColumns][kChannels]) {
    const Frame& frame = tile.frame;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        const auto luma_at = tile.columns[0][i][lane], chroma_at = tile.columns[1][i][lane];
        const float luma = sample(tile.rows[0][row], luma_at, kNv12 ? 1 : frame.column_stride[0]);
        const Chroma chroma = kNv12 ? sample_pairs(tile.rows[1][row], chroma_at)
                                    : Chroma{sample(tile.rows[1][row], chroma_at, frame.column_stride[1]),
                                             sample(tile.rows[2][row], chroma_at, frame.column_stride[2])};
#pragma unroll
        for (int channel = 0; channel < kChannels; ++channel) {
            const float4 weights = frame.weights[channel];
            const float2 normalise = frame.normalise[channel];
            const float offset = fmaf(weights.y, chroma.cb, fmaf(weights.z, chroma.cr, weights.w));
            pixels[i][channel] = fmaf(__saturatef(fmaf(weights.x, luma, offset)), normalise.x, normalise.y);
        }
    }
}

// Replace what lies outside of the letterbox; all of it where the row does.
__device__ void pad(const Frame& frame, int x, bool is_row_outside, float (&pixels)[kColumns][kChannels]) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        const bool is_outside = is_row_outside || x + i < frame.left || x + i >= frame.right;
#pragma unroll
        for (int channel = 0; channel < kChannels; ++channel)
            if (is_outside) pixels[i][channel] = frame.padding[channel];
    }
}

__device__ void assign(float& element, float value) { element = value; }
__device__ void assign(__half& element, float value) { element = __float2half_rn(value); }

template <typename Element>
struct alignas(kColumns * sizeof(Element)) Vector {
    Element elements[kColumns];
};

// Write a row's pixels as three vectors: one a channel, or the twelve interleaved elements in turn.
template <typename Element, bool kChannelsLast>
__device__ void store_vectors(Element* first, long long plane, const float (&pixels)[kColumns][kChannels]) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
        Vector<Element> vector;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            const int flat = k * kColumns + i;
            assign(vector.elements[i], kChannelsLast ? pixels[flat / kChannels][flat % kChannels] : pixels[i][k]);
        }
        *reinterpret_cast<Vector<Element>*>(first + k * (kChannelsLast ? kColumns : plane)) = vector;
    }
}

template <typename Element, bool kChannelsLast>
__device__ void store_elements(
    Element* first, long long plane, int num_columns, const float (&pixels)[kColumns][kChannels]) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
#pragma unroll
        for (int channel = 0; channel < kChannels; ++channel)
            if (i < num_columns)
                assign(first[kChannelsLast ? i * kChannels + channel : channel * plane + i], pixels[i][channel]);
    }
}

template <typename Element, bool kChannelsLast, typename Filter>
__device__ void fill(Tile<Filter>& tile, const Frame* frames, Element* out, int height, int width) {
    const int tile_x = static_cast<int>(blockIdx.x) * kTileWidth, tile_y = static_cast<int>(blockIdx.y) * kTileHeight;
    prepare(tile, frames[blockIdx.z], tile_x, tile_y);
    const Frame& frame = tile.frame;
    const int lane = static_cast<int>(threadIdx.x), x = tile_x + lane * kColumns;
    if (x >= width) return;
    const long long plane = static_cast<long long>(height) * width;
    Element* slot = out + blockIdx.z * kChannels * plane;
    const bool is_aligned = width % kColumns == 0 && reinterpret_cast<size_t>(out) % sizeof(Vector<Element>) == 0;
    const bool is_inside = x >= frame.left && x + kColumns <= frame.right;
    const bool is_outside = x + kColumns <= frame.left || x >= frame.right;
    for (int row = static_cast<int>(threadIdx.y); row < min(kTileHeight, height - tile_y); row += kThreadsY) {
        const int y = tile_y + row;
        const bool is_row_outside = y < frame.top || y >= frame.bottom;
        float pixels[kColumns][kChannels] = {};
        if (!is_row_outside && !is_outside) {
            if (frame.is_nv12)
                mix<true>(tile, lane, row, pixels);
            else
                mix<false>(tile, lane, row, pixels);
        }
        if (is_row_outside || !is_inside) pad(frame, x, is_row_outside, pixels);
        Element* first = slot + (static_cast<long long>(y) * width + x) * (kChannelsLast ? kChannels : 1);
        if (is_aligned)
            store_vectors<Element, kChannelsLast>(first, plane, pixels);
        else
            store_elements<Element, kChannelsLast>(first, plane, width - x, pixels);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    preprocess_float32(const Frame* __restrict__ frames, float* __restrict__ out, int height, int width) {
    __shared__ Tile<Bilinear> tile;
    fill<float, false>(tile, frames, out, height, width);
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    preprocess_float32_channels_last(const Frame* __restrict__ frames, float* __restrict__ out, int height, int width) {
    __shared__ Tile<Bilinear> tile;
    fill<float, true>(tile, frames, out, height, width);
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    preprocess_float16(const Frame* __restrict__ frames, __half* __restrict__ out, int height, int width) {
    __shared__ Tile<Bilinear> tile;
    fill<__half, false>(tile, frames, out, height, width);
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    preprocess_float16_channels_last(const Frame* __restrict__ frames, __half* __restrict__ out, int height, int width) {
    __shared__ Tile<Bilinear> tile;
    fill<__half, true>(tile, frames, out, height, width);
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    preprocess_float32_antialias(const Frame* __restrict__ frames, float* __restrict__ out, int height, int width) {
    __shared__ Tile<Antialiased> tile;
    fill<float, false>(tile, frames, out, height, width);
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    preprocess_float32_channels_last_antialias(const Frame* __restrict__ frames, float* __restrict__ out, int height, int width) {
    __shared__ Tile<Antialiased> tile;
    fill<float, true>(tile, frames, out, height, width);
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    preprocess_float16_antialias(const Frame* __restrict__ frames, __half* __restrict__ out, int height, int width) {
    __shared__ Tile<Antialiased> tile;
    fill<__half, false>(tile, frames, out, height, width);
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    preprocess_float16_channels_last_antialias(const Frame* __restrict__ frames, __half* __restrict__ out, int height, int width) {
    __shared__ Tile<Antialiased> tile;
    fill<__half, true>(tile, frames, out, height, width);
}
