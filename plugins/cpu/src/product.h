// Products of activations with weights in panels, for the operators that are made of them.
//
// A product is jobs, each with some rows of x and a weight of its own: a linear layer has one, a
// mixture of experts one an expert. All weights have one format and one shape. First pack() lays the
// rows of all jobs side by side in tiles, as the kernels read them; then columns() computes a range
// of panels for all rows of one job. Both can be called for different pieces at once.
#pragma once

#include "work.h"

namespace ingot::cpu {

struct Job {
    const uint8_t *weight;
    size_t first;  // of the rows of all jobs
    size_t rows;
};

class Product {
   public:
    // Where a row of x begins, by its number among the rows of all jobs.
    using Row = const float *(*)(const void *self, size_t row);

    // rounded: whether x is rounded to int8, which takes whole numbers.
    Product(const ingot_cpu_format &format, size_t columns, size_t out, bool rounded,
            const Job *jobs, size_t count);

    void pack(const ingot_cpu_threads &threads, Row row, const void *self) const;

    // y: [all rows, out]; bias: [out] or null, of a job's weight.
    void multiply(const ingot_cpu_threads &threads, float *y, const float *bias) const;

    ingot_cpu_format format;
    Layout layout;
    size_t columns, out;
    size_t padded;  // columns with those that fill up the last block
    bool rounded;
    const Job *jobs;
    size_t count, rows;
    size_t tile_rows;  // the most of a tile

    // Tiles of float32, [padded][rows of the tile] one behind the other; or rounded: [padded /
    // 4][rows][4] of int8, and a scale and a sum for each [block][row].
    Buffer<float> x;
    Buffer<int8_t> numbers;
    Buffer<float> scales;
    Buffer<int32_t> sums;
};

// Tile t of n rows in tiles of at most so many, all about as tall.
struct Tiles {
    Tiles(size_t rows, size_t most) : rows(rows), count((rows + most - 1) / most) {}
    size_t begin(size_t tile) const { return rows * tile / count; }
    size_t rows, count;
};

}  // namespace ingot::cpu
