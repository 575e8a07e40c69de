// How weights lie: in panels of sixteen rows, each the whole length of them.
//
// A matrix [O, K] is ceil(O / 16) panels one behind the other; rows that are missing in the last
// are zero. In a panel the sixteen rows lie side by side, so that one vector holds the same columns
// of many rows, and no sum runs across a vector:
//
//   float32   [K][16] of float
//   bfloat16  [K'/2][16][2] of uint16, K' = K rounded up to 2; the first column is the low half
//   int8      four parts, each filled up with zeros to a multiple of 64 bytes:
//               factors      [16] of float, powers of two
//               scales       [blocks][16] of float16
//               zero points  [blocks][16] of uint8, where the format has them
//               numbers      [blocks][block / 4][16][4] of uint8
//   int4      the same with numbers [blocks][block / 8][16][4]: byte b of a group of eight columns
//             has column b in its low half and column 4 + b in its high half
//
// A whole number q stands for (q - zero point) * (scale * factor); the zero point is 128 or 8 where
// none is stored. Columns past K are the zero point.
//
// plugins/cpu/panels.py writes and reads the same.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "ingot_cpu.h"

namespace ingot::cpu {

constexpr size_t kRows = 16;

inline size_t round_up(size_t value, size_t to) { return (value + to - 1) / to * to; }

inline bool is_whole(const ingot_cpu_format &format) {
    return format.numbers == INGOT_CPU_INT8 || format.numbers == INGOT_CPU_INT4;
}

inline size_t panels_of(size_t rows) { return (rows + kRows - 1) / kRows; }

// Where the parts of a panel begin, in bytes.
struct Layout {
    Layout(const ingot_cpu_format &format, size_t columns) {
        switch (format.numbers) {
            case INGOT_CPU_FLOAT32: bytes = columns * kRows * 4; break;
            case INGOT_CPU_BFLOAT16: bytes = round_up(columns, 2) * kRows * 2; break;
            default: {
                const size_t block = size_t(format.block);
                blocks = (columns + block - 1) / block;
                block_bytes = kRows * block / (format.numbers == INGOT_CPU_INT4 ? 2 : 1);
                scales = kRows * 4;
                zeros = scales + round_up(blocks * kRows * 2, 64);
                numbers = zeros + (format.zero_points ? round_up(blocks * kRows, 64) : 0);
                bytes = numbers + blocks * block_bytes;
            }
        }
    }
    size_t bytes = 0, blocks = 0, block_bytes = 0, scales = 0, zeros = 0, numbers = 0;
};

inline size_t matrix_bytes(const ingot_cpu_format &format, size_t rows, size_t columns) {
    return panels_of(rows) * Layout(format, columns).bytes;
}

// Number `index` of those that begin at `from`, which may lie anywhere.
template <typename T>
T read(const uint8_t *from, size_t index) {
    T value;
    std::memcpy(&value, from + index * sizeof(T), sizeof(T));
    return value;
}

}  // namespace ingot::cpu
